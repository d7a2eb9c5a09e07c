"""The forward and the backward pass by the Hopper products; see ``triton.passes`` for what each step is."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moriep.experts.pallas import rowwise
from jax_moriep.experts.pallas.hopper import products
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.experts.spec import ExpertSpec, Operands
from jax_moriep.plan import run_starts


def forward(spec: ExpertSpec, saved_rows: int, operands: Operands) -> tuple[jax.Array, ...]:
    """See ``triton.passes.forward``; ``saved_rows`` is a multiple of ``ROWS``."""
    rows, row_weights, group_sizes, weights = operands
    w1, w2, first = weights.w1, weights.w2, weights.first
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], ROWS, first_expert=first)
    # Zero in padding, whose activations and results are then zeros too.
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    act, *saved = products.gate_up(rows, w1, factors, tiles, spec, saved_rows=saved_rows, act=True)
    out = products.product(act, w2, tiles, by_column=False)
    return (rowwise.zeroed_behind(out, tiles, interpret=False), *saved)


def backward(
    spec: ExpertSpec, saved_rows: int, d_out: jax.Array, saved: jax.Array, operands: Operands
) -> tuple[jax.Array, ...]:
    """See ``triton.passes.backward``."""
    rows, row_weights, group_sizes, weights = operands
    w1, w2, first = weights.w1, weights.w2, weights.first
    capacity = rows.shape[0]
    starts = run_starts(group_sizes, spec.block)
    tiles = row_tiles(group_sizes, spec.block, capacity, ROWS, first_expert=first)
    pre = (saved,)
    if saved_rows < capacity:
        behind = row_tiles(group_sizes, spec.block, capacity, ROWS, saved_rows, first_expert=first)
        pre += tuple(products.gate_up(rows, w1, row_weights, behind, spec, saved_rows=capacity, act=False))
    d_act = products.product(d_out, w2, tiles, by_column=True)
    slices = row_tiles(group_sizes, spec.block, capacity, rowwise.SLICE)
    act, d_pre, shares = rowwise.activation_gradient(
        d_act, pre, row_weights, slices, spec, saved_rows=saved_rows, interpret=False
    )
    d_rows = products.product(d_pre, w1, tiles, by_column=True)
    d_rows = rowwise.zeroed_behind(d_rows, tiles, interpret=False)
    dw1 = products.weight_gradient(d_pre, rows, starts, group_sizes, unclean="right")
    dw2 = products.weight_gradient(d_out, act, starts, group_sizes, unclean="left")
    d_weights = jnp.where(real_rows(group_sizes, spec.block, capacity), jnp.sum(shares, axis=0), 0)
    return d_rows, d_weights, dw1, dw2
