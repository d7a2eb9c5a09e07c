"""The baseline: experts by ``lax.ragged_dot`` on compacted rows. It is no implementation of the package."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.plan import run_starts
from jax_moriep.runtime import compat

# Contracts the last dimension of both sides: the weights are used as they lie, [L, out, in].
_ROWS_BY_EXPERT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def expert_mlp(
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    block: int,
    num_rows: int,
) -> jax.Array:
    """A silu-gated MLP for each expert: gathers the real rows, multiplies, and puts the results back.

    Args:
      rows: [C, H], as dispatch gives them.
      row_weights: f32[C].
      group_sizes: i32[L].
      w1: [L, 2*I, H].
      w2: [L, H, I].
      block: every expert's run starts at a multiple of it.
      num_rows: rows to compute; at least as many as there are real ones.

    Returns:
      [C, H], times the row weights; zeros on padding.
    """
    capacity = rows.shape[0]
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(num_rows, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(ends, index, side="right"), group_sizes.size - 1)
    row = run_starts(group_sizes, block)[expert] + index - (ends - group_sizes)[expert]
    row = jnp.where(index < ends[-1], row, capacity)  # out of bounds: reads as zero, is not written

    compact = rows.at[row].get(mode="fill", fill_value=0)
    gate, up = jnp.split(product(compact, w1, group_sizes), 2, axis=1)
    out = product(jax.nn.silu(gate) * up, w2, group_sizes)
    out = out * row_weights.at[row].get(mode="fill", fill_value=0)[:, None].astype(out.dtype)
    nothing = compat.zeros_like_varying(rows.shape, rows.dtype, rows, out)
    return nothing.at[row].set(out, mode="drop", unique_indices=True)


def product(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """[N, in] by weights [L, out, in] of each row's expert: [N, out]."""
    return lax.ragged_dot_general(rows, weights, group_sizes, _ROWS_BY_EXPERT)
