"""Passes that quantise what the products read: bound by memory, one read of each value."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_moriep.experts.triton import tiles as rows_of
from jax_moriep.experts.triton.launch import Span, Tile, by_turns, call, load, store, store_vector
from jax_moriep.experts.triton.rowwise import SLICE
from jax_moriep.experts.triton.tiles import RowTiles

GROUP = 128
# Bits of f32: 2^-100, below which a group is zeros, infinity, and a NaN.
_SMALLEST, _INFINITY, _NAN = 27 << 23, 0x7F800000, 0x7FC00000
_PROGRAMS = 16896
_ROWS_TILE = Tile(SLICE, GROUP, SLICE, warps=8, stages=1)
_BLOCK_TILE = Tile(GROUP, GROUP, GROUP, warps=8, stages=1)


def rows(x: jax.Array, tiles: RowTiles, format: Any, *, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Rows in groups of 128 columns.

    Args:
      x: [C, D]; 128 divides D.
      tiles: tiles of ``SLICE`` rows; rows in none give anything.
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
            own = Span(table_ref[rows_of.FIRST, row_tile], SLICE, table_ref[rows_of.END, row_tile])
            cols = Span(group * GROUP, GROUP)
            values = load(x_ref, own, cols).astype(jnp.float32)
            scale, inverse = power_scales(jnp.max(magnitudes(values), axis=1), format)
            store(codes_ref, own, cols, scaled(values, inverse[:, None]))
            store_vector(scales_ref, own, scale, group)

        by_turns(programs, table_ref[rows_of.NUM_TILES, last] * groups, one)

    programs = min(_PROGRAMS, last * groups)
    results = [(x.shape, format), ((groups, capacity), jnp.float32)]
    codes, scales = call(
        kernel, "moriep_quantise_rows", (tiles.table, x), results, programs, _ROWS_TILE, interpret
    )
    return codes, scales


def weights(
    w: jax.Array, format: Any, *, transposed: bool, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Weights in blocks of 128x128.

    Args:
      w: [L, N, D]; 128 divides N and D.
      format: the float8.
      transposed: give the transposed codes as well.
      interpret: see ``launch.call``.

    Returns:
      Codes [L, N, D], scales f32[L, N/128, D/128], and codes [L, D, N] or None.
    """
    experts, height, width = w.shape
    high, wide = height // GROUP, width // GROUP

    def kernel(w_ref: Any, codes_ref: Any, scales_ref: Any, *turned_ref: Any) -> None:
        turn = pl.program_id(0)
        expert, inside = lax.div(turn, high * wide), lax.rem(turn, high * wide)
        at = Span(lax.div(inside, wide) * GROUP, GROUP), Span(lax.rem(inside, wide) * GROUP, GROUP)
        values = load(w_ref, *at, expert).astype(jnp.float32)
        scale, inverse = power_scales(jnp.max(jnp.max(magnitudes(values), axis=1), axis=0), format)
        values = scaled(values, inverse)
        store(codes_ref, *at, values, expert)
        for ref in turned_ref:
            store(ref, *reversed(at), values.astype(format).T, expert)
        scales_ref[expert, lax.div(inside, wide), lax.rem(inside, wide)] = scale

    results = [(w.shape, format), ((experts, high, wide), jnp.float32)]
    if transposed:
        results.append(((experts, width, height), format))
    programs = experts * high * wide
    codes, scales, *turned = call(
        kernel, "moriep_quantise_weights", (w,), results, programs, _BLOCK_TILE, interpret
    )
    return codes, scales, turned[0] if turned else None


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
