"""transport="collective": jax.lax collectives only, so it runs on any platform and any number of hosts.

Tokens are all-gathered, which at the worst-case capacity moves as few bytes as an all-to-all; each rank then
picks its rows. Combine sums each rank's rows per token and returns one row per (token, rank) by all_to_all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.config import MoEConfig
from jax_moriep.plan import ExchangeShape, Link, Opened
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place
from jax_moriep.transports import rows as rows_of


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
    all_weights = lax.all_gather(weights, link.ep_axis)
    own, group_sizes = rows_of.place_routes(all_ids, lax.axis_index(link.ep_axis), shape)
    rows, order = replay(link, x, ids, own, order)
    row_weights = rows_of.pick(all_weights.reshape(-1), *rows_of.route_of_row(own, shape.capacity))
    all_words = lax.all_gather(words, link.ep_axis, to="invarying")
    return rows, row_weights, group_sizes, all_words, own, order


def replay(
    link: Link, x: jax.Array, ids: jax.Array, own: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See ``transports.Transport.replay``."""
    del ids
    all_x = lax.all_gather(x, link.ep_axis).reshape(-1, x.shape[1])
    route, filled = rows_of.route_of_row(own, link.shape.capacity)
    return rows_of.pick(all_x, route // link.shape.top_k, filled), order


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
        sums = sums + rows_of.pick(rows, row[:, :, k], filled[:, :, k]).astype(jnp.float32)
    parts = lax.all_to_all(sums.astype(rows.dtype), link.ep_axis, 0, 0)
    y = parts.astype(jnp.float32).sum(0).astype(rows.dtype)
    if row_scalars is None:
        return y, None, order
    scalars = rows_of.pick(row_scalars, row, filled)
    return y, lax.all_to_all(scalars, link.ep_axis, 0, 0).sum(0), order
