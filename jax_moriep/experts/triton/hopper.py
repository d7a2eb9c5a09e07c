"""The products once more for Hopper GPUs, in Pallas-Mosaic: one warpgroup copies tiles, two multiply.

Triton feeds Hopper's matrix unit through loads of all threads. On an H100 the same tiles of a plain product
then reached 0.80 to 0.87 of the dense matmul, and 1.0 with bulk copies. These kernels cover the common case,
which ``covers`` states; everything else runs in Triton.

Three things keep the kernels plain:
- Tiles have 128 rows and ``block`` is a multiple of that, so a tile is one expert's alone and every store is
  a whole tile. Padding rows of intermediates are zeros or never read.
- Row weights multiply the activations in gate_up, so that the product after it has no epilogue.
- The one place where padding could meet a sum is a weight gradient's last step over an expert's rows: there
  each warpgroup clears the padding in its own part of the operand that may hold anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.spec import ExpertSpec
from jax_moriep.experts.triton import activation
from jax_moriep.experts.triton import tiles as rows_of
from jax_moriep.experts.triton.tiles import RowTiles
from jax_moriep.runtime import compat

ROWS = 128
_DEPTH = 64
_STEPS = 3
_GROUP = 8
_PROGRAMS = 132
_PIECE = 64
"""Rows and columns that leave a warpgroup's registers at a time."""
_PIECES = 4
"""How many of them have a place in shared memory: all of a warpgroup's tile, so that the next can begin."""


def covers(spec: ExpertSpec, rows: jax.Array, w1: jax.Array, w2: jax.Array, biases: bool) -> bool:
    """Whether the kernels here can run a call: 16-bit floats, no biases, output weights, even sizes."""
    sizes = (rows.shape[1], w2.shape[2])
    return (
        rows.dtype.itemsize == 2
        and rows.dtype == w1.dtype == w2.dtype
        and not biases
        and not spec.weight_input
        and spec.block % ROWS == 0
        and rows.shape[0] % ROWS == 0
        and all(size % 128 == 0 for size in sizes)
    )


def product(rows: jax.Array, weights: jax.Array, tiles: RowTiles, *, by_column: bool) -> jax.Array:
    """See ``products.rows_times_weights``: the product alone, undefined behind the last run."""
    depth, cols = rows.shape[1], weights.shape[2 if by_column else 1]
    width = _width(cols)
    col_tiles, height = cols // width, ROWS // 2

    def body(table: Any, rows_ref: Any, weights_ref: Any, out_ref: Any) -> None:
        pipeline = functools.partial(
            _pipeline,
            steps=depth // _DEPTH,
            specs=[
                _along(ROWS, _DEPTH, 1),
                _along(_DEPTH, width, 0) if by_column else _along(width, _DEPTH, 1),
            ],
        )

        @_scoped(pipeline, (rows_ref, weights_ref.at[0]), rows.dtype)
        def _(allocations: Any, pieces: Any, me: Any) -> None:
            own = pl.ds(me * height, height)

            def tile(row_tile: Any, col_tile: Any) -> None:
                expert = table[rows_of.EXPERT, row_tile]
                first = pl.multiple_of(table[rows_of.FIRST, row_tile], ROWS)
                at_rows, at_cols = pl.ds(first, ROWS), pl.ds(col_tile * width, width)

                def compute(run: Callable[[Any], None]) -> None:
                    @functools.partial(pl.run_scoped, total=_sums((height, width), jnp.float32))
                    def _(total: Any) -> None:
                        run(total)
                        target = out_ref.at[at_rows, at_cols].at[own]
                        _leave([(total[...], target)], pieces, me)

                def step(_: Any, x: Any, w: Any, total: Any) -> Any:
                    mg.wgmma(total, x.at[own], w if by_column else w.transpose((1, 0)))
                    mg.wgmma_wait(0)
                    return total

                of_expert = weights_ref.at[expert]
                w = of_expert.at[:, at_cols] if by_column else of_expert.at[at_cols, :]
                pipeline(step, compute)(rows_ref.at[at_rows, :], w, allocations=allocations)

            _tiles_by_turns(table, tiles, col_tiles, tile)

    shape = ((tiles.capacity, cols), rows.dtype)
    return _call(body, (tiles.table, rows, weights), [shape])[0]


