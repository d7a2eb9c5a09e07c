"""transport="reference": everything is gathered everywhere and routes are placed one after another.

It is the statement of what a transport does, in the plainest form: slow, and on every platform.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.plan import DROPPED, NOT_HERE, Link, Plan, kept_counts, run_starts
from jax_moriep.runtime import compat


def unavailable_reason(platform: str) -> str | None:
    """None: it runs on every platform."""
    del platform
    return None


def dispatch(
    link: Link, x: jax.Array, ids: jax.Array, weights: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Plan, jax.Array]:
    """See ``transports.Transport.dispatch``."""
    shape = link.shape
    all_ids = lax.all_gather(ids, link.axis_name)
    all_weights = lax.all_gather(weights, link.axis_name).reshape(-1)
    first = lax.axis_index(link.axis_name) * shape.num_local_experts
    local = all_ids.reshape(-1) - first
    valid = (all_ids.reshape(-1) >= 0) & (all_ids.reshape(-1) < shape.num_experts)
    here = valid & (local >= 0) & (local < shape.num_local_experts)
    local = jnp.where(here, local, shape.num_local_experts)
    counts = jnp.bincount(local, length=shape.num_local_experts + 1)[:-1].astype(jnp.int32)
    starts, local = compat.union_varying(jnp.append(run_starts(counts, shape.block), 0), local)

    def place(next_rows: jax.Array, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
        return next_rows.at[expert].add(1), next_rows[expert]

    _, placed = lax.scan(place, starts, local)
    placed = jnp.where(here, jnp.where(placed < shape.capacity, placed, DROPPED), NOT_HERE)
    routes = placed.reshape(all_ids.shape).astype(jnp.int32)
    plan = Plan(routes=routes, ids=ids, slots=None, link=link)
    rows, order = replay(link, x, plan, order)
    row_weights = jnp.zeros(shape.capacity, jnp.float32)
    row_weights = row_weights.at[jnp.where(placed >= 0, placed, shape.capacity)].set(all_weights, mode="drop")
    return rows, row_weights, kept_counts(counts, shape.block, shape.capacity).astype(jnp.int32), plan, order


def replay(link: Link, x: jax.Array, plan: Plan, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See ``transports.Transport.replay``."""
    shape = link.shape
    all_x = lax.all_gather(x, link.axis_name)
    rows = compat.zeros_like_varying((shape.capacity, x.shape[1]), x.dtype, x, plan.routes)
    for k in range(shape.top_k):
        routes = plan.routes[:, :, k]
        rows = rows.at[jnp.where(routes >= 0, routes, shape.capacity)].set(all_x, mode="drop")
    return rows, order


def combine(
    link: Link, rows: jax.Array, plan: Plan, order: jax.Array, row_scalars: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """See ``transports.Transport.combine``."""
    shape = link.shape
    if rows.dtype == jnp.float32:
        # Changes no bit, but XLA keeps it: without it a product in front would be fused into the sum, which
        # then rounds once less than the rows say.
        rows = lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=23)

    def pick(values: jax.Array, k: int) -> jax.Array:
        routes = plan.routes[:, :, k]
        here = (routes >= 0).reshape(routes.shape + (1,) * (values.ndim - 1))
        return jnp.where(here, values[jnp.maximum(routes, 0)].astype(jnp.float32), 0.0)

    here = compat.zeros_like_varying(
        (shape.num_ranks, shape.num_tokens, rows.shape[1]), jnp.float32, rows, plan.routes
    )
    for k in range(shape.top_k):
        here = here + pick(rows, k)
    # [source rank, T, H] on each rank -> all ranks' parts of this rank's tokens, in rank order.
    parts = lax.all_to_all(here, link.axis_name, 0, 0)
    y = parts[0]
    for rank in range(1, shape.num_ranks):
        y = y + parts[rank]
    if row_scalars is None:
        return y.astype(rows.dtype), None, order
    scalars = jnp.stack([pick(row_scalars, k) for k in range(shape.top_k)], axis=-1)
    return y.astype(rows.dtype), lax.all_to_all(scalars, link.axis_name, 0, 0).sum(0), order
