"""Both passes of experts that a float8 scheme quantises, by Hopper products; see ``triton.quantised``.

The matrix unit contracts 8-bit operands along their last dimension only, so on the way back the products read
transposed codes. Master weights whose blocks are the same when transposed are therefore quantised once: a
forward pass under differentiation writes both, and keeps the transposed codes for the backward pass. They
take one byte per weight until then.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moriep import schemes
from jax_moriep.experts import rounding
from jax_moriep.experts.pallas import quantise, rowwise
from jax_moriep.experts.pallas.hopper import few, fp8, products
from jax_moriep.experts.pallas.hopper.support import FEW_ROWS, FORMAT, ROWS
from jax_moriep.experts.pallas.hopper.weight_gradient import weight_gradient
from jax_moriep.experts.pallas.tiles import RowTiles, real_rows, row_tiles
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights, Operands
from jax_moriep.plan import run_starts
from jax_moriep.schemes import Quantised


def kept(
    spec: ExpertSpec, weights: ExpertWeights, num_experts: int
) -> tuple[tuple[tuple[int, ...], jnp.dtype], ...]:
    """Shapes and dtypes of what a backward pass gets from the forward pass besides the pre-activations.

    The codes [L, H, 2*I] and f32[L, H/128, 2*I/128], their scales, of transposed w1, and those of w2.
    """
    if not spec.quantises_gradients(weights):
        return ()
    described = []
    for w in (weights.w1, weights.w2):
        _, height, width = w.shape
        described += [
            ((num_experts, width, height), FORMAT),
            ((num_experts, width // schemes.BLOCK, height // schemes.BLOCK), jnp.dtype(jnp.float32)),
        ]
    return tuple(described)


def forward(
    spec: ExpertSpec,
    saved_rows: int,
    interpret: bool,
    operands: Operands,
) -> tuple[jax.Array, ...]:
    """See ``triton.passes.forward``; ``saved_rows`` is a multiple of ``ROWS``.

    Behind the pre-activations, if there are any, comes what ``kept`` describes.
    """
    rows, row_weights, group_sizes, weights = operands
    if not weights.frozen:
        # What is made of weights must not be made of all layers'.
        weights = weights.alone(group_sizes.size)
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], ROWS, first_expert=weights.first)
    # Zero in padding, whose activations and results are then zeros too.
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    coded, *transposed = _codes_of(weights, spec, interpret, keep=saved_rows > 0)
    first, second = _quantised(coded)
    codes = quantised_rows(rows, spec, group_sizes, interpret)
    act, act_scales, *saved = fp8.gate_up(
        codes, first, factors, tiles, spec, saved_rows=saved_rows, dtype=rows.dtype
    )
    out = fp8.product(Quantised(act, act_scales), second, tiles, rows.dtype)
    return (rowwise.zeroed_behind(out, tiles, interpret=interpret), *saved, *transposed)


def few_rows(spec: ExpertSpec, interpret: bool, operands: Operands) -> tuple[jax.Array]:
    """See ``triton.passes.forward``, for short runs; nothing is kept for a backward pass."""
    rows, row_weights, group_sizes, weights = operands
    first, second = _quantised(weights)
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], FEW_ROWS, first_expert=weights.first)
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    codes = _quantised_rows(rows, spec, tiles, interpret)
    act = few.gate_up(codes, first, factors, tiles, spec)
    out = few.product(act, second, tiles, rows.dtype)
    return (rowwise.zeroed_behind(out, tiles, interpret=interpret),)


def backward(
    spec: ExpertSpec,
    saved_rows: int,
    interpret: bool,
    d_out: jax.Array,
    saved: jax.Array,
    operands: Operands,
    *transposed: jax.Array,
) -> tuple[jax.Array, ...]:
    """See ``triton.quantised.backward``; ``transposed`` is what ``kept`` describes."""
    rows, row_weights, group_sizes, weights = operands
    weights = weights.alone(group_sizes.size)
    operands = (rows, row_weights, group_sizes, weights)
    capacity, dtype = rows.shape[0], rows.dtype
    tiles = row_tiles(group_sizes, spec.block, capacity, ROWS)
    slices = row_tiles(group_sizes, spec.block, capacity, rowwise.SLICE)
    pre = (saved,)
    if saved_rows < capacity:
        pre += (_pre_activations(spec, saved_rows, interpret, operands),)

    def through_activation(d_act: jax.Array, gradient_codes: jnp.dtype | None) -> tuple[jax.Array, ...]:
        return rowwise.activation_gradient(
            d_act,
            pre,
            row_weights,
            slices,
            spec,
            saved_rows=saved_rows,
            read_as=FORMAT,
            gradient_codes=gradient_codes,
            interpret=interpret,
        )

    if spec.quantises_gradients(weights):
        d_y = quantise.rows(d_out, slices, FORMAT, interpret=interpret)
        w1, s1, w2, s2 = transposed
        d_act = fp8.product(d_y, Quantised(w2, s2), tiles, dtype)
        act, d_pre, shares, *codes = through_activation(d_act, FORMAT)
        d_rows = fp8.product(Quantised(*codes), Quantised(w1, s1), tiles, dtype)
    else:
        w1, w2 = (w.astype(dtype) for w in rounding.weights(weights, spec))
        d_act = products.product(d_out, w2, tiles, by_column=True)
        act, d_pre, shares = through_activation(d_act, None)
        d_rows = products.product(d_pre, w1, tiles, by_column=True)
    d_rows = rowwise.zeroed_behind(d_rows, tiles, interpret=interpret)
    d_row_weights = jnp.where(real_rows(group_sizes, spec.block, capacity), jnp.sum(shares, axis=0), 0)
    if weights.frozen:
        return d_rows, d_row_weights
    starts = run_starts(group_sizes, spec.block)
    of_runs = (starts, group_sizes, spec.block)
    dw1 = weight_gradient(d_pre, rows, *of_runs, weights.w1.dtype, unclean="right")
    dw2 = weight_gradient(d_out, act, *of_runs, weights.w2.dtype, unclean="left")
    return d_rows, d_row_weights, dw1, dw2


def _pre_activations(spec: ExpertSpec, first_row: int, interpret: bool, operands: Operands) -> jax.Array:
    """Those of the rows from one on, [C, 2*I]."""
    rows, row_weights, group_sizes, weights = operands
    capacity = rows.shape[0]
    behind = row_tiles(group_sizes, spec.block, capacity, ROWS, first_row)
    coded, *_ = _codes_of(weights, spec, interpret, keep=False)
    first, _ = _quantised(coded)
    codes = quantised_rows(rows, spec, group_sizes, interpret)
    return fp8.gate_up(codes, first, row_weights, behind, spec, saved_rows=capacity, dtype=rows.dtype)[-1]


def quantised_rows(rows: jax.Array, spec: ExpertSpec, group_sizes: jax.Array, interpret: bool) -> Quantised:
    """Codes [C, H] and scales f32[H/128, C] or f32[1, C]."""
    slices = row_tiles(group_sizes, spec.block, rows.shape[0], rowwise.SLICE)
    return _quantised_rows(rows, spec, slices, interpret)


def _quantised_rows(rows: jax.Array, spec: ExpertSpec, tiles: RowTiles, interpret: bool) -> Quantised:
    """As ``quantised_rows``, by the tiles of another kernel."""
    if spec.scheme == "fp8_block":
        return quantise.rows(rows, tiles, FORMAT, interpret=interpret)
    assert spec.scheme is not None
    codes, scales = schemes.quantise_rows(rows, spec.scheme, FORMAT)
    return Quantised(codes, scales.T)


def _quantised(coded: ExpertWeights) -> tuple[Quantised, Quantised]:
    """w1 and w2 that are codes."""
    assert coded.w1_scale is not None
    assert coded.w2_scale is not None
    return Quantised(coded.w1, coded.w1_scale), Quantised(coded.w2, coded.w2_scale)


def _codes_of(
    weights: ExpertWeights, spec: ExpertSpec, interpret: bool, *, keep: bool
) -> tuple[ExpertWeights, *tuple[jax.Array, ...]]:
    """As ``quantise.codes_of``, blocks by a kernel; and what ``kept`` describes, if it shall be kept."""
    if weights.frozen or spec.scheme != "fp8_block":
        return (quantise.codes_of(weights, spec),)
    w1, s1, *t1 = quantise.weights(weights.w1, FORMAT, transposed=keep, interpret=interpret)
    w2, s2, *t2 = quantise.weights(weights.w2, FORMAT, transposed=keep, interpret=interpret)
    coded = weights._replace(w1=w1, w2=w2, w1_scale=s1, w2_scale=s2)
    if not keep:
        return (coded,)
    return coded, *t1, jnp.swapaxes(s1, 1, 2), *t2, jnp.swapaxes(s2, 1, 2)
