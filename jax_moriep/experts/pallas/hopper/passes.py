"""The forward and the backward pass by the Hopper products; see ``triton.passes`` for what each step is.

The backward pass reads operands across the sums. Of f32 values it makes transposed copies: of both weights,
and of the four operands of the weights' gradients.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.experts.pallas import rowwise
from jax_moriep.experts.pallas.biases import BIAS_ROWS, row_sums, rows_times_bias
from jax_moriep.experts.pallas.hopper import act_grad, products, tf32
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.hopper.weight_gradient import weight_gradient
from jax_moriep.experts.pallas.tiles import RowTiles, real_rows, row_tiles
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights, Operands
from jax_moriep.plan import run_starts


def forward(spec: ExpertSpec, saved_rows: int, operands: Operands) -> tuple[jax.Array, ...]:
    """See ``triton.passes.forward``; ``saved_rows`` is a multiple of ``ROWS``, or C."""
    rows, row_weights, group_sizes, given = operands
    weights = _cast(given, rows.dtype, group_sizes.size)
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], ROWS, first_expert=weights.first)
    # Zero in padding, whose activations and results are then zeros too.
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    act, *saved = products.gate_up(
        rows, weights.w1, factors, tiles, spec, saved_rows=saved_rows, act=True, bias=weights.b1
    )
    bias = None if weights.b2 is None else (factors, weights.b2)
    out = products.product(act, weights.w2, tiles, by_column=False, bias=bias)
    return (rowwise.zeroed_behind(out, tiles, interpret=False), *saved)


def backward(
    spec: ExpertSpec, saved_rows: int, d_out: jax.Array, saved: jax.Array, operands: Operands
) -> tuple[jax.Array, ...]:
    """See ``triton.passes.backward``."""
    rows, row_weights, group_sizes, given = operands
    weights = _cast(given, rows.dtype, group_sizes.size)
    capacity, block, first = rows.shape[0], spec.block, weights.first
    starts = run_starts(group_sizes, block)
    tiles = row_tiles(group_sizes, block, capacity, ROWS, first_expert=first)
    pre = (saved,)
    if saved_rows < capacity:
        behind = row_tiles(group_sizes, block, capacity, ROWS, saved_rows, first_expert=first)
        again = products.gate_up(
            rows, weights.w1, row_weights, behind, spec, saved_rows=capacity, act=False, bias=weights.b1
        )
        pre += tuple(again)
    real = real_rows(group_sizes, block, capacity)
    if act_grad.suits(tiles, weights.w2):
        factors = jnp.where(real, row_weights, 0)
        act, d_pre, shares = act_grad.activation_gradient(
            d_out, weights.w2, pre, factors, tiles, spec, saved_rows=saved_rows
        )
    else:
        d_act = _by_column(d_out, weights, "w2", tiles, group_sizes)
        slices = row_tiles(group_sizes, block, capacity, rowwise.SLICE)
        act, d_pre, shares = rowwise.activation_gradient(
            d_act, pre, row_weights, slices, spec, saved_rows=saved_rows, interpret=False
        )
    d_rows = _by_column(d_pre, weights, "w1", tiles, group_sizes)
    d_rows = rowwise.zeroed_behind(d_rows, tiles, interpret=False)
    if rows.dtype == jnp.float32:
        pre_t, rows_t, out_t, act_t = (tf32.along_sums(real, x) for x in (d_pre, rows, d_out, act))
        dw1 = tf32.weight_gradient(pre_t, rows_t, starts, group_sizes).astype(given.w1.dtype)
        dw2 = tf32.weight_gradient(out_t, act_t, starts, group_sizes).astype(given.w2.dtype)
    else:
        of_runs = (starts, group_sizes, block)
        dw1 = weight_gradient(d_pre, rows, *of_runs, given.w1.dtype, unclean="right")
        dw2 = weight_gradient(d_out, act, *of_runs, given.w2.dtype, unclean="left")
    d_weights, d_biases = jnp.sum(shares, axis=0), ()
    if weights.b1 is not None and weights.b2 is not None:
        d_biases = (
            row_sums(d_pre, None, starts, group_sizes, weights.b1.dtype, interpret=False),
            row_sums(d_out, row_weights, starts, group_sizes, weights.b2.dtype, interpret=False),
        )
        few = row_tiles(group_sizes, block, capacity, BIAS_ROWS, first_expert=first)
        d_weights += rows_times_bias(d_out, weights.b2, few, interpret=False)
    return d_rows, jnp.where(real, d_weights, 0), dw1, dw2, *d_biases


def _cast(weights: ExpertWeights, dtype: Any, num_experts: int) -> ExpertWeights:
    """Weights in the rows' dtype: f32 master weights as the kernels read them.

    XLA makes one cast of that of both passes, where they are in one program.
    """
    if weights.w1.dtype == weights.w2.dtype == dtype:
        return weights
    # What is made of weights must not be made of all layers'.
    weights = weights.alone(num_experts)
    return weights._replace(w1=weights.w1.astype(dtype), w2=weights.w2.astype(dtype))


def _by_column(
    rows: jax.Array, weights: ExpertWeights, name: str, tiles: RowTiles, group_sizes: jax.Array
) -> jax.Array:
    """Rows times their expert's "w1" or "w2", [L, D, N] each."""
    if rows.dtype != jnp.float32:
        return products.product(rows, getattr(weights, name), tiles, by_column=True)
    # A copy must not be made of all layers'. Cut before it is turned, both are one copy.
    alone = weights._replace(b1=None, b2=None).alone(group_sizes.size)
    tiles = row_tiles(group_sizes, tiles.block, tiles.capacity, tiles.size)
    return products.product(rows, jnp.swapaxes(getattr(alone, name), 1, 2), tiles, by_column=False)
