"""The forward and the backward pass by the Hopper products; see ``triton.passes`` for what each step is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moriep.experts.pallas import rowwise
from jax_moriep.experts.pallas.biases import BIAS_ROWS, row_sums, rows_times_bias
from jax_moriep.experts.pallas.hopper import products
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.experts.spec import ExpertSpec
from jax_moriep.plan import run_starts


def forward(spec: ExpertSpec, saved_rows: int, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """See ``triton.passes.forward``; ``saved_rows`` is a multiple of ``ROWS``, or C."""
    rows, row_weights, group_sizes, w1, w2, *biases = operands
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], ROWS)
    # Zero in padding, whose activations and results are then zeros too.
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    b1, b2 = biases or (None, None)
    act, *saved = products.gate_up(rows, w1, factors, tiles, spec, saved_rows=saved_rows, act=True, bias=b1)
    out = products.product(act, w2, tiles, by_column=False, bias=None if b2 is None else (factors, b2))
    return (rowwise.zeroed_behind(out, tiles, interpret=False), *saved)


def backward(
    spec: ExpertSpec, saved_rows: int, d_out: jax.Array, saved: jax.Array, *operands: jax.Array
) -> tuple[jax.Array, ...]:
    """See ``triton.passes.backward``."""
    rows, row_weights, group_sizes, w1, w2, *biases = operands
    capacity, block = rows.shape[0], spec.block
    starts = run_starts(group_sizes, block)
    tiles = row_tiles(group_sizes, block, capacity, ROWS)
    pre = (saved,)
    if saved_rows < capacity:
        behind = row_tiles(group_sizes, block, capacity, ROWS, saved_rows)
        b1 = biases[0] if biases else None
        again = products.gate_up(rows, w1, row_weights, behind, spec, saved_rows=capacity, act=False, bias=b1)
        pre += tuple(again)
    d_act = products.product(d_out, w2, tiles, by_column=True)
    slices = row_tiles(group_sizes, block, capacity, rowwise.SLICE)
    act, d_pre, shares = rowwise.activation_gradient(
        d_act, pre, row_weights, slices, spec, saved_rows=saved_rows, interpret=False
    )
    d_rows = products.product(d_pre, w1, tiles, by_column=True)
    d_rows = rowwise.zeroed_behind(d_rows, tiles, interpret=False)
    dw1 = products.weight_gradient(d_pre, rows, starts, group_sizes, block, unclean="right")
    dw2 = products.weight_gradient(d_out, act, starts, group_sizes, block, unclean="left")
    d_weights, d_biases = jnp.sum(shares, axis=0), ()
    if biases:
        b1, b2 = biases
        d_biases = (
            row_sums(d_pre, None, starts, group_sizes, b1.dtype, interpret=False),
            row_sums(d_out, row_weights, starts, group_sizes, b2.dtype, interpret=False),
        )
        few = row_tiles(group_sizes, block, capacity, BIAS_ROWS)
        d_weights += rows_times_bias(d_out, b2, few, interpret=False)
    d_weights = jnp.where(real_rows(group_sizes, block, capacity), d_weights, 0)
    return d_rows, d_weights, dw1, dw2, *d_biases
