"""Which rows each tile of a kernel covers: computed on the device from ``group_sizes``, read by the kernels.

A run is cut into tiles of ``size`` rows from its own first row on, so that a tile never has two experts,
whatever ``block`` is. The table is short, has a static length and costs the host nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.plan import run_starts

GROUP = 16
"""The most tiles of rows that take their turn at one tile of columns before the next.

With tiles of 128 rows and 256 columns, 132 programs then read the least: as many rows as columns at a time.
"""

# The table's lines: in the column of a tile those of ``OfTile``, in the last column those of ``OfCall``.
_EXPERT, _FIRST, _STOP, _END, _GROUP_FIRST, _GROUP_END = range(6)
_NUM_TILES, _USED_ROWS, _FIRST_TILE = range(3)


@dataclasses.dataclass(frozen=True)
class OfTile:
    """What the table says of one tile, inside a kernel; each attribute is read where it is asked for.

    Attributes:
      table: the reference to ``RowTiles.table``.
      tile: which tile.
    """

    table: Any
    tile: Any

    @property
    def expert(self) -> Any:
        """Whose rows they are."""
        return self.table[_EXPERT, self.tile]

    @property
    def first(self) -> Any:
        """The tile's first row."""
        return self.table[_FIRST, self.tile]

    @property
    def stop(self) -> Any:
        """The end of its run's real rows."""
        return self.table[_STOP, self.tile]

    @property
    def end(self) -> Any:
        """The end of its run's blocks."""
        return self.table[_END, self.tile]

    @property
    def group_first(self) -> Any:
        """The first tile of its group."""
        return self.table[_GROUP_FIRST, self.tile]

    @property
    def group_end(self) -> Any:
        """The first tile of the next group."""
        return self.table[_GROUP_END, self.tile]


@dataclasses.dataclass(frozen=True)
class OfCall:
    """What the table says of all tiles together, inside a kernel; read as in ``OfTile``.

    Attributes:
      table: the reference to ``RowTiles.table``.
      last: its last column.
    """

    table: Any
    last: int

    @property
    def num_tiles(self) -> Any:
        """How many tiles are in use."""
        return self.table[_NUM_TILES, self.last]

    @property
    def used_rows(self) -> Any:
        """The end of the last run's blocks."""
        return self.table[_USED_ROWS, self.last]

    @property
    def first_tile(self) -> Any:
        """The first tile to do."""
        return self.table[_FIRST_TILE, self.last]


@dataclasses.dataclass(frozen=True)
class RowTiles:
    """The tiles of one call.

    Attributes:
      table: i32[6, max_tiles + 1]; kernels read it through ``of_tile`` and ``of_call``.
      size: rows per tile, a power of two.
      max_tiles: the most tiles that any ``group_sizes`` can need.
      capacity: C.
      block: every run starts at a multiple of it and is as long as some of them.
      overrun: whether a tile can reach behind its run's blocks, into another run or behind row C.
    """

    table: jax.Array
    size: int
    max_tiles: int
    capacity: int
    block: int
    overrun: bool

    def of_tile(self, table: Any, tile: Any) -> OfTile:
        """What the table, inside a kernel, says of a tile."""
        return OfTile(table, tile)

    def of_call(self, table: Any) -> OfCall:
        """What the table, inside a kernel, says of all tiles together."""
        return OfCall(table, self.max_tiles)


