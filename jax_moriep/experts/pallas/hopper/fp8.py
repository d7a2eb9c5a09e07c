"""The products of quantised experts on Hopper GPUs, in Pallas-Mosaic: see ``products`` and ``scaled``.

Scales of rows come as [groups, C], so that those of a tile's rows lie side by side.
"""

from __future__ import annotations

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
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import RowTiles
from jax_moriep.experts.spec import ExpertSpec
from jax_moriep.schemes import Quantised

_WIDTH = schemes.BLOCK
"""Columns of a sum: those that share a scale."""
_HEIGHT = ROWS // 2
"""Rows of a warpgroup's sums."""
_PRODUCT_COPIER_REGISTERS = 32
"""With 40 the compiler spills registers of the product's loop: 1.4 times as long on an H200."""


def product(rows: Quantised, weights: Quantised, tiles: RowTiles, dtype: Any) -> jax.Array:
    """Rows times their expert's weights, undefined behind the last run.

    Args:
      rows: float8 codes [C, D], scales f32[D/128, C].
      weights: float8 codes [L, N, D], scales f32[L, N/128, D/128] for blocks, or f32[L, N] for one per row of
        weights.
      tiles: the tiles of rows.
      dtype: of the result.

    Returns:
      [C, N].
    """
    codes = rows.codes
    depth, cols = codes.shape[1], weights.codes.shape[1]
    halves = 2 if cols % (2 * _WIDTH) == 0 else 1
    blocks = (Block(ROWS, DEPTH, 1), Block(halves * _WIDTH, DEPTH, 1), Line(ROWS))
    by_block = weights.scales.ndim == 3

    def body(
        table: Any, codes_ref: Any, rows_ref: Any, weights_ref: Any, scales_ref: Any, out_ref: Any
    ) -> None:
        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            expert, at_rows = launch.rows_of_tile(table, row_tile)
            own = pl.ds(lanes.me * _HEIGHT, _HEIGHT)
            first_col = col_tile * (halves * _WIDTH)

            def multiply(n: int, operands: Any, partial: Any) -> None:
                x, w, _ = operands
                mg.wgmma(partial, x.at[own], w.at[n * _WIDTH : (n + 1) * _WIDTH].transpose((1, 0)))

            def finish(sums: Any) -> None:
                parts = []
                for n, total in enumerate(sums):
                    at_cols = pl.ds(first_col + n * _WIDTH, _WIDTH)
                    if not by_block:
                        total = total * along_cols(scales_ref.at[expert, at_cols], total.shape)
                    parts.append((total, out_ref.at[at_rows, at_cols].at[own]))
                lanes.leave(parts)

            return Work(
                depth // DEPTH,
                (
                    codes_ref.at[at_rows, :],
                    weights_ref.at[expert].at[pl.ds(first_col, halves * _WIDTH), :],
                    rows_ref.at[:, at_rows],
                ),
                ((_HEIGHT, _WIDTH),) * halves,
                multiply,
                lambda operands: of_rows(operands[2].at[own]),
                (lambda n, k: scales_ref[expert, col_tile * halves + n, k]) if by_block else None,
                finish,
            )

        launch.all_tiles(
            blocks,
            codes.dtype,
            table,
            tiles,
            cols // (halves * _WIDTH),
            tile,
            results=(dtype,),
            multiply=scaled.multiply,
            copier_registers=_PRODUCT_COPIER_REGISTERS,
        )

    shape = ((tiles.capacity, cols), dtype)
    return launch.call(body, (tiles.table, *rows, *weights), [shape])[0]