def gate_up(
    rows: jax.Array,
    weights: jax.Array,
    factors: jax.Array,
    tiles: RowTiles,
    spec: ExpertSpec,
    *,
    saved_rows: int,
    act: bool,
) -> list[jax.Array]:
    """Gate and up in one pass over the rows, and the activation.

    Args:
      rows: [C, H].
      weights: w1, [L, 2*I, H].
      factors: f32[C], what each row of activations is multiplied with; a row whose factor is 0 gives zeros,
        whatever it holds.
      tiles: the tiles of rows.
      spec: names the activation.
      saved_rows: write the pre-activations of the first so many rows, a multiple of ``ROWS``.
      act: write the activations.

    Returns:
      The activations [C, I] if asked for, and the pre-activations [saved_rows, 2*I] if there are any.
    """
    depth, cols = rows.shape[1], weights.shape[1] // 2
    width, height = 128, ROWS // 2

    def body(table: Any, rows_ref: Any, weights_ref: Any, factors_ref: Any, *out_refs: Any) -> None:
        pipeline = functools.partial(
            _pipeline,
            steps=depth // _DEPTH,
            specs=[_along(ROWS, _DEPTH, 1), _along(width, _DEPTH, 1), _along(width, _DEPTH, 1)],
        )

        @_scoped(pipeline, (rows_ref, weights_ref.at[0], weights_ref.at[0]), rows.dtype)
        def _(allocations: Any, pieces: Any, me: Any) -> None:
            own = pl.ds(me * height, height)

            def tile(row_tile: Any, col_tile: Any) -> None:
                expert = table[rows_of.EXPERT, row_tile]
                first = pl.multiple_of(table[rows_of.FIRST, row_tile], ROWS)
                at_rows = pl.ds(first, ROWS)
                at_gate, at_up = pl.ds(col_tile * width, width), pl.ds(cols + col_tile * width, width)

                def finish(gate: jax.Array, up: jax.Array) -> None:
                    parts = []
                    if act:
                        factor = mg.load(  # pyright: ignore[reportCallIssue]
                            factors_ref.at[pl.ds(first + me * height, height)],
                            layout=mg.Layout.WGMMA.reduce(1),
                            optimized=False,
                        )
                        factor = lax.broadcast_in_dim(factor, gate.shape, (0,))
                        h = jnp.where(factor != 0, activation.value(gate, up, spec) * factor, 0.0)
                        parts.append((h, out_refs[0].at[at_rows, at_gate].at[own]))
                    if not saved_rows:
                        _leave(parts, pieces, me)
                        return
                    kept = out_refs[-1].at[at_rows]
                    both = [(gate, kept.at[:, at_gate].at[own]), (up, kept.at[:, at_up].at[own])]
                    if saved_rows == tiles.capacity:
                        _leave(parts + both, pieces, me)
                    else:
                        _leave(parts, pieces, me)
                        pl.when(first < saved_rows)(lambda: _leave(both, pieces, me))

                def compute(run: Callable[[Any], None]) -> None:
                    sums = [_sums((height, width), jnp.float32)] * 2

                    @functools.partial(pl.run_scoped, gate=sums[0], up=sums[1])
                    def _(gate: Any, up: Any) -> None:
                        run((gate, up))
                        finish(gate[...], up[...])

                def step(_: Any, x: Any, w_gate: Any, w_up: Any, sums: Any) -> Any:
                    gate, up = sums
                    mg.wgmma(gate, x.at[own], w_gate.transpose((1, 0)))
                    mg.wgmma(up, x.at[own], w_up.transpose((1, 0)))
                    mg.wgmma_wait(0)
                    return sums

                w = weights_ref.at[expert]
                pipeline(step, compute)(
                    rows_ref.at[at_rows, :], w.at[at_gate, :], w.at[at_up, :], allocations=allocations
                )

            _tiles_by_turns(table, tiles, cols // width, tile)

    shapes = [((tiles.capacity, cols), rows.dtype)] if act else []
    if saved_rows:
        shapes.append(((saved_rows, 2 * cols), rows.dtype))
    return _call(body, (tiles.table, rows, weights, factors), shapes)


def weight_gradient(
    left: jax.Array, right: jax.Array, starts: jax.Array, group_sizes: jax.Array, *, unclean: str
) -> jax.Array:
    """See ``products.weight_gradient``.

    Args:
      left: [C, M].
      right: [C, N].
      starts: i32[L], the first row of every run.
      group_sizes: i32[L].
      unclean: "left" or "right", the operand whose padding may hold anything; the other's must be zeros up to
        the next multiple of ``_DEPTH`` rows.

    Returns:
      [L, M, N].
    """
    num_experts, tall, cols = group_sizes.size, left.shape[1], right.shape[1]
    width = _width(cols)
    row_tiles, col_tiles = tall // ROWS, cols // width
    # Each warpgroup clears what it alone reads, so neither waits for the other.
    by_rows = unclean == "left"
    height, wide = (ROWS // 2, width) if by_rows else (ROWS, width // 2)

    def body(starts_ref: Any, sizes_ref: Any, left_ref: Any, right_ref: Any, out_ref: Any) -> None:
        pipeline = functools.partial(_pipeline, specs=[_along(_DEPTH, ROWS, 0), _along(_DEPTH, width, 0)])

        @_scoped(functools.partial(pipeline, steps=_STEPS), (left_ref, right_ref), left.dtype)
        def _(allocations: Any, pieces: Any, me: Any) -> None:
            own = pl.ds(me * (height if by_rows else wide), height if by_rows else wide)

            @mg.nd_loop((num_experts, row_tiles * col_tiles), collective_axes="sm")
            def _(info: Any) -> None:
                expert, turn = info.index
                row_tile, col_tile = _position(turn, row_tiles, col_tiles)
                start, size = pl.multiple_of(starts_ref[expert], ROWS), sizes_ref[expert]
                # An expert without rows does one step, too, of which nothing is kept.
                steps = jnp.maximum(1, lax.div(size + (_DEPTH - 1), jnp.int32(_DEPTH)))
                at_rows, at_cols = pl.ds(row_tile * ROWS, ROWS), pl.ds(col_tile * width, width)

                def compute(run: Callable[[Any], None]) -> None:
                    @functools.partial(pl.run_scoped, total=_sums((height, wide), jnp.float32))
                    def _(total: Any) -> None:
                        run(total)
                        target = out_ref.at[expert].at[at_rows, at_cols]
                        target = target.at[own] if by_rows else target.at[:, own]
                        values = total[...]
                        kept = lax.broadcast_in_dim(size, values.shape, ()) > 0
                        _leave([(jnp.where(kept, values, jnp.zeros_like(values)), target)], pieces, me)

                def step(index: Any, x: Any, y: Any, total: Any) -> Any:
                    x, y = (x.at[:, own], y) if by_rows else (x, y.at[:, own])
                    dirty = x if by_rows else y
                    left_over = size - index[0] * _DEPTH

                    @pl.when(left_over < _DEPTH)
                    def _() -> None:
                        row = mg.layout_cast(lax.broadcasted_iota(jnp.int32, dirty.shape, 0), mg.Layout.WGMMA)
                        values = dirty[...]
                        real = row < lax.broadcast_in_dim(left_over, row.shape, ())
                        dirty[...] = jnp.where(real, values, jnp.zeros_like(values))
                        mg.commit_smem()

                    mg.wgmma(total, x.transpose((1, 0)), y)
                    mg.wgmma_wait(0)
                    return total

                deep = pl.ds(start, left.shape[0])
                pipeline(step, compute, steps=steps)(
                    left_ref.at[deep, at_rows], right_ref.at[deep, at_cols], allocations=allocations
                )

    shape = ((num_experts, tall, cols), left.dtype)
    return _call(body, (starts, group_sizes, left, right), [shape])[0]


def _sums(shape: tuple[int, int], dtype: Any) -> Any:
    """The registers of one warpgroup's sums."""
    return mg.ACC(shape, dtype)  # pyright: ignore[reportPrivateImportUsage]


def _width(cols: int) -> int:
    return 256 if cols % 256 == 0 else 128


def _swizzled(dtype: Any) -> tuple[Any, ...]:
    """How a 16-bit operand of the matrix unit lies in shared memory: rows of 128 bytes, swizzled."""
    elements = 128 // jnp.dtype(dtype).itemsize
    return mg.TilingTransform((8, elements)), mg.SwizzleTransform(128)


def _along(rows: int, cols: int, dim: int) -> Any:
    """A pipeline's blocks of [rows, cols] that follow each other along a dimension."""
    return mg.BlockSpec(
        (rows, cols),
        (lambda k: (k, 0)) if dim == 0 else (lambda k: (0, k)),
        transforms=_swizzled(jnp.bfloat16),
        memory_space=mg.SMEM,
    )


def _pipeline(step: Any, compute: Any, *, steps: Any, specs: list[Any]) -> Any:
    return mg.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        memory_registers=40,
        in_specs=specs,
        wg_axis="wg",
        num_compute_wgs=2,
        max_concurrent_steps=_STEPS,
        compute_context=compute,
    )


def _scoped(pipeline: Any, refs: tuple[Any, ...], dtype: Any) -> Callable[[Callable[..., None]], None]:
    """Runs body(allocations, pieces, warpgroup): shared memory lives as long as the program, not the tile."""

    def nothing(*_: Any) -> None:
        pass

    def run(body: Callable[..., None]) -> None:
        @functools.partial(
            pl.run_scoped,
            allocations=pipeline(nothing, nothing).get_allocations(*refs),
            pieces=mg.SMEM((2, _PIECES, _PIECE, _PIECE), dtype, transforms=_swizzled(dtype)),
            collective_axes="wg",
        )
        def _(allocations: Any, pieces: Any) -> None:
            body(allocations, pieces, lax.axis_index("wg"))

        mg.wait_smem_to_gmem(0, wait_read_only=True)

    return run


def _leave(parts: list[tuple[jax.Array, Any]], pieces: Any, me: Any) -> None:
    """Stores each (values, target) through pieces of shared memory, by turns; the copies run on."""
    mg.wait_smem_to_gmem(0, wait_read_only=True)
    turn = 0
    for values, target in parts:
        values = values.astype(target.dtype)
        for row in range(0, values.shape[0], _PIECE):
            for col in range(0, values.shape[1], _PIECE):
                at = (slice(row, row + _PIECE), slice(col, col + _PIECE))
                if turn >= _PIECES:
                    mg.wait_smem_to_gmem(_PIECES - 1, wait_read_only=True)
                pieces[me, turn % _PIECES] = values[at]
                mg.commit_smem()
                mg.copy_smem_to_gmem(pieces.at[me, turn % _PIECES], target.at[at])
                turn += 1


def _tiles_by_turns(table: Any, tiles: RowTiles, col_tiles: int, body: Callable[[Any, Any], None]) -> None:
    """Runs body(tile of rows, tile of columns) for those in use that are this program's turn."""
    first = table[rows_of.FIRST_TILE, tiles.max_tiles]
    num_tiles = table[rows_of.NUM_TILES, tiles.max_tiles] - first

    @mg.nd_loop((num_tiles * col_tiles,), collective_axes="sm")
    def _(info: Any) -> None:
        row_tile, col_tile = _position(info.index[0], num_tiles, col_tiles)
        body(first + row_tile, col_tile)


def _position(turn: Any, row_tiles: Any, col_tiles: int) -> tuple[Any, Any]:
    """As in ``products``: several tiles of rows for each tile of columns."""
    per_group = jnp.int32(_GROUP * col_tiles)
    in_group = lax.rem(turn, per_group)
    first = lax.div(turn, per_group) * _GROUP
    height = jnp.minimum(row_tiles - first, _GROUP)
    return first + lax.rem(in_group, height), lax.div(in_group, height)


def _call(
    body: Any, operands: tuple[jax.Array, ...], results: list[tuple[tuple[int, ...], Any]]
) -> list[Any]:
    like = compat.union_varying(*operands)
    kernel = mg.kernel(
        body,
        out_type=tuple(compat.result_type(like[0], shape, dtype) for shape, dtype in results),
        grid=(_PROGRAMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=mg.CompilerParams(lowering_semantics=mg.LoweringSemantics.Warpgroup),
    )
    return list(kernel(*like))
