"""Passes that quantise what the products read: bound by memory, one read of each value."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_moriep import schemes
from jax_moriep.experts.pallas.launch import (
    PASS_PROGRAMS,
    Span,
    Tile,
    by_turns,
    call,
    load,
    store,
    store_vector,
)
from jax_moriep.experts.pallas.tiles import RowTiles
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights

GROUP = schemes.BLOCK
"""Columns that share a scale of rows, and both sides of a block of weights that do."""
SLICE = 32
"""Rows that a program takes at a time in a pass over rows: those of ``rowwise``."""
# Bits of f32: 2^-100, below which a group is zeros, infinity, and a NaN.
_SMALLEST, _INFINITY, _NAN = 27 << 23, 0x7F800000, 0x7FC00000
# Of 8 warps each thread holds 16 values of rows, or 64 of a block. Not tuned.
_ROWS_TILE = Tile(SLICE, GROUP, SLICE, warps=8, stages=1)
_BLOCK_TILE = Tile(GROUP, GROUP, GROUP, warps=8, stages=1)


def codes_of(weights: ExpertWeights, spec: ExpertSpec) -> ExpertWeights:
    """The weights as codes: as they are, or those of master weights."""
    if weights.frozen:
        return weights
    assert spec.scheme is not None
    dtype = spec.code_dtype(weights)
    first = schemes.quantise_weights(weights.w1, spec.scheme, dtype, parts=2)
    second = schemes.quantise_weights(weights.w2, spec.scheme, dtype, parts=1)
    return weights._replace(w1=first.codes, w2=second.codes, w1_scale=first.scales, w2_scale=second.scales)


def rows(x: jax.Array, tiles: RowTiles, format: Any, *, interpret: bool) -> schemes.Quantised:
    """Rows in groups of 128 columns.

    Args:
      x: [C, D]; 128 divides D.
      tiles: small tiles of rows; rows in none give anything.
      format: the float8.
      interpret: see ``launch.call``.

    Returns:
      Codes [C, D] and scales f32[D/128, C].
    """
    capacity, width = x.shape
    groups, last = width // GROUP, tiles.max_tiles

    def kernel(table_ref: Any, x_ref: Any, codes_ref: Any, scales_ref: Any) -> None:
        def one(turn: Any) -> None:
            row_tile, group = lax.div(turn, groups), lax.rem(turn, groups)
            tile = tiles.of_tile(table_ref, row_tile)
            own = Span(tile.first, tiles.size, tile.end)
            cols = Span(group * GROUP, GROUP)
            values = load(x_ref, own, cols).astype(jnp.float32)
            store_rows(codes_ref, scales_ref, own, cols, values, group)

        by_turns(programs, tiles.of_call(table_ref).num_tiles * groups, one)

    programs = min(PASS_PROGRAMS, last * groups)
    results = [(x.shape, format), ((groups, capacity), jnp.float32)]
    codes, scales = call(
        kernel, "moriep_quantise_rows", (tiles.table, x), results, programs, _ROWS_TILE, interpret
    )
    return schemes.Quantised(codes, scales)


def weights(w: jax.Array, format: Any, *, transposed: bool, interpret: bool) -> list[jax.Array]:
    """Weights in blocks of 128x128.

    Args:
      w: [L, N, D]; 128 divides N and D.
      format: the float8.
      transposed: give the transposed codes as well.
      interpret: see ``launch.call``.

    Returns:
      Codes [L, N, D], scales f32[L, N/128, D/128], and with ``transposed`` codes [L, D, N].
    """
    experts, height, width = w.shape
    high, wide = height // GROUP, width // GROUP

    def kernel(w_ref: Any, codes_ref: Any, scales_ref: Any, *transposed_ref: Any) -> None:
        turn = pl.program_id(0)
        expert, inside = lax.div(turn, high * wide), lax.rem(turn, high * wide)
        high_at, wide_at = lax.div(inside, wide), lax.rem(inside, wide)
        tall, across = Span(high_at * GROUP, GROUP), Span(wide_at * GROUP, GROUP)
        values = load(w_ref, tall, across, expert).astype(jnp.float32)
        scale, inverse = power_scales(jnp.max(jnp.max(magnitudes(values), axis=1), axis=0), format)
        codes = scaled(values, inverse).astype(format)
        store(codes_ref, tall, across, codes, expert)
        for ref in transposed_ref:
            store(ref, across, tall, codes.T, expert)
        scales_ref[expert, high_at, wide_at] = scale

    results = [(w.shape, format), ((experts, high, wide), jnp.float32)]
    if transposed:
        results.append(((experts, width, height), format))
    programs = experts * high * wide
    return call(kernel, "moriep_quantise_weights", (w,), results, programs, _BLOCK_TILE, interpret)


def store_rows(
    codes_ref: Any, scales_ref: Any, rows: Span, cols: Span, values: jax.Array, group: Any
) -> None:
    """Writes f32 values, all of a group of columns, as codes and scales."""
    scale, inverse = power_scales(jnp.max(magnitudes(values), axis=1), codes_ref.dtype)
    store(codes_ref, rows, cols, scaled(values, inverse[:, None]))
    store_vector(scales_ref, rows, scale, group)


def magnitudes(values: jax.Array) -> jax.Array:
    """The bits of f32 magnitudes: as integers, infinities and NaNs are larger than all numbers."""
    return lax.bitcast_convert_type(values, jnp.int32) & 0x7FFFFFFF


def power_scales(bits: jax.Array, format: Any) -> tuple[jax.Array, jax.Array]:
    """The scale of a group and its reciprocal, by its largest of ``magnitudes``; see ``quant._scales``.

    The reciprocal is 0 where codes are zeros.
    """
    fraction, exponent = math.frexp(float(jnp.finfo(format).max))
    mantissa = int((2 * fraction - 1) * 2**23)
    # A mantissa beyond that of the format's largest number carries into the exponent.
    power = ((bits + (0x7FFFFF - mantissa)) >> 23) - (exponent - 1)
    zero, nan = jnp.zeros_like(bits), jnp.full_like(bits, _NAN)
    used = (bits >= _SMALLEST) & (bits < _INFINITY)
    scale = jnp.where(used, power << 23, jnp.where(bits < _SMALLEST, zero, nan))
    inverse = jnp.where(used, (254 - power) << 23, zero)
    scale, inverse = (lax.bitcast_convert_type(x, jnp.float32) for x in (scale, inverse))
    return scale, inverse


def scaled(values: jax.Array, inverse: jax.Array) -> jax.Array:
    """values * inverse, zeros where the reciprocal is: there a value may be no number."""
    return jnp.where(inverse != 0, values * inverse, 0.0)


def coded_groups(values: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """What codes leave of groups: codes as f32 and f32 scales [..., 1], of f32 values [..., G].

    Rounding is spelled out, because Pallas-Triton converts to few float8 formats and rounds nothing itself.
    """
    largest = jnp.max(magnitudes(values), axis=-1, keepdims=True)
    if jnp.dtype(dtype) == jnp.int8:
        used = (largest >= _SMALLEST) & (largest < _INFINITY)
        amax = lax.bitcast_convert_type(largest, jnp.float32)
        scale = jnp.where(used, amax / 127.0, jnp.where(largest < _SMALLEST, 0.0, math.nan))
        codes = jnp.where(used, values / jnp.where(used, scale, 1.0), 0.0)
        return _to_multiple(codes, 1.0), scale
    scale, inverse = power_scales(largest, dtype)
    return rounded(scaled(values, inverse), dtype), scale


def rounded(values: jax.Array, format: Any) -> jax.Array:
    """See ``quant.rounded``, with integer arithmetic."""
    info = jnp.finfo(format)
    dropped = 23 - info.nmant
    bits = lax.bitcast_convert_type(values, jnp.int32)
    even = (bits >> dropped) & 1
    bits = (bits + ((1 << (dropped - 1)) - 1) + even) & ~((1 << dropped) - 1)
    normal = lax.bitcast_convert_type(bits, jnp.float32)
    near_zero = _to_multiple(values, float(info.smallest_subnormal))
    return jnp.where(jnp.abs(values) < float(info.smallest_normal), near_zero, normal)


def _to_multiple(values: jax.Array, step: float) -> jax.Array:
    """The nearest multiples of a power of two, of two the even one; of magnitudes below 2^31 of them."""
    values = values * (1 / step)
    below = jnp.floor(values)
    part = values - below
    up = (part > 0.5) | ((part == 0.5) & (below.astype(jnp.int32) % 2 != 0))
    return jnp.where(up, below + 1, below) * step
