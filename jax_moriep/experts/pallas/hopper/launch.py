"""What every Hopper kernel here shares: the call of Pallas itself, the walk over tiles, how results leave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas.hopper import stream
from jax_moriep.experts.pallas.hopper.stream import PIECE, Block, Lanes, Line, Work
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import OfTile, RowTiles, position_in_runs
from jax_moriep.runtime import compat

PROGRAMS = 132
"""One for each multiprocessor of an H100 SXM or an H200, whose shared memory and registers it takes whole."""


def rows_of_tile(table: Any, row_tile: Any) -> tuple[Any, Any]:
    """The expert and the rows of a tile."""
    tile = OfTile(table, row_tile)
    first = pl.multiple_of(tile.first, ROWS)
    return tile.expert, pl.ds(first, ROWS)


@dataclasses.dataclass(frozen=True)
class TileRows:
    """The rows of a tile, inside a kernel.

    Attributes:
      expert: whose they are.
      first: the first one.
      real: how many rows its run has from there on.
      used: likewise the run's blocks; rows behind them are another run's.
      strip: rows that are stored together, all of them of one run; None: no tile has any behind its run.
    """

    expert: Any
    first: Any
    real: Any
    used: Any
    strip: int | None

    @classmethod
    def of(cls, table: Any, row_tile: Any, tiles: RowTiles) -> TileRows:
        """What the table says of a tile."""
        tile = tiles.of_tile(table, row_tile)
        strip = math.gcd(tiles.block, PIECE)
        first = pl.multiple_of(tile.first, strip)
        strip = None if strip == PIECE else strip
        return cls(tile.expert, first, tile.stop - first, tile.end - first, strip)

    def some(self, row: Any, count: int) -> Any:
        """So many of them from one on, of an array of all rows."""
        return pl.ds(self.first + row, count)

    def leave(self, lanes: Lanes, row: Any, parts: list[tuple[Any, Any]]) -> None:
        """``Lanes.leave`` of parts that begin at a row of the tile, up to the end of the run's blocks."""
        if self.strip is None:
            lanes.leave(parts)
        else:
            lanes.leave(parts, self.used - row, self.strip)


def all_tiles(
    blocks: tuple[Block | Line, ...],
    dtype: Any,
    table: Any,
    tiles: RowTiles,
    col_tiles: int,
    tile: Callable[[Lanes, Any, Any], Any],
    **of_stream: Any,
) -> None:
    """Does tile(lanes, tile of rows, tile of columns) for all that are in use; see ``stream.run``."""
    of_call = tiles.of_call(table)
    first = of_call.first_tile
    num_tiles = of_call.num_tiles - first

    def of_turn(lanes: Lanes, index: Any) -> Work:
        return tile(lanes, *position_in_runs(table, index[0], first, col_tiles))

    stream.run(blocks, dtype, (num_tiles * col_tiles,), of_turn, **of_stream)


def call(
    body: Any,
    operands: tuple[jax.Array, ...],
    results: list[tuple[tuple[int, ...], Any]],
    aliases: dict[int, int] | None = None,
) -> list[Any]:
    """Runs a kernel on all multiprocessors.

    Args:
      body: the kernel.
      operands: the arrays.
      results: shape and dtype of each result.
      aliases: which operand's memory each result takes over.

    Returns:
      The results; what the kernel did not write is undefined.
    """
    like = compat.union_varying(*operands)
    kernel = compat.mosaic_kernel(
        body,
        tuple(compat.result_type(like[0], shape, dtype) for shape, dtype in results),
        aliases or {},
        # Sums and maxima along rows stay within a warp, so they need no place in shared memory.
        mg.CompilerParams(lowering_semantics=mg.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0),
        grid=(PROGRAMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
    )
    return list(kernel(*like))


def leave(
    lanes: Lanes,
    parts: list[tuple[Any, Any]],
    pre: list[tuple[Any, Any]],
    first: Any,
    saved_rows: int,
    tiles: RowTiles,
) -> None:
    """Stores a tile's results, and its pre-activations where they are kept.

    Args:
      lanes: the warpgroup's.
      parts: results, see ``Lanes.leave``.
      pre: pre-activations likewise; empty if none are kept.
      first: the tile's first row.
      saved_rows: pre-activations of the first so many rows are kept.
      tiles: the tiles of rows.
    """
    if not pre:
        lanes.leave(parts)
    elif saved_rows == tiles.capacity:
        lanes.leave(parts + pre)
    else:
        lanes.leave(parts)
        pl.when(first < saved_rows)(lambda: lanes.leave(pre))


def of_rows(ref: Any) -> Any:
    """A value for each row of a warpgroup's sums."""
    return mg.load(ref, layout=mg.Layout.WGMMA.reduce(1), optimized=False)  # pyright: ignore[reportCallIssue]


def along_cols(ref: Any, shape: tuple[int, ...]) -> Any:
    """A value for each column, for all rows."""
    values = mg.load(ref, layout=mg.Layout.WGMMA.reduce(0), optimized=False)  # pyright: ignore[reportCallIssue]
    return lax.broadcast_in_dim(values, shape, (1,))
