"""Both passes of experts that a scheme quantises, by Triton products; ``hopper/quantised`` is the fast case.

Forward, codes are multiplied. XLA quantises, on every platform: with few rows that is little, and with many
it is a pass over memory beside a product. On the way back the products read values, the weights dequantised
to the rows' dtype: those of float8 master weights and of quantised cotangents are exact there, because their
scales are powers of two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep import schemes
from jax_moriep.experts import rounding
from jax_moriep.experts.pallas import rowwise
from jax_moriep.experts.pallas.biases import BIAS_ROWS, row_sums, rows_times_bias
from jax_moriep.experts.pallas.launch import Tile, store
from jax_moriep.experts.pallas.quantise import codes_of
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.experts.pallas.triton import passes
from jax_moriep.experts.pallas.triton.passes import Tiles
from jax_moriep.experts.pallas.triton.products import (
    At,
    Epilogue,
    Product,
    Scales,
    rows_times_weights,
    weight_gradient,
)
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights, Operands
from jax_moriep.plan import run_starts


def forward(
    spec: ExpertSpec,
    tile_of: Tiles,
    saved_rows: int,
    interpret: bool,
    native: bool,
    operands: Operands,
) -> tuple[jax.Array, ...]:
    """See ``passes.forward``; without ``native`` the GPU does not convert the float8 of the codes."""
    rows, row_weights, group_sizes, weights = operands
    if not (weights.frozen and native):
        # What XLA makes of weights must not be made of all layers'.
        weights = weights.alone(group_sizes.size)
    coded = codes_of(weights, spec)
    operands = (rows, row_weights, group_sizes, coded)
    act, *saved = _gate_up(spec, tile_of("gate_up"), interpret, native, operands, saved_rows=saved_rows)
    h = schemes.quantise_activated(act, coded.w1.dtype)
    scales = Scales(h.codes.dtype, h.scales.T, coded.w2_scale)
    codes, w2 = _readable(native, h.codes, coded.w2)
    others = (rows, row_weights, group_sizes, coded._replace(w2=w2))
    return (passes.down(spec, tile_of("down"), interpret, codes, others, scales), *saved)


def backward(
    spec: ExpertSpec,
    tile_of: Tiles,
    saved_rows: int,
    interpret: bool,
    native: bool,
    d_out: jax.Array,
    saved: jax.Array,
    operands: Operands,
) -> tuple[jax.Array, ...]:
    """The cotangents of rows, row weights, w1 and w2 unless they are codes, and biases if there are any."""
    rows, row_weights, group_sizes, weights = operands
    weights = weights.alone(group_sizes.size)
    capacity, dtype = rows.shape[0], rows.dtype
    codes, back = spec.code_dtype(weights), spec.quantises_gradients(weights)
    w1, w2 = (w.astype(dtype) for w in rounding.weights(weights, spec))
    pre = (saved,)
    if saved_rows < capacity:
        coded = (rows, row_weights, group_sizes, codes_of(weights, spec))
        tile = tile_of("gate_up")
        pre += tuple(_gate_up(spec, tile, interpret, native, coded, recomputed_from=saved_rows))
    d_y = rounding.activated(d_out, codes).astype(dtype) if back else d_out
    d_act = _d_activations(tile_of("d_act"), spec, interpret, d_y, group_sizes, w2)
    slices = row_tiles(group_sizes, spec.block, capacity, rowwise.SLICE)
    act, d_pre, shares = rowwise.activation_gradient(
        d_act, pre, row_weights, slices, spec, saved_rows=saved_rows, read_as=codes, interpret=interpret
    )
    seen = rounding.halves(d_pre, codes).astype(dtype) if back else d_pre
    plain = (rows, row_weights, group_sizes, ExpertWeights(w1, w2))
    (d_rows,) = passes.d_rows(spec, tile_of("d_rows"), interpret, seen, plain)
    starts = run_starts(group_sizes, spec.block)
    d_weights = ()
    if not weights.frozen:
        gradient = functools.partial(
            weight_gradient, starts=starts, group_sizes=group_sizes, interpret=interpret
        )
        d_weights = (
            gradient(d_pre, rows, dtype=weights.w1.dtype, tile=tile_of("dw1"), name="moriep_dw1"),
            gradient(d_out, act, dtype=weights.w2.dtype, tile=tile_of("dw2"), name="moriep_dw2"),
        )
    d_row_weights = jnp.sum(shares, axis=0)
    if weights.b1 is not None:
        sums = functools.partial(row_sums, starts=starts, group_sizes=group_sizes, interpret=interpret)
        d_weights += (
            sums(d_pre, None, dtype=weights.b1.dtype),
            sums(d_out, row_weights, dtype=weights.b2.dtype),
        )
        few = row_tiles(group_sizes, spec.block, capacity, BIAS_ROWS)
        d_row_weights += rows_times_bias(d_out, weights.b2, few, interpret=interpret)
    d_row_weights = jnp.where(real_rows(group_sizes, spec.block, capacity), d_row_weights, 0)
    return d_rows, d_row_weights, *d_weights


def with_weighted_input(
    mlp: Callable[[ExpertSpec, Any], Any], spec: ExpertSpec, operands: tuple[Any, ...]
) -> jax.Array:
    """mlp(spec, operands) of rows that their weights multiply first: it is the product that is quantised."""
    rows, row_weights, group_sizes, weights = operands
    real = real_rows(group_sizes, spec.block, rows.shape[0])[:, None]
    weighted = jnp.where(real, rows, 0) * jnp.where(real, row_weights[:, None], 0)
    plain = dataclasses.replace(spec, weight_input=False)
    return mlp(plain, (weighted.astype(rows.dtype), jnp.ones_like(row_weights), group_sizes, weights))


def _gate_up(
    spec: ExpertSpec,
    tile: Tile,
    interpret: bool,
    native: bool,
    operands: Operands,
    **which: Any,
) -> list[jax.Array]:
    rows, row_weights, group_sizes, coded = operands
    assert spec.scheme is not None
    quantised = schemes.quantise_rows(rows, spec.scheme, coded.w1.dtype)
    scales = Scales(quantised.codes.dtype, quantised.scales.T, coded.w1_scale)
    codes, w1 = _readable(native, quantised.codes, coded.w1)
    others = (codes, row_weights, group_sizes, coded._replace(w1=w1))
    return passes.gate_up(spec, tile, interpret, others, scales=scales, dtype=rows.dtype, **which)


def _d_activations(
    tile: Tile, spec: ExpertSpec, interpret: bool, d_y: jax.Array, group_sizes: jax.Array, w2: jax.Array
) -> jax.Array:
    """The cotangent [C, I] of the activations, undefined in padding."""
    capacity = d_y.shape[0]

    def epilogue(at: At, sums: tuple[jax.Array], out_ref: Any) -> None:
        store(out_ref, at.real, at.cols, sums[0])

    return rows_times_weights(
        Product(d_y, w2, by_column=True),
        row_tiles(group_sizes, spec.block, capacity, tile.rows, group=tile.group),
        tile,
        Epilogue(epilogue, (), [((capacity, w2.shape[2]), d_y.dtype)]),
        name="moriep_d_act",
        interpret=interpret,
    )[0]


def _readable(native: bool, *codes: jax.Array) -> tuple[jax.Array, ...]:
    """Codes as a kernel gets them: float8 that the GPU does not convert as bits."""
    if native or codes[0].dtype == jnp.int8:
        return codes
    return tuple(lax.bitcast_convert_type(x, jnp.uint8) for x in codes)
