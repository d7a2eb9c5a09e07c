"""What a token-major transport brings to a rank, and the way from there to rows and back.

All of it is local to one rank, inside shard_map or not, and each function has two implementations: custom
calls for GPUs, and pure JAX for every other platform. The order in which tokens have come decides nothing:
rows lie by local expert, then source rank, then source token, as ``transports.Transport`` promises.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime import compat, targets
from jax_moriep.transports import rows as rows_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrivals:
    """Tokens as a token-major transport delivers them, in any order: one for each token that has an expert
    on this rank. N = R·T, and what lies at places from ``count`` on is undefined: NaN, or anything."""

    tokens: Any
    """[N, H]."""
    ids: Any
    """i32[N, K], all expert ids of each token as its source gave them, other ranks' too; -1 for no route."""
    weights: Any
    """f32[N, K]."""
    sources: Any
    """i32[N], source rank * T + source token."""
    count: Any
    """i32[1], how many tokens have come; negative where the exchange has failed, whose rows are then NaN."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a rank's experts see, and where each row is from."""

    rows: Any
    """[C, H]; padding rows are zero."""
    row_weights: Any
    """f32[C]; 0 on padding."""
    group_sizes: Any
    """i32[L]."""
    routes: Any
    """i32[R, T, K]: row of the route (source rank, source token, k); -1: not here; -2: dropped."""


