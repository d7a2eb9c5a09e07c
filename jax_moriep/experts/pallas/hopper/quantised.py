"""Both passes of experts that a float8 scheme quantises, by Hopper products; see ``quantised_passes``.

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
from jax_moriep.experts.pallas.tiles import RowTiles, real_rows, row_tiles
from jax_moriep.experts.pallas.triton.quantised import codes_of
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights
from jax_moriep.plan import run_starts

_FORMAT = jnp.dtype(jnp.float8_e4m3fn)


def covers(spec: ExpertSpec, rows: jax.Array, weights: ExpertWeights) -> bool:
    """Whether the kernels here can run a call: float8 codes, 16-bit rows, no biases, output weights, even
    sizes."""
    return (
        _even(spec, rows, weights) and spec.block % products.ROWS == 0 and rows.shape[0] % products.ROWS == 0
    )


def covers_few(spec: ExpertSpec, rows: jax.Array, weights: ExpertWeights) -> bool:
    """Whether ``few_rows`` can run a call: as ``covers`` says, but for short runs, and frozen weights."""
    return (
        _even(spec, rows, weights)
        and weights.frozen
        and spec.block % 8 == 0
        and few.ROWS % spec.block == 0
        and rows.shape[0] % spec.block == 0
    )


def _even(spec: ExpertSpec, rows: jax.Array, weights: ExpertWeights) -> bool:
    """What all kernels here ask for, whatever the runs are."""
    return (
        spec.code_dtype(weights) == _FORMAT
        and rows.dtype.itemsize == 2
        and weights.b1 is None
        and not spec.weight_input
        and all(size % quantise.GROUP == 0 for size in (rows.shape[1], weights.w2.shape[2]))
    )


def kept(spec: ExpertSpec, weights: ExpertWeights) -> tuple[tuple[tuple[int, ...], jnp.dtype], ...]:
    """Shapes and dtypes of what a backward pass gets from the forward pass besides the pre-activations.

    The codes [L, H, 2*I] and f32[L, H/128, 2*I/128], their scales, of transposed w1, and those of w2.
    """
    if not spec.quantises_gradients(weights):
        return ()
    described = []
    for w in (weights.w1, weights.w2):
        experts, height, width = w.shape
        described += [
            ((experts, width, height), _FORMAT),
            ((experts, width // quantise.GROUP, height // quantise.GROUP), jnp.dtype(jnp.float32)),
        ]
    return tuple(described)


def forward(
    spec: ExpertSpec,
    saved_rows: int,
    interpret: bool,
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
) -> tuple[jax.Array, ...]:
    """See ``passes.forward``; ``saved_rows`` is a multiple of ``products.ROWS``.

    Behind the pre-activations, if there are any, comes what ``kept`` describes.
    """
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], products.ROWS)
    # Zero in padding, whose activations and results are then zeros too.
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    coded, *transposed = _codes_of(weights, spec, interpret, keep=saved_rows > 0)
    codes, scales = quantised_rows(rows, spec, group_sizes, interpret)
    act, act_scales, *saved = fp8.gate_up(
        codes,
        scales,
        coded.w1,
        coded.w1_scale,
        factors,
        tiles,
        spec,
        saved_rows=saved_rows,
        dtype=rows.dtype,
    )
    out = fp8.product(act, act_scales, coded.w2, coded.w2_scale, tiles, rows.dtype)
    return (rowwise.zeroed_behind(out, tiles, interpret=interpret), *saved, *transposed)


def few_rows(
    spec: ExpertSpec,
    interpret: bool,
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
) -> tuple[jax.Array]:
    """See ``passes.forward``, for short runs; nothing is kept for a backward pass."""
    assert weights.w1_scale is not None
    assert weights.w2_scale is not None
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], few.ROWS)
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    codes, scales = _quantised_rows(rows, spec, tiles, interpret)
    act, act_scales = few.gate_up(codes, scales, weights.w1, weights.w1_scale, factors, tiles, spec)
    out = few.product(act, act_scales, weights.w2, weights.w2_scale, tiles, rows.dtype)
    return (rowwise.zeroed_behind(out, tiles, interpret=interpret),)


def backward(
    spec: ExpertSpec,
    saved_rows: int,
    interpret: bool,
    d_out: jax.Array,
    saved: jax.Array,
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    *transposed: jax.Array,
) -> tuple[jax.Array, ...]:
    """See ``quantised_passes.backward``; ``transposed`` is what ``kept`` describes."""
    capacity, dtype = rows.shape[0], rows.dtype
    tiles = row_tiles(group_sizes, spec.block, capacity, products.ROWS)
    slices = row_tiles(group_sizes, spec.block, capacity, rowwise.SLICE)
    pre = (saved,)
    if saved_rows < capacity:
        pre += (_pre_activations(spec, saved_rows, interpret, rows, row_weights, group_sizes, weights),)

    def through_activation(d_act: jax.Array, gradient_codes: jnp.dtype | None) -> tuple[jax.Array, ...]:
        return rowwise.activation_gradient(
            d_act,
            pre,
            row_weights,
            slices,
            spec,
            saved_rows=saved_rows,
            seen=_FORMAT,
            gradient_codes=gradient_codes,
            interpret=interpret,
        )

    if spec.quantises_gradients(weights):
        d_y = quantise.rows(d_out, slices, _FORMAT, interpret=interpret)
        w1, s1, w2, s2 = transposed
        d_act = fp8.product(*d_y, w2, s2, tiles, dtype)
        act, d_pre, shares, codes, scales = through_activation(d_act, _FORMAT)
        d_rows = fp8.product(codes, scales, w1, s1, tiles, dtype)
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
    dw1 = products.weight_gradient(d_pre, rows, starts, group_sizes, unclean="right")
    dw2 = products.weight_gradient(d_out, act, starts, group_sizes, unclean="left")
    return d_rows, d_row_weights, dw1.astype(weights.w1.dtype), dw2.astype(weights.w2.dtype)


def _pre_activations(
    spec: ExpertSpec,
    first_row: int,
    interpret: bool,
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
) -> jax.Array:
    """Those of the rows from one on, [C, 2*I]."""
    capacity = rows.shape[0]
    behind = row_tiles(group_sizes, spec.block, capacity, products.ROWS, first_row)
    coded, *_ = _codes_of(weights, spec, interpret, keep=False)
    codes, scales = quantised_rows(rows, spec, group_sizes, interpret)
    operands = (codes, scales, coded.w1, coded.w1_scale, row_weights, behind, spec)
    return fp8.gate_up(*operands, saved_rows=capacity, dtype=rows.dtype)[-1]


def quantised_rows(
    rows: jax.Array, spec: ExpertSpec, group_sizes: jax.Array, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Codes [C, H] and scales f32[H/128, C] or f32[1, C]."""
    slices = row_tiles(group_sizes, spec.block, rows.shape[0], rowwise.SLICE)
    return _quantised_rows(rows, spec, slices, interpret)


