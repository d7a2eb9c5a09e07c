"""The grouped products: rows times their expert's weights, and the weights' gradients.

Both walk over tiles of the result in an order that keeps one tile of columns in the L2 cache for several
tiles of rows, and both take their epilogue as a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from jax_moriep import schemes
from jax_moriep.experts.pallas.launch import (
    Span,
    Tile,
    by_turns,
    call,
    dot,
    load,
    load_pairs,
    load_rows,
    load_vector,
    power_of_two,
    span,
    store,
    unpaired,
)
from jax_moriep.experts.pallas.tiles import OfCall, RowTiles, position_in_grid, position_in_runs


@dataclasses.dataclass(frozen=True)
class At:
    """Where an epilogue stands.

    Attributes:
      expert: whose rows they are.
      real: the tile's rows, its run's padding and what lies behind masked.
      own: the tile's rows, padding of the run's own blocks included.
      cols: the tile's columns.
      col_tile: their number.
    """

    expert: Any
    real: Span
    own: Span
    cols: Span
    col_tile: Any

    def masked(self, values: jax.Array) -> jax.Array:
        """``values`` with zeros in rows that are not real; a select, so that a NaN there is gone."""
        mask = self.real.mask
        assert mask is not None
        return jnp.where(mask[:, None], values, 0)


_F16 = jnp.float16


@dataclasses.dataclass(frozen=True)
class Scales:
    """Scales of codes, which are multiplied in float16, because it holds every 8-bit code; sums are f32.

    Attributes:
      format: the codes' dtype; where rows and weights are u8 arrays, they are the bits of that float8.
      of_rows: f32[D/128, C], of each row and ``schemes.BLOCK`` of depth, or f32[1, C].
      of_weights: f32[L, N/128, D/128], of blocks, with paired weights gate's blocks, then up's; or f32[L, N].
    """

    format: Any
    of_rows: jax.Array
    of_weights: jax.Array

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The operands of a kernel."""
        return self.of_rows, self.of_weights

    def values(self, codes: jax.Array) -> jax.Array:
        """Codes as float16."""
        return float8_bits_as_float16(codes, self.format) if codes.dtype == jnp.uint8 else codes.astype(_F16)

    def scaled(self, part: jax.Array, refs: Any, at: At, read: Span, group: Any, paired: bool) -> jax.Array:
        """A product of at most ``schemes.BLOCK`` of depth, times the scales that it has of its own."""
        rows_ref, weights_ref = refs
        if self.of_rows.shape[0] > 1:
            part = part * load_vector(rows_ref, read, group)[:, None]
        if self.of_weights.ndim == 3:
            block, half = _columns(at.cols, part, paired)
            block = lax.div(block, schemes.BLOCK) + half * (self.of_weights.shape[1] // 2)
            mask = None if at.cols.stop is None else block < self.of_weights.shape[1]
            lead, last = (jnp.broadcast_to(i, (1,)) for i in (at.expert, group))
            scale = plgpu.load(
                weights_ref.at[lead, block, last], mask=mask, other=None if mask is None else 0.0
            )
            part = part * scale[None, :]
        return part

    def finished(self, sums: jax.Array, refs: Any, at: At, read: Span, paired: bool) -> jax.Array:
        """Sums times the scales that all groups share."""
        rows_ref, weights_ref = refs
        if self.of_rows.shape[0] == 1:
            sums = sums * load_vector(rows_ref, read, jnp.int32(0))[:, None]
        if self.of_weights.ndim == 2:
            col, half = _columns(at.cols, sums, paired)
            mask = None if at.cols.stop is None else col < at.cols.stop
            col += half * (self.of_weights.shape[1] // 2)
            scale = plgpu.load(
                weights_ref.at[jnp.broadcast_to(at.expert, (1,)), col],
                mask=mask,
                other=None if mask is None else 0.0,
            )
            sums = sums * scale[None, :]
        return sums


def _columns(cols: Span, sums: jax.Array, paired: bool) -> tuple[jax.Array, jax.Array]:
    """Of each column of sums: the column of the weights' half, and the half, 0 or 1."""
    col = jnp.arange(sums.shape[1])
    return (cols.first + col // 2, col % 2) if paired else (cols.first + col, jnp.zeros_like(col))


def float8_bits_as_float16(bits: jax.Array, format: Any) -> jax.Array:
    """The values of float8 codes by integer arithmetic, for GPUs that do not convert this format.

    Moved to float16's place the bits are a value with another bias of the exponent, also where the exponent
    is 0.
    """
    wide = bits.astype(jnp.int32)
    fn = jnp.dtype(format) == jnp.float8_e4m3fn
    moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    moved = jnp.where((wide & 0x7F) == 0x7F if fn else wide == 0x80, 0x7E00, moved)
    values = lax.bitcast_convert_type(moved.astype(jnp.int16), _F16)
    return values * jnp.asarray(2.0 ** (8 if fn else 7), _F16)


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows times their expert's weights.

    Attributes:
      rows: [C, D].
      weights: [L, N, D], contracted over the last dimension, or with ``by_column`` [L, D, N].
      by_column: see ``weights``.
      paired: a tile of columns is one of the first half of N, gate, and the same one of the second half, up.
      scales: those of codes; not with ``by_column``.
    """

    rows: jax.Array
    weights: jax.Array
    by_column: bool = False
    paired: bool = False
    scales: Scales | None = None

    @property
    def depth(self) -> int:
        """D."""
        return self.rows.shape[1]

    @property
    def cols(self) -> int:
        """Columns of the result; of gate or of up if paired."""
        return self.weights.shape[2 if self.by_column else 1] // (2 if self.paired else 1)

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        """The operands of a kernel: rows, weights, and scales if there are any."""
        return self.rows, self.weights, *(self.scales.arrays if self.scales else ())


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What becomes of a product's tiles.

    Attributes:
      run: run(at, sums, *operand_refs, *result_refs); sums are f32 tiles: one, or two if paired.
      operands: its own.
      results: shape and dtype of each result.
      zeroed: fill the first result's rows behind the last run with zeros.
    """

    run: Callable[..., None]
    operands: Sequence[jax.Array]
    results: Sequence[tuple[tuple[int, ...], Any]]
    zeroed: bool = False


def rows_times_weights(
    product: Product, tiles: RowTiles, tile: Tile, epilogue: Epilogue, *, name: str, interpret: bool
) -> list[jax.Array]:
    """For every tile of rows and of columns of the result: the product, then the epilogue.

    Args:
      product: what is multiplied.
      tiles: the tiles of rows.
      tile: how the kernel is cut; ``tile.rows`` must be ``tiles.size``.
      epilogue: what becomes of the sums.
      name: in profiles.
      interpret: see ``launch.call``.

    Returns:
      The epilogue's results.
    """
    cols, given = product.cols, len(product.arrays)
    tile = tile.fitted(cols, product.depth)
    assert product.scales is None or (schemes.BLOCK % tile.depth == 0 and not product.by_column)
    assert tile.rows == tiles.size
    col_tiles = -(-cols // tile.cols)
    work = (tiles.max_tiles + 1) * col_tiles
    programs = min(tile.programs or work, work)

    def kernel(table_ref: Any, *refs: Any) -> None:
        operand_refs, refs = refs[:given], refs[given:]
        of_call = tiles.of_call(table_ref)
        first_tile, num_tiles = of_call.first_tile, of_call.num_tiles
        num_tiles = num_tiles - first_tile

        def one(turn: Any) -> None:
            row_tile, col_tile = position_in_runs(table_ref, turn, first_tile, col_tiles)
            of_tile = tiles.of_tile(table_ref, row_tile)
            expert, first = of_tile.expert, of_tile.first
            at = At(
                expert,
                Span(first, tile.rows, of_tile.stop),
                Span(first, tile.rows, of_tile.end),
                span(col_tile * tile.cols, tile.cols, cols),
                col_tile,
            )
            sums = _sums(product, operand_refs, at, tile, tiles.overrun)
            epilogue.run(at, unpaired(sums) if product.paired else (sums,), *refs)

        by_turns(programs, num_tiles * col_tiles, one)
        if epilogue.zeroed:
            _zero_behind(refs[len(epilogue.operands)], of_call, tile, programs)

    operands = (tiles.table, *product.arrays, *epilogue.operands)
    return call(kernel, name, operands, epilogue.results, programs, tile, interpret)


def _sums(product: Product, refs: tuple[Any, ...], at: At, tile: Tile, overrun: bool) -> jax.Array:
    """The product of one tile, f32[tile.rows, tile.cols], or twice as many columns by turns if paired."""
    rows_ref, weights_ref, *scale_refs = refs
    scales, paired, first = product.scales, product.paired, at.real.first
    read = at.real if overrun else Span(first, tile.rows)

    def step(k: Any, sums: jax.Array) -> jax.Array:
        deep = span(k * tile.depth, tile.depth, product.depth)
        # Rows of other runs may be among them: those of the sums are not stored.
        x = load_rows(rows_ref, first, tile.rows, deep) if overrun else load(rows_ref, read, deep)
        if paired:
            w = load_pairs(weights_ref, at.expert, at.cols, product.cols, deep)
        elif product.by_column:
            w = load(weights_ref, deep, at.cols, at.expert)
        else:
            w = load(weights_ref, at.cols, deep, at.expert)
        x, w = (scales.values(x), scales.values(w)) if scales else (x, w.astype(x.dtype))
        part = dot(x, w, 1, 0 if product.by_column else 1)
        if scales:
            group = lax.div(k, jnp.int32(schemes.BLOCK // tile.depth))
            part = scales.scaled(part, scale_refs, at, read, group, paired)
        return sums + part

    # A tile that is all padding costs no product.
    steps = jnp.where(first < at.real.stop, jnp.int32(-(-product.depth // tile.depth)), jnp.int32(0))
    sums = jnp.zeros((tile.rows, tile.cols * (2 if paired else 1)), jnp.float32)
    sums = lax.fori_loop(0, steps, step, sums)
    return scales.finished(sums, scale_refs, at, read, paired) if scales else sums


def _zero_behind(ref: Any, of_call: OfCall, tile: Tile, programs: int) -> None:
    """Fills the rows [C, N] behind the last run with zeros."""
    (capacity, cols), used = ref.shape, of_call.used_rows
    col_tiles = -(-cols // tile.cols)
    empty = lax.div(capacity - used + (tile.rows - 1), tile.rows)
    zeros = jnp.zeros((tile.rows, tile.cols), ref.dtype)

    def fill(turn: Any) -> None:
        row_tile, col_tile = lax.div(turn, col_tiles), lax.rem(turn, col_tiles)
        behind = Span(used + row_tile * tile.rows, tile.rows, capacity)
        store(ref, behind, span(col_tile * tile.cols, tile.cols, cols), zeros)

    by_turns(programs, empty * col_tiles, fill)


def weight_gradient(
    left: jax.Array,
    right: jax.Array,
    starts: jax.Array,
    group_sizes: jax.Array,
    dtype: Any,
    tile: Tile,
    *,
    name: str,
    interpret: bool,
) -> jax.Array:
    """``left[rows of e].T @ right[rows of e]`` for every expert e; zeros for one without rows.

    Rows that are in no run are never read. One program sums all rows of its tile, so that no atomics are
    needed and the sum's order is fixed.

    Args:
      left: [C, M].
      right: [C, N].
      starts: i32[L], the first row of every run.
      group_sizes: i32[L].
      dtype: of the result.
      tile: how the kernel is cut: ``rows`` of M, ``cols`` of N, ``depth`` rows at a time.
      name: in profiles.
      interpret: see ``launch.call``.

    Returns:
      [L, M, N].
    """
    num_experts, height, width = group_sizes.size, left.shape[1], right.shape[1]
    tile = dataclasses.replace(tile.fitted(width, tile.depth), rows=min(tile.rows, power_of_two(height)))
    row_tiles, col_tiles = -(-height // tile.rows), -(-width // tile.cols)
    work = num_experts * row_tiles * col_tiles
    programs = min(tile.programs or work, work)

    def kernel(starts_ref: Any, sizes_ref: Any, left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        def product(turn: Any) -> None:
            expert = lax.div(turn, row_tiles * col_tiles)
            inside = lax.rem(turn, row_tiles * col_tiles)
            row_tile, col_tile = position_in_grid(inside, row_tiles, col_tiles, tile.group)
            start, size = starts_ref[expert], sizes_ref[expert]
            high = span(row_tile * tile.rows, tile.rows, height)
            wide = span(col_tile * tile.cols, tile.cols, width)

            def step(k: Any, total: jax.Array) -> jax.Array:
                deep = Span(start + k * tile.depth, tile.depth, start + size)
                return total + dot(load(left_ref, deep, high), load(right_ref, deep, wide), 0, 0)

            zeros = jnp.zeros((tile.rows, tile.cols), jnp.float32)
            total = lax.fori_loop(0, lax.div(size + (tile.depth - 1), tile.depth), step, zeros)
            store(out_ref, high, wide, total, expert)

        by_turns(programs, work, product)

    shape = (num_experts, height, width)
    operands = (starts, group_sizes, left, right)
    return call(kernel, name, operands, [(shape, dtype)], programs, tile, interpret)[0]
