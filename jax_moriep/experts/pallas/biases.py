"""What only experts with biases need: sums of rows for db1 and db2, and the bias's share of d(row weight)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.experts.pallas.launch import (
    Span,
    Tile,
    by_turns,
    call,
    load,
    load_vector,
    power_of_two,
    span,
    store_vector,
)
from jax_moriep.experts.pallas.tiles import RowTiles

# Two stages of 32 x 128 values fit every GPU's local memory, in f32 too. Not tuned: these sums are bound by
# reading their operand once.
BIAS_ROWS, _COLS = 32, 128
_TILE = Tile(BIAS_ROWS, _COLS, BIAS_ROWS, warps=4, stages=2)


def row_sums(
    values: jax.Array,
    scale: jax.Array | None,
    starts: jax.Array,
    group_sizes: jax.Array,
    dtype: Any,
    *,
    interpret: bool,
) -> jax.Array:
    """The sum over each expert's rows of ``scale[row] * values[row]``, in f32.

    Args:
      values: [C, N].
      scale: f32[C], or None for ones.
      starts: i32[L], the first row of every run.
      group_sizes: i32[L].
      dtype: of the result.
      interpret: see ``launch.call``.

    Returns:
      [L, N].
    """
    num_experts, width = group_sizes.size, values.shape[1]
    cols = min(_COLS, power_of_two(width))
    col_tiles = -(-width // cols)

    def kernel(starts_ref: Any, sizes_ref: Any, values_ref: Any, *refs: Any) -> None:
        def one(turn: Any) -> None:
            expert, wide = lax.div(turn, col_tiles), span(lax.rem(turn, col_tiles) * cols, cols, width)
            start, size = starts_ref[expert], sizes_ref[expert]

            def step(k: Any, total: jax.Array) -> jax.Array:
                deep = Span(start + k * BIAS_ROWS, BIAS_ROWS, start + size)
                part = load(values_ref, deep, wide).astype(jnp.float32)
                if scale is not None:
                    part = part * load_vector(refs[0], deep)[:, None]
                return total + jnp.sum(part, axis=0)

            steps = lax.div(size + (BIAS_ROWS - 1), BIAS_ROWS)
            total = lax.fori_loop(0, steps, step, jnp.zeros((cols,), jnp.float32))
            store_vector(refs[-1], wide, total, expert)

        by_turns(work, work, one)

    work = num_experts * col_tiles
    operands = (starts, group_sizes, values, *(() if scale is None else (scale,)))
    results = [((num_experts, width), dtype)]
    return call(kernel, "moriep_row_sums", operands, results, work, _TILE, interpret)[0]


def rows_times_bias(rows: jax.Array, bias: jax.Array, tiles: RowTiles, *, interpret: bool) -> jax.Array:
    """``<rows[r], bias[expert of r]>`` for every row r.

    Args:
      rows: [C, N].
      bias: [L, N].
      tiles: the tiles of rows.
      interpret: see ``launch.call``.

    Returns:
      f32[C], undefined in rows that are in no run.
    """
    capacity, width = rows.shape
    cols = min(_COLS, power_of_two(width))
    last = tiles.max_tiles

    def kernel(table_ref: Any, rows_ref: Any, bias_ref: Any, out_ref: Any) -> None:
        def one(turn: Any) -> None:
            tile = tiles.of_tile(table_ref, turn)
            expert, real = tile.expert, Span(tile.first, tiles.size, tile.stop)

            def step(k: Any, total: jax.Array) -> jax.Array:
                wide = span(k * cols, cols, width)
                part = load(rows_ref, real, wide).astype(jnp.float32)
                return total + jnp.sum(part * load_vector(bias_ref, wide, expert)[None, :], axis=1)

            zeros = jnp.zeros((tiles.size,), jnp.float32)
            store_vector(out_ref, real, lax.fori_loop(0, -(-width // cols), step, zeros))

        by_turns(last, tiles.of_call(table_ref).num_tiles, one)

    operands, results = (tiles.table, rows, bias), [((capacity,), jnp.float32)]
    return call(kernel, "moriep_rows_times_bias", operands, results, last, _TILE, interpret)[0]
