"""The products once more for Hopper GPUs, in Pallas-Mosaic: bulk copies feed the matrix unit.

Triton feeds Hopper's matrix unit through loads of all threads: the same tiles of a plain product then reached
0.80 to 0.87 of the dense matmul on an H100, and 1.0 with bulk copies. ``support`` states what runs here.

What keeps the kernels plain:
- A tile has 128 rows from the first one of its run on, so it is one expert's alone, and each of two
  warpgroups multiplies 64. If the run has 64 or fewer left, both multiply these, and half of the columns.
- Rows of a tile that are behind its run's blocks are other runs': they are multiplied, and not stored.
- Bulk copies read zeros outside an array and write nothing there. So no size must divide any other: what is
  contracted ends in zeros, and columns that are none are not stored.
- Row weights multiply the activations in gate_up, so that the product after it has no epilogue but its bias.
- f32 values are multiplied in TF32, to which the matrix unit cuts them off. It takes of them only what lies
  along the sums; of what lies across, the caller makes a transposed copy.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas import activation
from jax_moriep.experts.pallas.hopper import launch
from jax_moriep.experts.pallas.hopper.launch import TileRows, along_cols, of_rows
from jax_moriep.experts.pallas.hopper.stream import PIECE, Block, Lanes, Work
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import RowTiles
from jax_moriep.experts.spec import ExpertSpec

_HALF = ROWS // 2
"""Rows that a warpgroup multiplies: the fewest of the matrix unit."""
_WIDTHS = (256, 192, 128)
"""Columns of a tile: 256 is the most that the matrix unit multiplies at once."""
_TILE_COST = 32
"""What a tile costs beside its columns, in columns: narrow ones read the rows more often. Not tuned."""
_GATES = 64
"""Columns of gate, and then of up, that lie side by side in shared memory, so that one product has both."""


def product(
    rows: jax.Array,
    weights: jax.Array,
    tiles: RowTiles,
    *,
    by_column: bool,
    bias: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """See ``triton.products.rows_times_weights``: the product alone, undefined behind the last run.

    Args:
      rows: [C, D], finite in padding if the result must be.
      weights: [L, N, D], or [L, D, N] by column, which f32 values cannot be.
      tiles: the tiles of rows.
      by_column: which of them it is.
      bias: f32[C] factors and a bias [L, N]; ``factor * bias`` is added where the factor is not 0.

    Returns:
      [C, N]; where 64 or fewer rows of a tile are a run's, zeros in the rows of its blocks behind those 64.
    """
    depth, cols = rows.shape[1], weights.shape[2 if by_column else 1]
    width, wide, step = width_of(cols), swizzle_of(rows.dtype, depth, cols), depth_of(rows.dtype)
    blocks = (
        Block(ROWS, step, 1, wide=wide),
        Block(step, width, 0, wide=wide) if by_column else Block(width, step, 1, wide=wide),
    )

    def body(table: Any, rows_ref: Any, weights_ref: Any, *refs: Any) -> None:
        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            at = TileRows.of(table, row_tile, tiles)
            first_col = col_tile * width
            w, at_cols = weights_ref.at[at.expert], pl.ds(first_col, width)
            w = w.at[:, at_cols] if by_column else w.at[at_cols, :]

            def form(part: _Part) -> Work:
                mine = pl.ds(part.col, part.cols)

                def multiply(_: Any, __: Any, operands: Any, sums: Any) -> None:
                    x, w = operands
                    w = w.at[:, mine] if by_column else w.at[mine].transpose((1, 0))
                    mg.wgmma(sums, x.at[pl.ds(part.row, _HALF)], w)

                def finish(values: Any) -> None:
                    if bias is not None:
                        at_bias = refs[1].at[at.expert, pl.ds(first_col + part.col, part.cols)]
                        factors = of_rows(refs[0].at[at.some(part.row, _HALF)])
                        values = values + _weighted(along_cols(at_bias, values.shape), factors)
                    out = refs[-1].at[:, pl.ds(first_col + part.col, part.cols)]
                    part.leave(lanes, at, values, out, part.row)
                    if part.is_short and _HALF % tiles.block:
                        nothing = jnp.zeros_like(values)
                        pl.when(at.used > _HALF)(lambda: part.leave(lanes, at, nothing, out, _HALF))

                sources = (rows_ref.at[at.some(0, part.height), :], w)
                return Work(-(-depth // step), sources, (_HALF, part.cols), multiply, finish)

            short = form(_Part.short(lanes, width))
            return dataclasses.replace(form(_Part.long(lanes, width)), short=(at.real <= _HALF, short))

        launch.all_tiles(blocks, rows.dtype, table, tiles, -(-cols // width), tile, piece_bytes=wide)

    operands = (tiles.table, rows, weights)
    if bias is not None:
        operands += (_readable(bias[0], tiles), _padded(bias[1], width))
    return launch.call(body, operands, [((tiles.capacity, cols), rows.dtype)])[0]


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one warpgroup multiplies of a tile of a product.

    Attributes:
      row: its first row in the tile, of ``_HALF``.
      col: its first column.
      cols: how many there are.
      height: rows of the tile that are read.
      twice: so many of the columns are multiplied by both warpgroups: the last ones of the first, which
        stores them, and the first ones of the second.
      is_short: whether the tile has no more than ``_HALF`` rows.
    """

    row: Any
    col: Any
    cols: int
    height: int
    twice: int = 0
    is_short: bool = False

    @classmethod
    def long(cls, lanes: Lanes, width: int) -> _Part:
        """Of a tile of more than ``_HALF`` rows: half of them."""
        return cls(lanes.me * _HALF, 0, width, ROWS)

    @classmethod
    def short(cls, lanes: Lanes, width: int) -> _Part:
        """Of another tile: half of the columns, in whole pieces."""
        cols = -(-width // (2 * PIECE)) * PIECE
        return cls(0, lanes.me * (width - cols), cols, _HALF, 2 * cols - width, True)

    def leave(self, lanes: Lanes, at: TileRows, values: Any, out: Any, row: Any) -> None:
        """Stores values in rows of the tile from one on, in the part's columns ``out`` of all rows."""
        out, twice = out.at[at.some(row, _HALF)], self.twice
        if twice:
            first = (values[:, :twice], out.at[:, pl.ds(0, twice)])
            pl.when(lanes.me == 0)(lambda: at.leave(lanes, row, [first]))
            values, out = values[:, twice:], out.at[:, pl.ds(twice, self.cols - twice)]
        at.leave(lanes, row, [(values, out)])


def gate_up(
    rows: jax.Array,
    weights: jax.Array,
    factors: jax.Array,
    tiles: RowTiles,
    spec: ExpertSpec,
    *,
    saved_rows: int,
    act: bool,
    bias: jax.Array | None = None,
) -> list[jax.Array]:
    """Gate and up in one pass over the rows, and the activation.

    Args:
      rows: [C, H].
      weights: w1, [L, 2*I, H].
      factors: f32[C], what each row of activations is multiplied with; a row whose factor is 0 gives zeros,
        whatever it holds.
      tiles: the tiles of rows.
      spec: names the activation.
      saved_rows: write the pre-activations of the first so many rows, a multiple of ``ROWS`` or C.
      act: write the activations.
      bias: [L, 2*I], or None.

    Returns:
      The activations [C, I] if asked for, and the pre-activations [saved_rows, 2*I] if there are any.
    """
    depth, cols = rows.shape[1], weights.shape[1] // 2
    groups, wide, step = 2, swizzle_of(rows.dtype, depth, cols), depth_of(rows.dtype)
    width = groups * _GATES
    blocks = (
        Block(ROWS, step, 1, wide=wide),
        Block(2 * width, step, 1, parts=2 * groups, wide=wide),
    )
    by_half = weights.reshape(-1, cols, depth)

    def body(table: Any, rows_ref: Any, weights_ref: Any, factors_ref: Any, *refs: Any) -> None:
        outs = _GateUp(tiles, spec, factors_ref, refs, act, saved_rows, bias is not None)

        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            at = TileRows.of(table, row_tile, tiles)
            first_cols = [col_tile * width + n * _GATES for n in range(groups)]
            halves = [weights_ref.at[2 * at.expert + half] for half in range(2)]
            w = tuple(half.at[pl.ds(first, _GATES), :] for first in first_cols for half in halves)

            def form(row: Any, first_group: Any, count: int, height: int) -> Work:
                both = count * 2 * _GATES
                mine = pl.ds(first_group * (2 * _GATES), both)

                def multiply(_: Any, __: Any, operands: Any, sums: Any) -> None:
                    x, w = operands
                    mg.wgmma(sums, x.at[pl.ds(row, _HALF)], w.at[mine].transpose((1, 0)))

                return Work(
                    -(-depth // step),
                    (rows_ref.at[at.some(0, height), :], w),
                    (_HALF, both),
                    multiply,
                    lambda values: outs.leave(lanes, at, row, first_cols[0] + first_group * _GATES, values),
                )

            short = form(0, lanes.me, 1, _HALF)
            long = form(lanes.me * _HALF, 0, groups, ROWS)
            return dataclasses.replace(long, short=(at.real <= _HALF, short))

        launch.all_tiles(blocks, rows.dtype, table, tiles, -(-cols // width), tile, piece_bytes=wide)

    shapes: list[tuple[tuple[int, ...], Any]] = [((tiles.capacity, cols), rows.dtype)] if act else []
    if saved_rows:
        # Columns of gate and of up are two dimensions, so that what is behind the former is not stored.
        shapes.append(((saved_rows, 2, cols), rows.dtype))
    operands = (tiles.table, rows, by_half, _readable(factors, tiles))
    if bias is not None:
        operands += (_padded(bias.reshape(-1, cols), width),)
    results = launch.call(body, operands, shapes)
    if saved_rows:
        results[-1] = results[-1].reshape(saved_rows, 2 * cols)
    return results


@dataclasses.dataclass(frozen=True)
class _GateUp:
    """What becomes of the sums of ``gate_up``, whose arguments these are.

    ``refs`` are the bias, if there is one, and the results.
    """

    tiles: RowTiles
    spec: ExpertSpec
    factors: Any
    refs: tuple[Any, ...]
    act: bool
    saved_rows: int
    biased: bool

    def leave(self, lanes: Lanes, at: TileRows, row: Any, first_col: Any, sums: Any) -> None:
        """Stores what follows from a warpgroup's sums: by turns so many columns of gate and of up."""
        at_rows, parts, pre = at.some(row, _HALF), [], []
        factor = lax.broadcast_in_dim(of_rows(self.factors.at[at_rows]), (_HALF, _GATES), (0,))
        for n in range(sums.shape[1] // (2 * _GATES)):
            at_cols = pl.ds(first_col + n * _GATES, _GATES)
            gate, up = (sums[:, (2 * n + half) * _GATES :][:, :_GATES] for half in range(2))
            if self.biased:
                gate, up = (
                    values + along_cols(self.refs[0].at[2 * at.expert + half, at_cols], values.shape)
                    for half, values in enumerate((gate, up))
                )
            if self.act:
                h = jnp.where(factor != 0, activation.value(gate, up, self.spec) * factor, 0.0)
                parts.append((h, self.refs[self.biased].at[at_rows, at_cols]))
            if self.saved_rows:
                kept = self.refs[-1].at[at_rows]
                pre += [(values, kept.at[:, half, at_cols]) for half, values in enumerate((gate, up))]
        if not pre or self.saved_rows == self.tiles.capacity:
            at.leave(lanes, row, parts + pre)
            return
        if parts:
            at.leave(lanes, row, parts)
        pl.when(at.first < self.saved_rows)(lambda: at.leave(lanes, row, pre))


def depth_of(dtype: Any) -> int:
    """How deep a step of a product is: the values that 128 bytes hold, a row of swizzled shared memory."""
    return 128 // jnp.dtype(dtype).itemsize


def width_of(cols: int) -> int:
    """Columns of a tile: those with which all tiles together cost the least."""
    return min(_WIDTHS, key=lambda width: -(-cols // width) * (width + _TILE_COST))


def swizzle_of(dtype: Any, *sizes: int) -> int:
    """How many bytes of shared memory are swizzled together: whole parts of every row of the operands."""
    return jnp.dtype(dtype).itemsize * math.gcd(*sizes, depth_of(dtype))


def _readable(factors: jax.Array, tiles: RowTiles) -> jax.Array:
    """Factors of rows that can be read for a tile that reaches behind the last row."""
    return jnp.pad(factors, (0, ROWS)) if tiles.overrun else factors


def _padded(bias: jax.Array, width: int) -> jax.Array:
    """A bias [n, N] as kernels read it: f32, in whole tiles of columns."""
    return jnp.pad(bias.astype(jnp.float32), ((0, 0), (0, -bias.shape[1] % width)))


def _weighted(bias: Any, factors: Any) -> Any:
    """The bias times rows' factors; zeros where they are 0."""
    factors = lax.broadcast_in_dim(factors, bias.shape, (0,))
    return jnp.where(factors != 0, bias * factors, 0.0)
