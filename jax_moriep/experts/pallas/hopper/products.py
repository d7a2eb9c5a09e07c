"""The products once more for Hopper GPUs, in Pallas-Mosaic: bulk copies feed the matrix unit.

Triton feeds Hopper's matrix unit through loads of all threads. On an H100 the same tiles of a plain product
then reached 0.80 to 0.87 of the dense matmul, and 1.0 with bulk copies. These kernels cover the common case,
which ``support`` states; everything else runs in Triton.

Three things keep the kernels plain:
- Tiles have 128 rows and ``block`` is a multiple of that, so a tile is one expert's alone and every store is
  a whole tile. Padding rows of intermediates are zeros or never read.
- Row weights multiply the activations in gate_up, so that the product after it has no epilogue.
- The one place where padding could meet a sum is a weight gradient's last step over an expert's rows: there
  each warpgroup clears the padding in its own part of the operand that may hold anything.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas import activation
from jax_moriep.experts.pallas.hopper import launch, stream
from jax_moriep.experts.pallas.hopper.stream import Block, Lanes, Work
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import RowTiles, position_in_grid
from jax_moriep.experts.spec import ExpertSpec

_DEPTH = 64
"""How deep a step is: the 16-bit values that 128 bytes hold, a row of swizzled shared memory."""
_GROUP = 8
"""Tiles of rows that take their turn at one tile of columns in a weight gradient. As in the Triton kernels,
where 8 is the default of ``Tile.group``; not tuned here."""


def product(rows: jax.Array, weights: jax.Array, tiles: RowTiles, *, by_column: bool) -> jax.Array:
    """See ``triton.products.rows_times_weights``: the product alone, undefined behind the last run."""
    depth, cols = rows.shape[1], weights.shape[2 if by_column else 1]
    width, height = width_of(cols), ROWS // 2
    blocks = (Block(ROWS, _DEPTH, 1), Block(_DEPTH, width, 0) if by_column else Block(width, _DEPTH, 1))

    def body(table: Any, rows_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            expert, at_rows = launch.rows_of_tile(table, row_tile)
            own, at_cols = pl.ds(lanes.me * height, height), pl.ds(col_tile * width, width)
            w = weights_ref.at[expert]

            def multiply(_: Any, operands: Any, sums: Any) -> None:
                x, w = operands
                mg.wgmma(sums[0], x.at[own], w if by_column else w.transpose((1, 0)))

            return Work(
                depth // _DEPTH,
                (rows_ref.at[at_rows, :], w.at[:, at_cols] if by_column else w.at[at_cols, :]),
                ((height, width),),
                multiply,
                lambda sums: lanes.leave([(sums[0], out_ref.at[at_rows, at_cols].at[own])]),
            )

        launch.all_tiles(blocks, rows.dtype, table, tiles, cols // width, tile)

    shape = ((tiles.capacity, cols), rows.dtype)
    return launch.call(body, (tiles.table, rows, weights), [shape])[0]


def gate_up(
    rows: jax.Array,
    weights: jax.Array,
    factors: jax.Array,
    tiles: RowTiles,
    spec: ExpertSpec,
    *,
    saved_rows: int,
    act: bool,
) -> list[jax.Array]:
    """Gate and up in one pass over the rows, and the activation.

    Args:
      rows: [C, H].
      weights: w1, [L, 2*I, H].
      factors: f32[C], what each row of activations is multiplied with; a row whose factor is 0 gives zeros,
        whatever it holds.
      tiles: the tiles of rows.
      spec: names the activation.
      saved_rows: write the pre-activations of the first so many rows, a multiple of ``ROWS``.
      act: write the activations.

    Returns:
      The activations [C, I] if asked for, and the pre-activations [saved_rows, 2*I] if there are any.
    """
    depth, cols = rows.shape[1], weights.shape[1] // 2
    width, height = 128, ROWS // 2
    blocks = (Block(ROWS, _DEPTH, 1), Block(width, _DEPTH, 1), Block(width, _DEPTH, 1))

    def body(table: Any, rows_ref: Any, weights_ref: Any, factors_ref: Any, *out_refs: Any) -> None:
        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            expert, at_rows = launch.rows_of_tile(table, row_tile)
            first, own = at_rows.start, pl.ds(lanes.me * height, height)
            at_gate, at_up = pl.ds(col_tile * width, width), pl.ds(cols + col_tile * width, width)
            w = weights_ref.at[expert]

            def multiply(_: Any, operands: Any, sums: Any) -> None:
                x, w_gate, w_up = operands
                mg.wgmma(sums[0], x.at[own], w_gate.transpose((1, 0)))
                mg.wgmma(sums[1], x.at[own], w_up.transpose((1, 0)))

            def finish(sums: Any) -> None:
                gate, up = sums
                parts = []
                if act:
                    factor = mg.load(  # pyright: ignore[reportCallIssue]
                        factors_ref.at[pl.ds(first + lanes.me * height, height)],
                        layout=mg.Layout.WGMMA.reduce(1),
                        optimized=False,
                    )
                    factor = lax.broadcast_in_dim(factor, gate.shape, (0,))
                    h = jnp.where(factor != 0, activation.value(gate, up, spec) * factor, 0.0)
                    parts.append((h, out_refs[0].at[at_rows, at_gate].at[own]))
                pre = []
                if saved_rows:
                    kept = out_refs[-1].at[at_rows]
                    pre = [(gate, kept.at[:, at_gate].at[own]), (up, kept.at[:, at_up].at[own])]
                launch.leave(lanes, parts, pre, first, saved_rows, tiles)

            return Work(
                depth // _DEPTH,
                (rows_ref.at[at_rows, :], w.at[at_gate, :], w.at[at_up, :]),
                ((height, width), (height, width)),
                multiply,
                finish,
            )

        launch.all_tiles(blocks, rows.dtype, table, tiles, cols // width, tile)

    shapes = [((tiles.capacity, cols), rows.dtype)] if act else []
    if saved_rows:
        shapes.append(((saved_rows, 2 * cols), rows.dtype))
    return launch.call(body, (tiles.table, rows, weights, factors), shapes)


def weight_gradient(
    left: jax.Array,
    right: jax.Array,
    starts: jax.Array,
    group_sizes: jax.Array,
    dtype: Any,
    *,
    unclean: str,
) -> jax.Array:
    """See ``triton.products.weight_gradient``.

    Args:
      left: [C, M].
      right: [C, N].
      starts: i32[L], the first row of every run.
      group_sizes: i32[L].
      dtype: of the result; the sums leave the registers as it.
      unclean: "left" or "right", the operand whose padding may hold anything; the other's must be zeros up to
        the next multiple of ``_DEPTH`` rows.

    Returns:
      [L, M, N].
    """
    num_experts, tall, cols = group_sizes.size, left.shape[1], right.shape[1]
    width = width_of(cols)
    row_tiles, col_tiles = tall // ROWS, cols // width
    # Each warpgroup clears what it alone reads, so neither waits for the other.
    by_rows = unclean == "left"
    height, wide = (ROWS // 2, width) if by_rows else (ROWS, width // 2)
    blocks = (Block(_DEPTH, ROWS, 0), Block(_DEPTH, width, 0))

    def body(starts_ref: Any, sizes_ref: Any, left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        def tile(lanes: Lanes, index: Any) -> Work:
            expert, turn = index
            own = pl.ds(lanes.me * (height if by_rows else wide), height if by_rows else wide)
            row_tile, col_tile = position_in_grid(turn, row_tiles, col_tiles, _GROUP)
            start, size = pl.multiple_of(starts_ref[expert], ROWS), sizes_ref[expert]
            at_rows, at_cols = pl.ds(row_tile * ROWS, ROWS), pl.ds(col_tile * width, width)

            def multiply(k: Any, operands: Any, sums: Any) -> None:
                x, y = operands
                x, y = (x.at[:, own], y) if by_rows else (x, y.at[:, own])
                dirty = x if by_rows else y
                left_over = size - k * _DEPTH

                @pl.when(left_over < _DEPTH)
                def _() -> None:
                    row = mg.layout_cast(lax.broadcasted_iota(jnp.int32, dirty.shape, 0), mg.Layout.WGMMA)
                    values = dirty[...]
                    real = row < lax.broadcast_in_dim(left_over, row.shape, ())
                    dirty[...] = jnp.where(real, values, jnp.zeros_like(values))
                    mg.commit_smem()

                mg.wgmma(sums[0], x.transpose((1, 0)), y)

            def finish(sums: Any) -> None:
                target = out_ref.at[expert].at[at_rows, at_cols]
                lanes.leave([(sums[0], target.at[own] if by_rows else target.at[:, own])])

            deep = pl.ds(start, left.shape[0])
            return Work(
                lax.div(size + (_DEPTH - 1), jnp.int32(_DEPTH)),
                (left_ref.at[deep, at_rows], right_ref.at[deep, at_cols]),
                ((height, wide),),
                multiply,
                finish,
            )

        stream.run(blocks, left.dtype, (num_experts, row_tiles * col_tiles), tile, results=(dtype,))

    shape = ((num_experts, tall, cols), dtype)
    return launch.call(body, (starts, group_sizes, left, right), [shape])[0]


def width_of(cols: int) -> int:
    """Columns of a tile: the most that the matrix unit multiplies at once, or half of it where those do not
    divide the matrix."""
    return 256 if cols % 256 == 0 else 128
