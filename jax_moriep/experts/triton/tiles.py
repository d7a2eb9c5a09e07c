"""Which rows each tile of a kernel covers: computed on the device from ``group_sizes``, read by the kernels.

A run is cut into tiles of ``size`` rows from its own first row on, so that a tile never has two experts,
whatever ``block`` is. The table is short, has a static length and costs the host nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_moriep.plan import run_starts

EXPERT, FIRST, STOP, END = range(4)
"""Lines of the table: the expert, the tile's first row, the end of its run's real rows and of its blocks."""
NUM_TILES, USED_ROWS, FIRST_TILE = range(3)
"""Lines of the table's last column: tiles in use, the end of the last run's blocks, the first tile to do."""


@dataclasses.dataclass(frozen=True)
class RowTiles:
    """The tiles of one call.

    Attributes:
      table: i32[4, max_tiles + 1].
      size: rows per tile, a power of two.
      max_tiles: the most tiles that any ``group_sizes`` can need.
      capacity: C.
      overrun: whether a tile can reach behind its run's blocks, into another run or behind row C.
    """

    table: jax.Array
    size: int
    max_tiles: int
    capacity: int
    overrun: bool


def row_tiles(
    group_sizes: jax.Array, block: int, capacity: int, size: int, first_row: int | jax.Array = 0
) -> RowTiles:
    """Cuts every run into tiles.

    Args:
      group_sizes: i32[L].
      block: every run starts at a multiple of it.
      capacity: C.
      size: rows per tile.
      first_row: tiles that end at or before this row are left out.

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
    first = starts[expert] + (tile - (ends - counts)[expert]) * size
    lines = (expert, first, (starts + group_sizes)[expert], (starts + aligned)[expert])
    left_out = jnp.sum((first + size <= first_row) & (tile < ends[-1]), dtype=jnp.int32)
    last = jnp.stack([ends[-1], (starts + aligned)[-1], left_out, jnp.zeros_like(left_out)])
    table = jnp.concatenate([jnp.stack(lines), last[:, None]], axis=1).astype(jnp.int32)
    return RowTiles(table, size, most, capacity, block % size != 0)


def real_rows(group_sizes: jax.Array, block: int, capacity: int) -> jax.Array:
    """bool[C]: whether a row is in a run."""
    starts = run_starts(group_sizes, block)
    row = jnp.arange(capacity, dtype=jnp.int32)[:, None]
    return jnp.any((row >= starts) & (row < starts + group_sizes), axis=1)
