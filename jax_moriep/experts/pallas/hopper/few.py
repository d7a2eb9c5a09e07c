"""The products of quantised experts with few rows, on Hopper GPUs: what bounds them is reading weights once.

A tile has 64 rows, the fewest of the matrix unit, whatever of them a run has; both warpgroups read all of
them and part the tile's columns. So codes go from memory to the matrix unit, where Triton would convert them
for every tile of rows on the way. Rows of a tile that are behind its run's blocks are other runs': they are
multiplied, and not stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep import schemes
from jax_moriep.experts.pallas import activation, quantise
from jax_moriep.experts.pallas.hopper import launch, scaled
from jax_moriep.experts.pallas.hopper.launch import along_cols, of_rows
from jax_moriep.experts.pallas.hopper.scaled import DEPTH, Work
from jax_moriep.experts.pallas.hopper.stream import Block, Lanes, Line
from jax_moriep.experts.pallas.hopper.support import FEW_ROWS as ROWS
from jax_moriep.experts.pallas.tiles import RowTiles
from jax_moriep.experts.spec import ExpertSpec
from jax_moriep.schemes import Quantised

_GROUP = schemes.BLOCK
"""Columns that share a scale."""


def product(rows: Quantised, weights: Quantised, tiles: RowTiles, dtype: Any) -> jax.Array:
    """See ``fp8.product``; ``tiles`` are of ``ROWS`` rows, and the rows' scales lie by tiles.

    So each tile has its own, also those of rows that two tiles have: f32[D/128, max_tiles * ROWS].
    """
    codes = rows.codes
    depth, cols = codes.shape[1], weights.codes.shape[1]
    width = _GROUP if cols % (2 * _GROUP) == 0 else _GROUP // 2
    blocks = (Block(ROWS, DEPTH, 1), Block(2 * width, DEPTH, 1), Line(ROWS))
    by_block = weights.scales.ndim == 3

    def body(
        table: Any, codes_ref: Any, rows_ref: Any, weights_ref: Any, scales_ref: Any, out_ref: Any
    ) -> None:
        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            expert, at_rows, used = _rows_of_tile(table, row_tile, tiles)
            own = pl.ds(lanes.me * width, width)
            first_col = col_tile * (2 * width)
            at_cols = pl.ds(first_col + own.start, width)

            def multiply(_: int, operands: Any, partial: Any) -> None:
                mg.wgmma(partial, operands[0], operands[1].at[own].transpose((1, 0)))

            def finish(sums: Any) -> None:
                (total,) = sums
                if not by_block:
                    total = total * along_cols(scales_ref.at[expert, at_cols], total.shape)
                lanes.leave([(total, out_ref.at[at_rows, at_cols])], used, _strip(tiles))

            return Work(
                depth // DEPTH,
                (
                    codes_ref.at[at_rows, :],
                    weights_ref.at[expert].at[pl.ds(first_col, 2 * width), :],
                    rows_ref.at[:, _in_tiles(row_tile)],
                ),
                ((ROWS, width),),
                multiply,
                lambda operands: of_rows(operands[2]),
                (lambda _, k: scales_ref[expert, lax.div(at_cols.start, _GROUP), k]) if by_block else None,
                finish,
            )

        _all_tiles(blocks, codes, table, tiles, cols // (2 * width), tile, dtype)

    shape = ((tiles.capacity, cols), dtype)
    return launch.call(body, (tiles.table, *rows, *weights), [shape])[0]


def gate_up(
    rows: Quantised, weights: Quantised, factors: jax.Array, tiles: RowTiles, spec: ExpertSpec
) -> Quantised:
    """Gate and up in one pass over the rows, the activation, and what it becomes in float8.

    Args:
      rows: float8 codes [C, H], scales f32[H/128, C], or f32[1, C] for one per row.
      weights: w1, float8 codes [L, 2*I, H], scales f32[L, 2*I/128, H/128] for blocks, or f32[L, 2*I] for one
        per row of weights; the rows' scales are of the same kind.
      factors: f32[C], what each row of activations is multiplied with; a row whose factor is 0 gives zeros,
        whatever it holds.
      tiles: of ``ROWS`` rows.
      spec: names the activation.

    Returns:
      Codes [C, I] and scales f32[I/128, max_tiles * ROWS] of the activations, the factors in the scales; see
      ``product`` for how they lie.
    """
    codes, row_scales = rows
    depth, cols = codes.shape[1], weights.codes.shape[1] // 2
    width = _GROUP // 2
    by_block = weights.scales.ndim == 3
    weight = Block(_GROUP, DEPTH, 1)
    blocks = (Block(ROWS, DEPTH, 1), weight, weight, Line(ROWS))
    if not by_block:
        # One line for every step is what the stream knows.
        row_scales = jnp.broadcast_to(row_scales, (depth // DEPTH, row_scales.shape[1]))
    # A tile may reach behind the last row, and these are read without a look at where they end.
    factors = jnp.pad(factors, (0, ROWS))

    def body(
        table: Any,
        codes_ref: Any,
        rows_ref: Any,
        weights_ref: Any,
        scales_ref: Any,
        factors_ref: Any,
        act_ref: Any,
        act_scales_ref: Any,
    ) -> None:
        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            expert, at_rows, used = _rows_of_tile(table, row_tile, tiles)
            own = pl.ds(lanes.me * width, width)
            halves = [pl.ds(n * cols + col_tile * _GROUP, _GROUP) for n in range(2)]

            def multiply(n: int, operands: Any, partial: Any) -> None:
                mg.wgmma(partial, operands[0], operands[1 + n].at[own].transpose((1, 0)))

            def finish(sums: Any) -> None:
                gate, up = sums
                if not by_block:
                    gate, up = (
                        total
                        * along_cols(scales_ref.at[expert, pl.ds(at.start + own.start, width)], total.shape)
                        for total, at in zip(sums, halves, strict=True)
                    )
                at_cols = pl.ds(halves[0].start + own.start, width)
                h = activation.value(gate, up, spec)
                largest = _of_both(lanes, jnp.max(quantise.magnitudes(h), axis=1))
                scale, inverse = quantise.power_scales(largest, codes.dtype)
                factor = of_rows(factors_ref.at[at_rows])
                real = factor != 0
                inverse = lax.broadcast_in_dim(jnp.where(real, inverse, 0.0), h.shape, (0,))
                h = quantise.scaled(h, inverse)
                lanes.leave([(h, act_ref.at[at_rows, at_cols])], used, _strip(tiles))

                @pl.when(lanes.me == 0)
                def _() -> None:
                    act_scales_ref[col_tile, _in_tiles(row_tile)] = jnp.where(real, scale * factor, 0.0)

            w = weights_ref.at[expert]
            return Work(
                depth // DEPTH,
                (codes_ref.at[at_rows, :], *(w.at[at, :] for at in halves), rows_ref.at[:, at_rows]),
                ((ROWS, width),) * 2,
                multiply,
                lambda operands: of_rows(operands[3]),
                (lambda n, k: scales_ref[expert, n * (cols // _GROUP) + col_tile, k]) if by_block else None,
                finish,
            )

        scratch = (mg.SMEM((2, ROWS), jnp.int32), mg.Barrier(num_arrivals=2))
        _all_tiles(
            blocks,
            codes,
            table,
            tiles,
            cols // _GROUP,
            tile,
            codes.dtype,
            piece_bytes=width,
            scratch=scratch,
        )

    operands = (tiles.table, codes, row_scales, *weights, factors)
    in_tiles = ((cols // _GROUP, tiles.max_tiles * ROWS), jnp.float32)
    act, scales = launch.call(body, operands, [((tiles.capacity, cols), codes.dtype), in_tiles])
    return Quantised(act, scales)


def _of_both(lanes: Lanes, largest: jax.Array) -> jax.Array:
    """The larger of what both warpgroups have for each row."""
    places, met = lanes.scratch
    places[lanes.me, :] = largest
    _meet(met)
    other = of_rows(places.at[1 - lanes.me])
    # Nobody writes the next tile's before both have read these.
    _meet(met)
    return jnp.maximum(largest, other)


def _meet(met: Any) -> None:
    mg.barrier_arrive(met)
    mg.barrier_wait(met)


def _in_tiles(row_tile: Any) -> Any:
    """Where the values of a tile's rows lie by tiles."""
    return pl.ds(pl.multiple_of(row_tile * ROWS, ROWS), ROWS)


def _strip(tiles: RowTiles) -> int:
    """Rows that are stored together: all of them are one run's."""
    return min(tiles.block, ROWS)


def _rows_of_tile(table: Any, row_tile: Any, tiles: RowTiles) -> tuple[Any, Any, Any]:
    """The expert, the rows of a tile, and how many of them are in blocks of its run."""
    tile = tiles.of_tile(table, row_tile)
    first = pl.multiple_of(tile.first, _strip(tiles))
    return tile.expert, pl.ds(first, ROWS), tile.end - first


def _all_tiles(
    blocks: tuple[Block | Line, ...],
    codes: jax.Array,
    table: Any,
    tiles: RowTiles,
    col_tiles: int,
    tile: Callable[[Lanes, Any, Any], Work],
    dtype: Any,
    **of_stream: Any,
) -> None:
    launch.all_tiles(
        blocks,
        codes.dtype,
        table,
        tiles,
        col_tiles,
        tile,
        results=(dtype,),
        multiply=scaled.multiply,
        **of_stream,
    )
