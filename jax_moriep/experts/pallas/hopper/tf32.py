"""What f32 needs besides ``products``: a weight gradient of operands that lie along its sums, in TF32.

The sums run over the rows of a run, so the operands are transposed copies, in which these are the columns.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas.hopper import launch, stream
from jax_moriep.experts.pallas.hopper.products import swizzle_of, width_of
from jax_moriep.experts.pallas.hopper.stream import Block, Lanes, Work
from jax_moriep.experts.pallas.hopper.support import F32_STEP, ROWS
from jax_moriep.experts.pallas.hopper.weight_gradient import GROUP
from jax_moriep.experts.pallas.tiles import position_in_grid

_HALF = ROWS // 2


def along_sums(real: jax.Array, values: jax.Array) -> jax.Array:
    """The copy of f32[C, N] that ``weight_gradient`` reads: [N, C'], zeros in columns that are not real.

    C' is C or, if whole steps do not make that, the next number of which they do.
    """
    copy = jnp.where(real, values.T, 0)
    return jnp.pad(copy, ((0, 0), (0, -values.shape[0] % F32_STEP)))


def weight_gradient(
    left: jax.Array, right: jax.Array, starts: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """``left[:, rows of e] @ right[:, rows of e].T`` for every expert e.

    Args:
      left: f32[M, C'], from ``along_sums``, as is the next.
      right: f32[N, C'].
      starts: i32[L], the first row of every run, a multiple of 32.
      group_sizes: i32[L].

    Returns:
      f32[L, M, N].
    """
    num_experts, (tall, capacity), cols = group_sizes.size, left.shape, right.shape[0]
    width, wide = width_of(cols), swizzle_of(left.dtype, cols)
    row_tiles, col_tiles = -(-tall // ROWS), -(-cols // width)
    blocks = (Block(ROWS, F32_STEP, 1, wide=wide), Block(width, F32_STEP, 1, wide=wide))

    def body(starts_ref: Any, sizes_ref: Any, left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        def tile(lanes: Lanes, index: Any) -> Work:
            expert, turn = index
            own = pl.ds(lanes.me * _HALF, _HALF)
            row_tile, col_tile = position_in_grid(turn, row_tiles, col_tiles, GROUP)
            at_rows, at_cols = pl.ds(row_tile * ROWS, ROWS), pl.ds(col_tile * width, width)
            deep = pl.ds(pl.multiple_of(starts_ref[expert], F32_STEP), capacity)

            def multiply(_: Any, __: Any, operands: Any, sums: Any) -> None:
                x, y = operands
                mg.wgmma(sums, x.at[own], y.transpose((1, 0)))

            return Work(
                lax.div(sizes_ref[expert] + (F32_STEP - 1), jnp.int32(F32_STEP)),
                (left_ref.at[at_rows, deep], right_ref.at[at_cols, deep]),
                (_HALF, width),
                multiply,
                lambda values: lanes.leave([(values, out_ref.at[expert].at[at_rows, at_cols].at[own])]),
            )

        turns = (num_experts, row_tiles * col_tiles)
        stream.run(blocks, left.dtype, turns, tile, piece_bytes=wide)

    shape = ((num_experts, tall, cols), left.dtype)
    return launch.call(body, (starts, group_sizes, left, right), [shape])[0]