def expand(arrivals: Arrivals, rank: jax.Array, shape: ExchangeShape, platform: str | None) -> Rows:
    """Puts arrivals into the order of rows.

    Args:
      arrivals: what has come.
      rank: i32[], this rank.
      shape: the sizes.
      platform: of the device; None where a program is only lowered, with custom calls.
    """
    if not _has_kernels(platform):
        came = _came(arrivals.sources, arrivals.count)
        num_tokens = shape.num_ranks * shape.num_tokens
        place = rows_of.inverse(jnp.where(came, arrivals.sources, num_tokens), num_tokens)
        ids = jnp.where(
            (place >= 0)[:, None], rows_of.pick(arrivals.ids, jnp.maximum(place, 0), place >= 0), -1
        )
        routes, group_sizes = rows_of.place_routes(ids.reshape(_routes_shape(shape)), rank, shape)
        route, filled = rows_of.route_of_row(routes, shape.capacity)
        place = rows_of.pick(place, route // shape.top_k, filled)
        weights = rows_of.pick(
            arrivals.weights.reshape(-1), place * shape.top_k + route % shape.top_k, filled
        )
        rows = rows_of.pick(arrivals.tokens, place, filled)
        lost = arrivals.count[0] < 0
        return Rows(_poison(rows, lost), _poison(weights, lost), group_sizes, routes)
    x = arrivals.tokens
    results = (
        compat.result_type(x, (shape.capacity, x.shape[1]), x.dtype),
        compat.result_type(x, (shape.capacity,), jnp.float32),
        compat.result_type(x, (shape.num_local_experts,), jnp.int32),
        compat.result_type(x, _routes_shape(shape), jnp.int32),
        compat.result_type(x, (expand_words(shape),), jnp.int32),
    )
    rank = compat.pcast_varying(rank.astype(jnp.int32).reshape(1), compat.varying_axes(x))
    rows, row_weights, group_sizes, routes, _ = targets.call(
        targets.EXPAND,
        results,
        *(x, arrivals.ids, arrivals.weights, arrivals.sources, arrivals.count, rank),
        attributes=_attributes(shape),
    )
    return Rows(rows, row_weights, group_sizes, routes)


def reexpand(
    tokens: jax.Array,
    sources: jax.Array,
    count: jax.Array,
    routes: jax.Array,
    shape: ExchangeShape,
    platform: str | None,
) -> jax.Array:
    """Puts other tokens, which came as those of a known ``expand`` did, into the order of its rows.

    Args:
      tokens: [N, H].
      sources: i32[N], of the arrivals that were expanded.
      count: i32[1], of them too.
      routes: i32[R, T, K], of their rows.
      shape: the sizes.
      platform: of the device.

    Returns:
      [C, H].
    """
    if not _has_kernels(platform):
        num_tokens = shape.num_ranks * shape.num_tokens
        place = rows_of.inverse(jnp.where(_came(sources, count), sources, num_tokens), num_tokens)
        route, filled = rows_of.route_of_row(routes, shape.capacity)
        place = rows_of.pick(place, route // shape.top_k, filled)
        rows = rows_of.pick(tokens, jnp.maximum(place, 0), filled & (place >= 0))
        return _poison(rows, count[0] < 0)
    results = (
        compat.result_type(tokens, (shape.capacity, tokens.shape[1]), tokens.dtype),
        compat.result_type(tokens, (_reexpand_words(shape),), jnp.int32),
    )
    rows, _ = targets.call(
        targets.REEXPAND, results, *(tokens, sources, count, routes), attributes=_attributes(shape)
    )
    return rows


def gather(
    rows: jax.Array,
    sources: jax.Array,
    count: jax.Array,
    routes: jax.Array,
    shape: ExchangeShape,
    platform: str | None,
    row_scalars: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Adds each arrived token's rows, in f32 and in the order of k; the transpose of ``reexpand``.

    Args:
      rows: [C, H].
      sources: i32[N], of the arrivals that were expanded.
      count: i32[1], of them too.
      routes: i32[R, T, K], of their rows.
      shape: the sizes.
      platform: of the device.
      row_scalars: f32[C] or None, one number for each row.

    Returns:
      tokens: [N, H] in the rows' dtype, in the order of arrival; undefined from the count on.
      scalars: f32[N, K], each route's number, 0 where it has no row; None without row_scalars.
    """
    num_arrivals = shape.num_ranks * shape.num_tokens
    if not _has_kernels(platform):
        came = _came(sources, count)
        found = rows_of.pick(routes.reshape(num_arrivals, shape.top_k), jnp.where(came, sources, 0), came)
        filled = came[:, None] & (found >= 0)
        row = jnp.where(filled, found, 0)
        # Changes no bit, but XLA keeps it: without it a product in front would be fused into the sum, which
        # then rounds once less than the rows say.
        kept = jnp.finfo(rows.dtype)
        rows = lax.reduce_precision(rows, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)
        tokens = compat.zeros_like_varying((num_arrivals, rows.shape[1]), jnp.float32, rows, row)
        for k in range(shape.top_k):
            tokens = tokens + rows_of.pick(rows, row[:, k], filled[:, k]).astype(jnp.float32)
        scalars = None if row_scalars is None else rows_of.pick(row_scalars, row, filled)
        return tokens.astype(rows.dtype), scalars
    # An empty operand stands for "no scalars", so that one target serves the forward and the backward pass.
    carried = row_scalars is not None
    scalars = row_scalars if carried else compat.zeros_like_varying((0,), jnp.float32, rows)
    results = (
        compat.result_type(rows, (num_arrivals, rows.shape[1]), rows.dtype),
        compat.result_type(rows, (num_arrivals if carried else 0, shape.top_k), jnp.float32),
    )
    tokens, token_scalars = targets.call(
        targets.GATHER, results, *(rows, scalars, sources, count, routes), attributes=_attributes(shape)
    )
    return tokens, token_scalars if carried else None


def _has_kernels(platform: str | None) -> bool:
    return platform in (None, "gpu")


def _came(sources: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.arange(sources.size, dtype=jnp.int32) < count[0]


def _poison(values: jax.Array, lost: jax.Array) -> jax.Array:
    """NaN, or bytes of ones, in place of what a failed exchange has not brought: zeros would look like it."""
    floating = jnp.issubdtype(values.dtype, jnp.floating)
    return jnp.where(lost, jnp.nan if floating else jnp.iinfo(values.dtype).max, values)


def _routes_shape(shape: ExchangeShape) -> tuple[int, int, int]:
    return (shape.num_ranks, shape.num_tokens, shape.top_k)


def _attributes(shape: ExchangeShape) -> tuple[tuple[str, int | str], ...]:
    return (
        ("num_experts", shape.num_experts),
        ("num_local_experts", shape.num_local_experts),
        ("block", shape.block),
    )


def _reexpand_words(shape: ExchangeShape) -> int:
    """i32s of workspace: a bit for each row. csrc/gpu/expand.cc states the same rules."""
    return -(-shape.capacity // 32)


def expand_words(shape: ExchangeShape) -> int:
    """The same and, for a sort in chunks of at least 256 routes, their counts, and a place for each token."""
    chunks = max(1, -(-shape.num_tokens // max(1, 256 // shape.top_k)))
    return _reexpand_words(shape) + shape.num_ranks * (chunks * shape.num_local_experts + shape.num_tokens)