def gate_up(
    rows: Quantised,
    weights: Quantised,
    factors: jax.Array,
    tiles: RowTiles,
    spec: ExpertSpec,
    *,
    saved_rows: int,
    dtype: Any,
) -> list[jax.Array]:
    """Gate and up in one pass over the rows, the activation, and what it becomes in float8.

    Args:
      rows: float8 codes [C, H], scales f32[H/128, C], or f32[1, C] for one per row.
      weights: w1, float8 codes [L, 2*I, H], scales f32[L, 2*I/128, H/128] for blocks, or f32[L, 2*I] for one
        per row of weights; the rows' scales are of the same kind.
      factors: f32[C], what each row of activations is multiplied with; a row whose factor is 0 gives zeros,
        whatever it holds.
      tiles: the tiles of rows.
      spec: names the activation.
      saved_rows: write the pre-activations of the first so many rows, a multiple of ``ROWS``.
      dtype: of the pre-activations.

    Returns:
      Codes [C, I] and scales f32[I/128, C] of the activations, the factors in the scales, and the
      pre-activations [saved_rows, 2*I] if there are any.
    """
    codes = rows.codes
    depth, cols = codes.shape[1], weights.codes.shape[1] // 2
    by_block = weights.scales.ndim == 3
    weight = Block(_WIDTH, DEPTH, 1)
    blocks = (Block(ROWS, DEPTH, 1), weight, weight, *([Line(ROWS)] if by_block else []))

    def body(
        table: Any,
        codes_ref: Any,
        rows_ref: Any,
        weights_ref: Any,
        scales_ref: Any,
        factors_ref: Any,
        act_ref: Any,
        act_scales_ref: Any,
        *kept_ref: Any,
    ) -> None:
        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            expert, at_rows = launch.rows_of_tile(table, row_tile)
            first, own = at_rows.start, pl.ds(lanes.me * _HEIGHT, _HEIGHT)
            mine = pl.ds(first + lanes.me * _HEIGHT, _HEIGHT)
            at_cols = [pl.ds(n * cols + col_tile * _WIDTH, _WIDTH) for n in range(2)]

            def multiply(n: int, operands: Any, partial: Any) -> None:
                mg.wgmma(partial, operands[0].at[own], operands[1 + n].transpose((1, 0)))

            def finish(sums: Any) -> None:
                gate, up = sums
                if not by_block:
                    of_row = lax.broadcast_in_dim(of_rows(rows_ref.at[0, mine]), gate.shape, (0,))
                    gate, up = (
                        total * of_row * along_cols(scales_ref.at[expert, at], total.shape)
                        for total, at in zip(sums, at_cols, strict=True)
                    )
                factor = of_rows(factors_ref.at[mine])
                h, act_scales_ref[col_tile, mine] = _coded(gate, up, factor, spec, codes.dtype)
                parts = [(h, act_ref.at[at_rows, at_cols[0]].at[own])]
                pre = []
                if saved_rows:
                    kept = kept_ref[0].at[at_rows]
                    pre = [(x, kept.at[:, at].at[own]) for x, at in zip((gate, up), at_cols, strict=True)]
                launch.leave(lanes, parts, pre, first, saved_rows, tiles)

            w = weights_ref.at[expert]
            sources = (codes_ref.at[at_rows, :], *(w.at[at, :] for at in at_cols))
            return Work(
                depth // DEPTH,
                (*sources, rows_ref.at[:, at_rows]) if by_block else sources,
                ((_HEIGHT, _WIDTH),) * 2,
                multiply,
                (lambda operands: of_rows(operands[3].at[own])) if by_block else None,
                (lambda n, k: scales_ref[expert, n * (cols // _WIDTH) + col_tile, k]) if by_block else None,
                finish,
            )

        results = (codes.dtype, *([dtype] if saved_rows else []))
        launch.all_tiles(
            blocks,
            codes.dtype,
            table,
            tiles,
            cols // _WIDTH,
            tile,
            results=results,
            multiply=scaled.multiply,
        )

    shapes = [((tiles.capacity, cols), codes.dtype), ((cols // _WIDTH, tiles.capacity), jnp.float32)]
    if saved_rows:
        shapes.append(((saved_rows, 2 * cols), dtype))
    return launch.call(body, (tiles.table, *rows, *weights, factors), shapes)


def _coded(
    gate: jax.Array, up: jax.Array, factor: jax.Array, spec: ExpertSpec, format: Any
) -> tuple[jax.Array, jax.Array]:
    """Activations as what float8 holds, and the scales of their rows, times the rows' factors."""
    h = activation.value(gate, up, spec)
    scale, inverse = quantise.power_scales(jnp.max(quantise.magnitudes(h), axis=1), format)
    used = factor != 0
    inverse = lax.broadcast_in_dim(jnp.where(used, inverse, 0.0), h.shape, (0,))
    h = quantise.scaled(h, inverse)
    return h, jnp.where(used, scale * factor, 0.0)
