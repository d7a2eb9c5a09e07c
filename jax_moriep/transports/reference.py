"""transport="reference": everything is gathered everywhere and routes are placed one after another.

It is the statement of what a transport does, in the plainest form: slow, and on every platform.
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
    place: Place,
    cfg: MoEConfig | None,
    shape: ExchangeShape | None,
    dtype: str,
    *,
    again: bool = False,
) -> Opened:
    """Nothing: jax opens its collectives itself."""
    del place, cfg, shape, dtype, again
    return Opened()


def dispatch(
    link: Link, x: jax.Array, ids: jax.Array, weights: jax.Array, words: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """See ``transports.Transport.dispatch``.

    Its own part of a plan are the routes i32[R, T, K]: the row on this rank of the route (source rank, token,
    k); -1: not this rank's; -2: dropped here for want of capacity.
    """
    shape = link.shape
    all_ids = lax.all_gather(ids, link.ep_axis)
    all_weights = lax.all_gather(weights, link.ep_axis).reshape(-1)
    first = lax.axis_index(link.ep_axis) * shape.num_local_experts
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
    own = placed.reshape(all_ids.shape).astype(jnp.int32)
    rows, order = replay(link, x, ids, own, order)
    row_weights = jnp.zeros(shape.capacity, jnp.float32)
    row_weights = row_weights.at[jnp.where(placed >= 0, placed, shape.capacity)].set(all_weights, mode="drop")
    group_sizes = kept_counts(counts, shape.block, shape.capacity).astype(jnp.int32)
    all_words = lax.all_gather(words, link.ep_axis, to="invarying")
    return rows, row_weights, group_sizes, all_words, own, order


def replay(
    link: Link, x: jax.Array, ids: jax.Array, own: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See ``transports.Transport.replay``."""
    del ids
    shape = link.shape
    all_x = lax.all_gather(x, link.ep_axis)
    rows = compat.zeros_like_varying((shape.capacity, x.shape[1]), x.dtype, x, own)
    for k in range(shape.top_k):
        routes = own[:, :, k]
        rows = rows.at[jnp.where(routes >= 0, routes, shape.capacity)].set(all_x, mode="drop")
    return rows, order


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
    if rows.dtype == jnp.float32:
        # Changes no bit, but XLA keeps it: without it a product in front would be fused into the sum, which
        # then rounds once less than the rows say.
        rows = lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=23)

    def pick(values: jax.Array, k: int) -> jax.Array:
        routes = own[:, :, k]
        here = (routes >= 0).reshape(routes.shape + (1,) * (values.ndim - 1))
        return jnp.where(here, values[jnp.maximum(routes, 0)].astype(jnp.float32), 0.0)

    here = compat.zeros_like_varying(
        (shape.num_ranks, shape.num_tokens, rows.shape[1]), jnp.float32, rows, own
    )
    for k in range(shape.top_k):
        here = here + pick(rows, k)
    # [source rank, T, H] on each rank -> all ranks' parts of this rank's tokens, in rank order.
    parts = lax.all_to_all(here, link.ep_axis, 0, 0)
    y = parts[0]
    for rank in range(1, shape.num_ranks):
        y = y + parts[rank]
    if row_scalars is None:
        return y.astype(rows.dtype), None, order
    scalars = jnp.stack([pick(row_scalars, k) for k in range(shape.top_k)], axis=-1)
    return y.astype(rows.dtype), lax.all_to_all(scalars, link.ep_axis, 0, 0).sum(0), order
