"""The forward and the backward pass: which products run, and what their epilogues do.

=========  ====================================  =========================================================
kernel     product                               epilogue
=========  ====================================  =========================================================
gate_up    rows x w1, gate and up together       bias, activation; keeps pre-activations for the way back
down       activations x w2                      bias, row weight; zeros in padding and behind the runs
d_act      d_out x w2                            derivatives of the activation, d(row weight)
d_rows     d(pre-activations) x w1               zeros as in down; with ``weight_input`` the row weight
dw1, dw2   an expert's rows, transposed, x rows  none
=========  ====================================  =========================================================
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.experts.pallas import activation
from jax_moriep.experts.pallas.biases import BIAS_ROWS, row_sums, rows_times_bias
from jax_moriep.experts.pallas.launch import (
    Span,
    Tile,
    barrier,
    in_slices,
    load,
    load_vector,
    store,
    store_vector,
)
from jax_moriep.experts.pallas.rowwise import pre_activations, second
from jax_moriep.experts.pallas.tiles import RowTiles, real_rows, row_tiles
from jax_moriep.experts.pallas.triton.products import (
    At,
    Epilogue,
    Product,
    Scales,
    rows_times_weights,
    weight_gradient,
)
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights, Operands
from jax_moriep.plan import run_starts

Tiles = Callable[[str], Tile]
"""The tile of each kernel, by its name above."""

_SLICE = 32
"""Rows at a time in the epilogue of d_act: with whole tiles registers spill (seen on an H100)."""


def forward(
    spec: ExpertSpec, tile_of: Tiles, saved_rows: int, interpret: bool, operands: Operands
) -> tuple[jax.Array, ...]:
    """The forward pass.

    Args:
      spec: the static side.
      tile_of: how each kernel is cut.
      saved_rows: keep the pre-activations of the first so many rows.
      interpret: see ``launch.call``.
      operands: see ``Operands``; the experts may be those of a stack (``ExpertWeights.first``).

    Returns:
      The result [C, H], and with ``saved_rows`` the pre-activations [saved_rows, 2*I], undefined outside
      runs.
    """
    act, *saved = gate_up(spec, tile_of("gate_up"), interpret, operands, saved_rows=saved_rows)
    return (down(spec, tile_of("down"), interpret, act, operands), *saved)


def down(
    spec: ExpertSpec,
    tile: Tile,
    interpret: bool,
    act: jax.Array,
    operands: Operands,
    scales: Scales | None = None,
) -> jax.Array:
    """The result [C, H] from activations [C, I]; ``scales`` if these and w2 are codes."""
    rows, row_weights, group_sizes, weights = operands
    capacity, hidden = rows.shape
    b2 = weights.b2

    def epilogue(at: At, sums: tuple[jax.Array], weights_ref: Any, *refs: Any) -> None:
        (y,) = sums
        if b2 is not None:
            y = y + load_vector(refs[0], at.cols, at.expert)[None, :]
        if not spec.weight_input:
            y = y * load_vector(weights_ref, at.real)[:, None]
        store(refs[-1], at.own, at.cols, at.masked(y))

    return rows_times_weights(
        Product(act, weights.w2, scales=scales),
        _tiles(spec, tile, group_sizes, capacity, weights),
        tile,
        Epilogue(epilogue, (row_weights, *_given(b2)), [((capacity, hidden), rows.dtype)], zeroed=True),
        name="moriep_down",
        interpret=interpret,
    )[0]


def gate_up(
    spec: ExpertSpec,
    tile: Tile,
    interpret: bool,
    operands: Operands,
    *,
    saved_rows: int = 0,
    recomputed_from: int | None = None,
    scales: Scales | None = None,
    dtype: Any = None,
) -> list[jax.Array]:
    """Activations [C, I] and the first rows' pre-activations; or only those from a row on, [C, 2*I].

    With ``scales`` rows and w1 are codes, pre-activations are of ``dtype``, and activations are f32, because
    they will be quantised.
    """
    rows, row_weights, group_sizes, weights = operands
    capacity, inner, b1 = rows.shape[0], weights.w2.shape[2], weights.b1
    again = recomputed_from is not None

    def epilogue(at: At, sums: tuple[jax.Array, jax.Array], weights_ref: Any, *refs: Any) -> None:
        gate, up = sums
        if spec.weight_input:
            weight = load_vector(weights_ref, at.real)[:, None]
            gate, up = gate * weight, up * weight
        if b1 is not None:
            gate = gate + load_vector(refs[0], at.cols, at.expert)[None, :]
            up = up + load_vector(refs[0], second(at.cols, inner), at.expert)[None, :]
        if not again:
            store(refs[len(_given(b1))], at.real, at.cols, activation.value(gate, up, spec))
        if saved_rows or again:
            kept = at.real
            if 0 < saved_rows < capacity:
                kept = Span(kept.first, kept.size, jnp.minimum(kept.stop, saved_rows))
            store(refs[-1], kept, at.cols, gate)
            store(refs[-1], kept, second(at.cols, inner), up)

    results = [] if again else [((capacity, inner), jnp.float32 if scales else rows.dtype)]
    if saved_rows or again:
        results.append(((capacity if again else saved_rows, 2 * inner), dtype or rows.dtype))
    return rows_times_weights(
        Product(rows, weights.w1, paired=True, scales=scales),
        _tiles(spec, tile, group_sizes, capacity, weights, recomputed_from or 0),
        tile,
        Epilogue(epilogue, (row_weights, *_given(b1)), results),
        name="moriep_gate_up",
        interpret=interpret,
    )


def backward(
    spec: ExpertSpec,
    tile_of: Tiles,
    saved_rows: int,
    interpret: bool,
    d_out: jax.Array,
    saved: jax.Array,
    operands: Operands,
) -> tuple[jax.Array, ...]:
    """The backward pass.

    Args:
      spec: the static side.
      tile_of: how each kernel is cut.
      saved_rows: how many rows' pre-activations ``saved`` holds; those of the others are computed again.
      interpret: see ``launch.call``.
      d_out: [C, H], the cotangent of the result.
      saved: what ``forward`` kept.
      operands: as in ``forward``.

    Returns:
      The cotangents of rows, row weights, w1, w2, and of the biases that are given.
    """
    rows, row_weights, group_sizes, weights = operands
    capacity, b1, b2 = rows.shape[0], weights.b1, weights.b2
    starts = run_starts(group_sizes, spec.block)
    pre = (saved,)
    if saved_rows < capacity:
        pre += tuple(gate_up(spec, tile_of("gate_up"), interpret, operands, recomputed_from=saved_rows))
    act, *d_pre, shares = d_activations(spec, tile_of("d_act"), saved_rows, interpret, d_out, pre, operands)
    d_x, *input_shares = d_rows(spec, tile_of("d_rows"), interpret, d_pre[0], operands)
    gradient = functools.partial(weight_gradient, starts=starts, group_sizes=group_sizes, interpret=interpret)
    # The last one carries the row's weight: with weight_input it is the input's factor, not d_pre's own.
    dw1 = gradient(d_pre[-1], rows, dtype=weights.w1.dtype, tile=tile_of("dw1"), name="moriep_dw1")
    dw2 = gradient(d_out, act, dtype=weights.w2.dtype, tile=tile_of("dw2"), name="moriep_dw2")

    d_weight = jnp.sum(input_shares[0] if spec.weight_input else shares, axis=0)
    d_biases = ()
    if b1 is not None and b2 is not None:
        scale = None if spec.weight_input else row_weights
        d_biases = (
            row_sums(d_pre[0], None, starts, group_sizes, b1.dtype, interpret=interpret),
            row_sums(d_out, scale, starts, group_sizes, b2.dtype, interpret=interpret),
        )
        if not spec.weight_input:
            few = row_tiles(group_sizes, spec.block, capacity, BIAS_ROWS, first_expert=weights.first)
            d_weight += rows_times_bias(d_out, b2, few, interpret=interpret)
    d_weight = jnp.where(real_rows(group_sizes, spec.block, capacity), d_weight, 0)
    return d_x, d_weight, dw1, dw2, *d_biases


def d_rows(
    spec: ExpertSpec, tile: Tile, interpret: bool, d_pre: jax.Array, operands: Operands
) -> list[jax.Array]:
    """The cotangent of rows, and with ``weight_input`` shares of that of the row weights, f32[n, C]."""
    rows, row_weights, group_sizes, weights = operands
    capacity, hidden = rows.shape

    def epilogue(at: At, sums: tuple[jax.Array], *refs: Any) -> None:
        (d_row,) = sums
        if spec.weight_input:
            weights_ref, rows_ref, out_ref, shares_ref = refs
            row = load(rows_ref, at.real, at.cols).astype(jnp.float32)
            store_vector(shares_ref, at.real, jnp.sum(at.masked(d_row) * row, axis=1), at.col_tile)
            d_row = d_row * load_vector(weights_ref, at.real)[:, None]
        else:
            out_ref = refs[-1]
        store(out_ref, at.own, at.cols, at.masked(d_row))

    results = [((capacity, hidden), rows.dtype)]
    if spec.weight_input:
        results.append(((-(-hidden // tile.fitted(hidden, 1).cols), capacity), jnp.float32))
    return rows_times_weights(
        Product(d_pre, weights.w1, by_column=True),
        _tiles(spec, tile, group_sizes, capacity, weights),
        tile,
        Epilogue(epilogue, (row_weights, rows) if spec.weight_input else (), results, zeroed=True),
        name="moriep_d_rows",
        interpret=interpret,
    )


def d_activations(
    spec: ExpertSpec,
    tile: Tile,
    saved_rows: int,
    interpret: bool,
    d_out: jax.Array,
    pre: tuple[jax.Array, ...],
    operands: Operands,
) -> list[jax.Array]:
    """Activations [C, I] for dw2, d(pre-activations) [C, 2*I], and shares of d(row weight), f32[n, C].

    The gradient of an output weight needs no second product of the forward pass:
    ``<d_y, w2 h> = <w2.T d_y, h>``. An output weight is a factor of both, one with ``weight_input`` of none:
    then d(pre-activations) come a second time, times the weight, for dw1.
    """
    _, row_weights, group_sizes, weights = operands
    capacity, inner = d_out.shape[0], weights.w2.shape[2]

    def epilogue(at: At, sums: tuple[jax.Array], weights_ref: Any, *refs: Any) -> None:
        pre_refs, (act_ref, *d_pre_refs, shares_ref) = refs[: len(pre)], refs[len(pre) :]

        def finish(real: Span) -> None:
            d_act = load(act_ref, real, at.cols).astype(jnp.float32)
            gate, up = pre_activations(pre_refs, real, at.cols, inner, saved_rows)
            act, by_gate, by_up = activation.with_derivatives(gate, up, spec)
            weight = load_vector(weights_ref, real)[:, None]
            # Every thread has read its part of what the stores below replace.
            barrier(interpret)
            if not spec.weight_input:
                store_vector(shares_ref, real, jnp.sum(d_act * act, axis=1), at.col_tile)
                act, d_act = act * weight, d_act * weight
            store(act_ref, real, at.cols, act)
            for ref, factor in zip(d_pre_refs, (1, weight), strict=False):
                store(ref, real, at.cols, d_act * by_gate * factor)
                store(ref, real, second(at.cols, inner), d_act * by_up * factor)

        # The tile and what it is multiplied with do not fit into registers together. So it waits in memory,
        # where the activations will be, and comes back in slices; the L2 cache holds it.
        store(act_ref, at.real, at.cols, sums[0])
        barrier(interpret)
        in_slices(at.real, min(_SLICE, at.real.size), finish)

    d_pre = ((capacity, 2 * inner), d_out.dtype)
    results = [
        ((capacity, inner), d_out.dtype),
        *([d_pre] * (1 + spec.weight_input)),
        ((-(-inner // tile.fitted(inner, 1).cols), capacity), jnp.float32),
    ]
    return rows_times_weights(
        Product(d_out, weights.w2, by_column=True),
        _tiles(spec, tile, group_sizes, capacity, weights),
        tile,
        Epilogue(epilogue, (row_weights, *pre), results),
        name="moriep_d_act",
        interpret=interpret,
    )


def _tiles(
    spec: ExpertSpec,
    tile: Tile,
    group_sizes: jax.Array,
    capacity: int,
    weights: ExpertWeights,
    first_row: int = 0,
) -> RowTiles:
    """The tiles of a product with weights, from a row on."""
    return row_tiles(group_sizes, spec.block, capacity, tile.rows, first_row, tile.group, weights.first)


def _given(*arrays: Any) -> tuple[Any, ...]:
    return tuple(array for array in arrays if array is not None)
