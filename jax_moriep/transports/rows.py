"""Where rows go, in pure JAX: the order of rows as a stable sort, and picking by it.

The transports that are written in JAX share it; the CPU's and the GPUs' kernels have their own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moriep.plan import DROPPED, NOT_HERE, ExchangeShape, kept_counts, run_starts
from jax_moriep.runtime import compat


def place_routes(ids: jax.Array, rank: jax.Array, shape: ExchangeShape) -> tuple[jax.Array, jax.Array]:
    """Gives every route of a group its row on one rank.

    Args:
      ids: i32[R, T, K], expert ids by source rank and source token.
      rank: i32[], the rank whose rows these are.
      shape: the sizes.

    Returns:
      routes: i32[R, T, K], each route's row; -1 where it is not this rank's, -2 where there is no room.
      group_sizes: i32[L], rows of each local expert.
    """
    flat = ids.reshape(-1)
    local = flat - rank * shape.num_local_experts
    here = (flat >= 0) & (flat < shape.num_experts) & (local >= 0) & (local < shape.num_local_experts)
    local = jnp.where(here, local, shape.num_local_experts)

    # A stable sort by local expert keeps the order (source rank, source token, k) within each run.
    by_expert = jnp.argsort(local, stable=True)
    counts = jnp.bincount(local, length=shape.num_local_experts + 1).astype(jnp.int32)
    place_in_run = jnp.arange(flat.size, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[local[by_expert]]
    starts = jnp.append(run_starts(counts[:-1], shape.block), 0)
    sorted_rows = (starts[local[by_expert]] + place_in_run).astype(jnp.int32)
    row_of_route = jnp.zeros_like(local, jnp.int32).at[by_expert].set(sorted_rows)
    routes = jnp.where(here, jnp.where(row_of_route < shape.capacity, row_of_route, DROPPED), NOT_HERE)
    return routes.reshape(ids.shape), kept_counts(counts[:-1], shape.block, shape.capacity)


def route_of_row(routes: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """For each row the flat route (source rank, token, k) that fills it, and whether one does."""
    rows = routes.reshape(-1)
    route = inverse(jnp.where(rows >= 0, rows, capacity), capacity)
    return jnp.maximum(route, 0), route >= 0


def inverse(places: jax.Array, size: int) -> jax.Array:
    """For each number below ``size`` where in ``places`` it stands, -1 for nowhere.

    Args:
      places: i32[N], distinct numbers; those that are not below ``size`` stand for none.
      size: how many numbers there are.

    Returns:
      i32[size].
    """
    found = compat.pcast_varying(jnp.full((size,), -1, jnp.int32), compat.varying_axes(places))
    return found.at[places].set(jnp.arange(places.size, dtype=jnp.int32), mode="drop")


def pick(values: jax.Array, index: jax.Array, wanted: jax.Array) -> jax.Array:
    """values[index] where wanted, zeros elsewhere; also where there are no values at all."""
    if not values.shape[0]:
        return compat.zeros_like_varying((*index.shape, *values.shape[1:]), values.dtype, values, index)
    return jnp.where(wanted.reshape(wanted.shape + (1,) * (values.ndim - 1)), values[index], 0)
