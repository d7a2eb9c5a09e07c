"""The forward and the backward pass by the Hopper products; see ``triton.passes`` for what each step is."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jax_moriep.experts.pallas import rowwise
from jax_moriep.experts.pallas.hopper import act_grad, products
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.experts.spec import ExpertSpec
from jax_moriep.plan import run_starts


def forward(spec: ExpertSpec, saved_rows: int, *operands: jax.Array) -> tuple[jax.Array, ...]:
    """See ``triton.passes.forward``; ``saved_rows`` is a multiple of ``ROWS``."""
    rows, row_weights, group_sizes, *weights = operands
    w1, w2 = _cast(rows, weights)
    tiles = row_tiles(group_sizes, spec.block, rows.shape[0], ROWS)
    # Zero in padding, whose activations and results are then zeros too.
    factors = jnp.where(real_rows(group_sizes, spec.block, rows.shape[0]), row_weights, 0)
    act, *saved = products.gate_up(rows, w1, factors, tiles, spec, saved_rows=saved_rows, act=True)
    out = products.product(act, w2, tiles, by_column=False)
    return (rowwise.zeroed_behind(out, tiles, interpret=False), *saved)


def backward(
    spec: ExpertSpec, saved_rows: int, d_out: jax.Array, saved: jax.Array, *operands: jax.Array
) -> tuple[jax.Array, ...]:
    """See ``triton.passes.backward``."""
    rows, row_weights, group_sizes, *weights = operands
    w1, w2 = _cast(rows, weights)
    capacity = rows.shape[0]
    starts = run_starts(group_sizes, spec.block)
    tiles = row_tiles(group_sizes, spec.block, capacity, ROWS)
    pre = (saved,)
    if saved_rows < capacity:
        behind = row_tiles(group_sizes, spec.block, capacity, ROWS, saved_rows)
        pre += tuple(products.gate_up(rows, w1, row_weights, behind, spec, saved_rows=capacity, act=False))
    real = real_rows(group_sizes, spec.block, capacity)
    factors = jnp.where(real, row_weights, 0)
    act, d_pre, shares = act_grad.activation_gradient(
        d_out, w2, pre, factors, tiles, spec, saved_rows=saved_rows
    )
    d_rows = products.product(d_pre, w1, tiles, by_column=True)
    d_rows = rowwise.zeroed_behind(d_rows, tiles, interpret=False)
    dw1 = products.weight_gradient(d_pre, rows, starts, group_sizes, weights[0].dtype, unclean="right")
    dw2 = products.weight_gradient(d_out, act, starts, group_sizes, weights[1].dtype, unclean="left")
    return d_rows, jnp.where(real, jnp.sum(shares, axis=0), 0), dw1, dw2


def _cast(rows: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    """Weights in the rows' dtype: f32 master weights as the kernels read them.

    XLA makes one cast of that of both passes, where they are in one program.
    """
    return [w.astype(rows.dtype) for w in weights]
