"""transport="collective": jax.lax collectives only, so it runs on any platform and any number of hosts.

Tokens are all-gathered, which at the worst-case capacity moves as few bytes as an all-to-all; each rank then
picks its rows. Combine sums each rank's rows per token and returns one row per (token, rank) by all_to_all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.config import MoEConfig
from jax_moriep.plan import DROPPED, NOT_HERE, ExchangeShape, Link, Opened, kept_counts, run_starts
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place


def unavailable_reason(place: Place) -> str | None:
    """None: it runs everywhere."""
    del place
    return None


def open(  # noqa: A001 - the contract's name
    place: Place, cfg: MoEConfig | None, shape: ExchangeShape | None, *, again: bool = False
) -> Opened:
    """Nothing: jax opens its collectives itself."""
    del place, cfg, shape, again
    return Opened()


def dispatch(
    link: Link, x: jax.Array, ids: jax.Array, weights: jax.Array, words: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``transports.Transport.dispatch``.

    Its own part of a plan are the routes i32[R, T, K]: the row on this rank of the route (source rank, token,
    k); -1: not this rank's; -2: dropped here for want of capacity.
    """
    shape = link.shape
    all_ids = lax.all_gather(ids, link.axis_name)
    all_weights = lax.all_gather(weights, link.axis_name)
    flat = all_ids.reshape(-1)
    local = flat - lax.axis_index(link.axis_name) * shape.num_local_experts
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

    own = routes.reshape(all_ids.shape)
    rows, order = replay(link, x, ids, own, order)
    row_weights = _pick(all_weights.reshape(-1), *_route_of_row(own, shape.capacity))
    group_sizes = kept_counts(counts[:-1], shape.block, shape.capacity)
    all_words = lax.all_gather(words, link.axis_name, to="invarying")
    return rows, row_weights, group_sizes, all_words, own, order


def replay(
    link: Link, x: jax.Array, ids: jax.Array, own: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See ``transports.Transport.replay``."""
    del ids
    all_x = lax.all_gather(x, link.axis_name).reshape(-1, x.shape[1])
    route, filled = _route_of_row(own, link.shape.capacity)
    return _pick(all_x, route // link.shape.top_k, filled), order


def combine(
    link: Link,
    rows: jax.Array,
    ids: jax.Array,
    own: jax.Array,
    order: jax.Array,
    row_scalars: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """See ``transports.Transport.combine``."""
    del ids
    shape = link.shape
    filled = own >= 0
    row = jnp.maximum(own, 0)
    sums = compat.zeros_like_varying(
        (shape.num_ranks, shape.num_tokens, rows.shape[1]), jnp.float32, rows, row
    )
    for k in range(shape.top_k):
        sums = sums + _pick(rows, row[:, :, k], filled[:, :, k]).astype(jnp.float32)
    parts = lax.all_to_all(sums.astype(rows.dtype), link.axis_name, 0, 0)
    y = parts.astype(jnp.float32).sum(0).astype(rows.dtype)
    if row_scalars is None:
        return y, None, order
    scalars = _pick(row_scalars, row, filled)
    return y, lax.all_to_all(scalars, link.axis_name, 0, 0).sum(0), order


def _route_of_row(routes: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """For each row the flat route (source rank, token, k) that fills it, and whether one does."""
    rows = routes.reshape(-1)
    route = jnp.full_like(rows, -1, shape=(capacity,))
    route = compat.pcast_varying(route, compat.varying_axes(rows))
    route = route.at[jnp.where(rows >= 0, rows, capacity)].set(
        jnp.arange(rows.size, dtype=jnp.int32), mode="drop"
    )
    return jnp.maximum(route, 0), route >= 0


def _pick(values: jax.Array, index: jax.Array, wanted: jax.Array) -> jax.Array:
    """values[index] where wanted, zeros elsewhere; also where there are no values at all."""
    if not values.shape[0]:
        return compat.zeros_like_varying((*index.shape, *values.shape[1:]), values.dtype, values, index)
    return jnp.where(wanted.reshape(wanted.shape + (1,) * (values.ndim - 1)), values[index], 0)
