"""What goes beside the Hopper products, whose epilogues are few: passes over rows, bound by memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.experts.pallas import activation, quantise
from jax_moriep.experts.pallas.launch import (
    PASS_PROGRAMS,
    Span,
    Tile,
    by_turns,
    call,
    load,
    load_vector,
    power_of_two,
    span,
    store,
    store_vector,
)
from jax_moriep.experts.pallas.tiles import RowTiles
from jax_moriep.experts.spec import ExpertSpec

SLICE = quantise.SLICE
"""Rows per program: those of the tiles that the functions here take."""
_COLS = 128
# Each thread holds 16 values of each operand. It came with the H100's table, in place of 256 columns; the
# measurement is not recorded.
_TILE = Tile(SLICE, _COLS, SLICE, warps=8, stages=1)


def activation_gradient(
    d_act: jax.Array,
    pre: tuple[jax.Array, ...],
    row_weights: jax.Array,
    tiles: RowTiles,
    spec: ExpertSpec,
    *,
    saved_rows: int,
    read_as: Any = None,
    gradient_codes: Any = None,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """The way back through the row weight and the activation.

    Args:
      d_act: [C, I], the cotangent of the weighted activations, anything in padding rows.
      pre: the pre-activations that were kept, and those computed again if not all were; see
        ``pre_activations``.
      row_weights: f32[C].
      tiles: tiles of ``SLICE`` rows.
      spec: names the activation.
      saved_rows: how many rows were kept.
      read_as: of what dtype the codes were of which the second product read the activations; None: none.
      gradient_codes: a float8 in which the cotangent of the pre-activations is wanted too, or None; then 128
        divides I.
      interpret: see ``launch.call``.

    Returns:
      The weighted activations [C, I], the cotangent of the pre-activations [C, 2*I], both zero in the padding
      of runs, and shares of that of the row weights, f32[n, C], to be summed; with ``gradient_codes`` also
      codes [C, 2*I] and their scales f32[2*I/128, C].
    """
    capacity, inner = d_act.shape
    cols = min(_COLS, power_of_two(inner))
    col_tiles, last = -(-inner // cols), tiles.max_tiles

    def kernel(table_ref: Any, d_act_ref: Any, weights_ref: Any, *refs: Any) -> None:
        pre_refs, (act_ref, d_pre_ref, shares_ref, *coded_refs) = refs[: len(pre)], refs[len(pre) :]

        def one(turn: Any) -> None:
            row_tile, col_tile = lax.div(turn, col_tiles), lax.rem(turn, col_tiles)
            tile = tiles.of_tile(table_ref, row_tile)
            first = tile.first
            real, own = Span(first, SLICE, tile.stop), Span(first, SLICE, tile.end)
            at_cols = span(col_tile * cols, cols, inner)
            d = load(d_act_ref, real, at_cols).astype(jnp.float32)
            gate, up = pre_activations(pre_refs, real, at_cols, inner, saved_rows)
            act, by_gate, by_up = activation.with_derivatives(gate, up, spec)
            # Every load gives zeros in padding, so zeros are what is stored there.
            weight = load_vector(weights_ref, real)[:, None]
            read = act
            if read_as is not None:
                codes, scale = quantise.coded_groups(act, read_as)
                read = codes * scale
            store_vector(shares_ref, real, jnp.sum(d * read, axis=1), col_tile)
            d = d * weight
            store(act_ref, own, at_cols, act * weight)
            for half, by in enumerate((by_gate, by_up)):
                at_half = second(at_cols, inner) if half else at_cols
                store(d_pre_ref, own, at_half, d * by)
                if coded_refs:
                    codes_ref, scales_ref = coded_refs
                    group = half * col_tiles + col_tile
                    quantise.store_rows(codes_ref, scales_ref, own, at_half, d * by, group)

        by_turns(programs, tiles.of_call(table_ref).num_tiles * col_tiles, one)

    programs = min(PASS_PROGRAMS, last * col_tiles)
    results = [
        ((capacity, inner), d_act.dtype),
        ((capacity, 2 * inner), d_act.dtype),
        ((col_tiles, capacity), jnp.float32),
    ]
    if gradient_codes is not None:
        results += [
            ((capacity, 2 * inner), gradient_codes),
            ((2 * col_tiles, capacity), jnp.float32),
        ]
    operands = (tiles.table, d_act, row_weights, *pre)
    return tuple(call(kernel, "moriep_act_grad", operands, results, programs, _TILE, interpret))


def zeroed_behind(rows: jax.Array, tiles: RowTiles, *, interpret: bool) -> jax.Array:
    """``rows`` [C, N] with zeros behind the last run, in the same memory."""
    capacity, width = rows.shape
    cols = min(_COLS, power_of_two(width))
    col_tiles = -(-width // cols)

    def kernel(table_ref: Any, _: Any, out_ref: Any) -> None:
        used = tiles.of_call(table_ref).used_rows
        zeros = jnp.zeros((SLICE, cols), out_ref.dtype)

        def one(turn: Any) -> None:
            row_tile, col_tile = lax.div(turn, col_tiles), lax.rem(turn, col_tiles)
            behind = Span(used + row_tile * SLICE, SLICE, capacity)
            store(out_ref, behind, span(col_tile * cols, cols, width), zeros)

        by_turns(programs, lax.div(capacity - used + (SLICE - 1), SLICE) * col_tiles, one)

    programs = min(PASS_PROGRAMS, -(-capacity // SLICE) * col_tiles)
    results = [(rows.shape, rows.dtype)]
    operands = (tiles.table, rows)
    return call(kernel, "moriep_zero", operands, results, programs, _TILE, interpret, aliases={1: 0})[0]


def pre_activations(
    refs: tuple[Any, ...], real: Span, cols: Span, inner: int, saved_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Gate and up in f32, from those kept or those computed again: every row is read from one place."""
    gate_and_up = []
    for at_cols in (cols, second(cols, inner)):
        if len(refs) == 1:
            values = load(refs[0], real, at_cols)
        else:
            row = real.first + jnp.arange(real.size)
            kept = Span(real.first, real.size, jnp.minimum(real.stop, saved_rows))
            again = load(refs[1], real, at_cols)
            values = jnp.where((row < saved_rows)[:, None], load(refs[0], kept, at_cols), again)
        gate_and_up.append(values.astype(jnp.float32))
    gate, up = gate_and_up
    return gate, up


def second(cols: Span, inner: int) -> Span:
    """The up columns that belong to gate columns."""
    return Span(cols.first + inner, cols.size, None if cols.stop is None else cols.stop + inner)
