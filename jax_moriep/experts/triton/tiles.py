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
from jax.experimental import pallas as pl

from jax_moriep.experts.triton.launch import Span, Tile, call, store_vector
from jax_moriep.plan import run_starts

EXPERT, FIRST, STOP, END = range(4)
"""Lines of the table: the expert, the tile's first row, the end of its run's real rows and of its blocks."""
NUM_TILES, USED_ROWS, FIRST_TILE = range(3)
"""Lines of the table's last column: tiles in use, the end of the last run's blocks, the first tile to do."""

_LANES = 128
_TILE = Tile(_LANES, _LANES, _LANES, warps=4, stages=1)


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
    group_sizes: jax.Array, block: int, capacity: int, size: int, first_row: int = 0, *, interpret: bool
) -> RowTiles:
    """Cuts every run into tiles, in one small kernel, where XLA would launch a dozen.

    Args:
      group_sizes: i32[L].
      block: every run starts at a multiple of it.
      capacity: C.
      size: rows per tile.
      first_row: tiles that end at or before this row are left out.
      interpret: see ``launch.call``.

    Returns:
      The tiles, sorted by row.
    """
    num_experts = group_sizes.size
    most = capacity // size + (0 if block % size == 0 else min(num_experts, capacity // block))
    most = max(1, most)

    def kernel(sizes_ref: Any, table_ref: Any) -> None:
        tile = pl.program_id(0) * _LANES + jnp.arange(_LANES, dtype=jnp.int32)
        nothing = jnp.zeros_like(tile)

        def expert(e: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            start, begin, left_out, lines = carry
            real = sizes_ref[e]
            aligned = lax.div(real + (block - 1), jnp.int32(block)) * block
            count = lax.div(aligned + (size - 1), jnp.int32(size))
            mine = (tile >= begin) & (tile < begin + count)
            of_mine = (e, start + (tile - begin) * size, start + real, start + aligned)
            lines = tuple(jnp.where(mine, new, old) for new, old in zip(of_mine, lines, strict=True))
            # How many of its tiles end at or before first_row: whole ones, but the last may be cut short.
            before = jnp.minimum(count, lax.div(jnp.maximum(first_row - start, 0), jnp.int32(size)))
            return start + aligned, begin + count, left_out + before, lines

        zero = jnp.int32(0)
        init = (zero, zero, zero, (nothing,) * 4)
        used, num_tiles, left_out, lines = lax.fori_loop(0, num_experts, expert, init)
        is_last = tile == most
        for line, (values, last) in enumerate(zip(lines, (num_tiles, used, left_out, zero), strict=True)):
            values = jnp.where(is_last, last, values)
            store_vector(
                table_ref, Span(pl.program_id(0) * _LANES, _LANES, most + 1), values, jnp.int32(line)
            )

    results = [((4, most + 1), jnp.int32)]
    programs = -(-(most + 1) // _LANES)
    table = call(kernel, "moriep_tiles", (group_sizes,), results, programs, _TILE, interpret)[0]
    return RowTiles(table, size, most, capacity, block % size != 0)


def real_rows(group_sizes: jax.Array, block: int, capacity: int) -> jax.Array:
    """bool[C]: whether a row is in a run."""
    starts = run_starts(group_sizes, block)
    row = jnp.arange(capacity, dtype=jnp.int32)[:, None]
    return jnp.any((row >= starts) & (row < starts + group_sizes), axis=1)