def row_tiles(
    group_sizes: jax.Array,
    block: int,
    capacity: int,
    size: int,
    first_row: int | jax.Array = 0,
    group: int = GROUP,
    first_expert: jax.Array | None = None,
) -> RowTiles:
    """Cuts every run into tiles, and the tiles of a run into groups of equal size.

    A group is one expert's alone: for one of several experts, the weights of all would be read at a time.

    Args:
      group_sizes: i32[L].
      block: every run starts at a multiple of it.
      capacity: C.
      size: rows per tile.
      first_row: tiles that end at or before this row are left out.
      group: the most tiles of a group.
      first_expert: i32[], what the table adds to each expert (``ExpertWeights.first``).

    Returns:
      The tiles, sorted by row.
    """
    starts = run_starts(group_sizes, block)
    aligned = (group_sizes + block - 1) // block * block
    counts = (aligned + size - 1) // size
    ends = jnp.cumsum(counts)
    most = capacity // size + (0 if block % size == 0 else min(group_sizes.size, capacity // block))
    most = max(1, most)
    tile = jnp.arange(most, dtype=jnp.int32)
    # A comparison with every end: one small fused kernel, where a search would be a loop of several.
    expert = jnp.sum(tile[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    expert = jnp.minimum(expert, group_sizes.size - 1)
    first_of_run, count = (ends - counts)[expert], counts[expert]
    in_run = tile - first_of_run
    first = starts[expert] + in_run * size
    num_groups = jnp.maximum(1, (count + group - 1) // group)
    # Group n of a run begins at its tile count * n // num_groups, so this is the group of tile in_run.
    in_group = ((in_run + 1) * num_groups - 1) // jnp.maximum(1, count)
    lines = (
        expert if first_expert is None else expert + first_expert,
        first,
        (starts + group_sizes)[expert],
        (starts + aligned)[expert],
        first_of_run + count * in_group // num_groups,
        first_of_run + count * (in_group + 1) // num_groups,
    )
    # From the runs, which are few: a sum over the tiles is done by one thread, for longer than a product.
    left_out = jnp.sum(jnp.clip((first_row - starts) // size, 0, counts), dtype=jnp.int32)
    last = jnp.stack([ends[-1], (starts + aligned)[-1], left_out, *[jnp.zeros_like(left_out)] * 3])
    table = jnp.concatenate([jnp.stack(lines), last[:, None]], axis=1).astype(jnp.int32)
    return RowTiles(table, size, most, capacity, block, block % size != 0)


def position_in_runs(table: Any, turn: Any, first_tile: Any, col_tiles: int) -> tuple[Any, Any]:
    """(tile of rows, tile of columns) of a turn, inside a kernel: by the table's groups, each of one run.

    A group has the turns that its tiles would have if each took all its columns at once, so the group of a
    turn is that of the tile that would be there.

    Args:
      table: the reference to ``RowTiles.table``.
      turn: from 0 to the number of tiles in use times ``col_tiles``.
      first_tile: the first tile to do.
      col_tiles: tiles of columns.
    """
    there = first_tile + lax.div(turn, jnp.int32(col_tiles))
    group_first = jnp.maximum(OfTile(table, there).group_first, first_tile)
    height = OfTile(table, there).group_end - group_first
    in_group = turn - (group_first - first_tile) * col_tiles
    return group_first + lax.rem(in_group, height), lax.div(in_group, height)


def position_in_grid(turn: Any, row_tiles: Any, col_tiles: int, group: int) -> tuple[Any, Any]:
    """(tile of rows, tile of columns) of a turn in a grid of both, which has no table.

    Groups are of ``group`` tiles of rows, the last one of those that are left.

    Args:
      turn: from 0 to ``row_tiles * col_tiles``.
      row_tiles: tiles of rows.
      col_tiles: tiles of columns.
      group: how many tiles of rows take their turn at one tile of columns before the next.
    """
    per_group = jnp.int32(group * col_tiles)
    in_group = lax.rem(turn, per_group)
    first = lax.div(turn, per_group) * group
    height = jnp.minimum(row_tiles - first, group)
    return first + lax.rem(in_group, height), lax.div(in_group, height)


def real_rows(group_sizes: jax.Array, block: int, capacity: int) -> jax.Array:
    """bool[C]: whether a row is in a run."""
    starts = run_starts(group_sizes, block)
    row = jnp.arange(capacity, dtype=jnp.int32)[:, None]
    return jnp.any((row >= starts) & (row < starts + group_sizes), axis=1)