def _quantised_rows(
    rows: jax.Array, spec: ExpertSpec, tiles: RowTiles, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """As ``quantised_rows``, by the tiles of another kernel."""
    if spec.scheme == "fp8_block":
        return quantise.rows(rows, tiles, _FORMAT, interpret=interpret)
    assert spec.scheme is not None
    codes, scales = schemes.quantise_rows(rows, spec.scheme, _FORMAT)
    return codes, scales.T


def _codes_of(
    weights: ExpertWeights, spec: ExpertSpec, interpret: bool, *, keep: bool
) -> tuple[ExpertWeights, *tuple[jax.Array, ...]]:
    """As ``codes_of``, blocks by a kernel; and what ``kept`` describes, if it shall be kept."""
    if weights.frozen or spec.scheme != "fp8_block":
        return (codes_of(weights, spec),)
    w1, s1, *t1 = quantise.weights(weights.w1, _FORMAT, transposed=keep, interpret=interpret)
    w2, s2, *t2 = quantise.weights(weights.w2, _FORMAT, transposed=keep, interpret=interpret)
    coded = weights._replace(w1=w1, w2=w2, w1_scale=s1, w2_scale=s2)
    if not keep:
        return (coded,)
    return coded, *t1, jnp.swapaxes(s1, 1, 2), *t2, jnp.swapaxes(s2, 1, 2)
