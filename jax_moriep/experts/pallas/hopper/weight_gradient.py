"""The gradients of weights for Hopper GPUs, of values of 16 bits; those of f32 are in ``tf32``.

The sums run over the rows of a run. Its last step may reach behind the run, the one place where padding could
meet a sum: there the warpgroups clear what is not the run's. They part a tile so that each clears what it
alone reads, where whole pieces allow it.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas.hopper import launch, stream
from jax_moriep.experts.pallas.hopper.products import swizzle_of, width_of
from jax_moriep.experts.pallas.hopper.stream import PIECE, Block, Lanes, Work
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import position_in_grid

_DEPTH = 64
"""How deep a step is."""
GROUP = 8
"""Tiles of rows that take their turn at one tile of columns; not tuned."""


def weight_gradient(
    left: jax.Array,
    right: jax.Array,
    starts: jax.Array,
    group_sizes: jax.Array,
    block: int,
    dtype: Any,
    *,
    unclean: str,
) -> jax.Array:
    """See ``triton.products.weight_gradient``; padding may hold anything in one operand.

    Args:
      left: [C, M].
      right: [C, N].
      starts: i32[L], the first row of every run.
      group_sizes: i32[L].
      block: every run starts at a multiple of it.
      dtype: of the result; the sums leave the registers as it.
      unclean: "left" or "right", the operand whose padding may hold anything; the other's is zeros up to the
        end of a run's blocks.

    Returns:
      [L, M, N].
    """
    num_experts, tall, cols = group_sizes.size, left.shape[1], right.shape[1]
    width, wide = width_of(cols), swizzle_of(left.dtype, tall, cols)
    row_tiles, col_tiles = -(-tall // ROWS), -(-cols // width)
    blocks = (Block(_DEPTH, ROWS, 0, wide=wide), Block(_DEPTH, width, 0, wide=wide))
    # With smaller blocks a step can reach into the next run, in both operands.
    both = block % _DEPTH != 0
    by_cols = unclean == "right" and not both and width % (2 * PIECE) == 0
    part = width // 2 if by_cols else ROWS // 2

    def body(starts_ref: Any, sizes_ref: Any, left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        def tile(lanes: Lanes, index: Any) -> Work:
            expert, turn = index
            own = pl.ds(lanes.me * part, part)
            row_tile, col_tile = position_in_grid(turn, row_tiles, col_tiles, GROUP)
            start, size = pl.multiple_of(starts_ref[expert], math.gcd(block, _DEPTH)), sizes_ref[expert]
            at_rows, at_cols = pl.ds(row_tile * ROWS, ROWS), pl.ds(col_tile * width, width)

            def multiply(k: Any, place: Any, operands: Any, sums: Any) -> None:
                x, y = operands
                x, y = (x, y.at[:, own]) if by_cols else (x.at[:, own], y)
                left_over = size - k * _DEPTH

                @pl.when(left_over < _DEPTH)
                def _() -> None:
                    if both or unclean == "left":
                        _clear(x, left_over)
                    if by_cols:
                        _clear(y, left_over)
                    elif both or unclean == "right":
                        # Both warpgroups read it. The first one clears it for both.
                        cleared = lanes.scratch[0].at[place]
                        pl.when(lanes.me == 0)(functools.partial(_clear, y, left_over, cleared))
                        pl.when(lanes.me == 1)(lambda: mg.barrier_wait(cleared))

                mg.wgmma(sums, x.transpose((1, 0)), y)

            def finish(values: Any) -> None:
                target = out_ref.at[expert].at[at_rows, at_cols]
                lanes.leave([(values, target.at[:, own] if by_cols else target.at[own])])

            deep = pl.ds(start, left.shape[0])
            return Work(
                lax.div(size + (_DEPTH - 1), jnp.int32(_DEPTH)),
                (left_ref.at[deep, at_rows], right_ref.at[deep, at_cols]),
                (ROWS, part) if by_cols else (part, width),
                multiply,
                finish,
            )

        turns = (num_experts, row_tiles * col_tiles)
        cleared = mg.Barrier(num_arrivals=1, num_barriers=stream.PLACES)
        stream.run(blocks, left.dtype, turns, tile, results=(dtype,), piece_bytes=wide, scratch=(cleared,))

    shape = ((num_experts, tall, cols), dtype)
    return launch.call(body, (starts, group_sizes, left, right), [shape])[0]


def _clear(ref: Any, real: Any, done: Any = None) -> None:
    """Zeros in the rows of shared memory from one on; then arrives at a barrier, if one is given."""
    # By squares, of which a warpgroup has the values in few registers beside its sums.
    for col in range(0, ref.shape[1], _DEPTH):
        square = ref.at[:, pl.ds(col, _DEPTH)]
        row = mg.layout_cast(lax.broadcasted_iota(jnp.int32, square.shape, 0), mg.Layout.WGMMA)
        values = square[...]
        real_rows = row < lax.broadcast_in_dim(real, row.shape, ())
        square[...] = jnp.where(real_rows, values, jnp.zeros_like(values))
    mg.commit_smem()
    if done is not None:
        mg.barrier_arrive(done)
