"""The way back through the second product, the row weight and the activation, in one Hopper kernel.

A tile's sums are the cotangent of 128 rows of activations, and stay in registers: the pre-activations that
they are multiplied with follow the last step of the stream, into the same places of shared memory, and what
becomes of them leaves from there. So the cotangent of the activations never lies in memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas import activation
from jax_moriep.experts.pallas.hopper import launch
from jax_moriep.experts.pallas.hopper.stream import PIECE, Block, Lanes, Tail, Work
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.tiles import OfTile, RowTiles
from jax_moriep.experts.spec import ExpertSpec

_DEPTH = 64
"""As in ``products``. A block of w2 has so many rows, and so have the pre-activations that fit into it, those
of a warpgroup."""
_TAIL = 4
"""Steps behind those of the product: both warpgroups' gate rows, then their up rows."""


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Where a tile lies: the rows from ``first`` on, of which those before ``stop`` are real, and the columns
    from ``first_col`` on of ``inner``."""

    first: Any
    stop: Any
    first_col: Any
    width: int
    inner: int

    def rows(self, warpgroup: Any) -> Any:
        """A warpgroup's rows."""
        return pl.ds(self.first + warpgroup * _DEPTH, _DEPTH)

    def cols(self, half: int, col: int, size: int) -> Any:
        """Columns of pre-activations, of the gate (half 0) or of up."""
        return pl.ds(half * self.inner + self.first_col + col, size)


def suits(tiles: RowTiles, weights: jax.Array) -> bool:
    """Whether the kernel here can run.

    It stores whole tiles of rows and columns and takes each of its pre-activations' halves as a whole block:
    no tile may reach behind its run's blocks, and no step or tile of columns behind the matrix. It reads w2
    across the sums, which the matrix unit does of 16-bit values only.

    Args:
      tiles: the tiles of rows.
      weights: w2, [L, H, I].
    """
    rows_are_whole = not tiles.overrun and tiles.capacity % ROWS == 0
    return (
        weights.dtype.itemsize == 2 and rows_are_whole and all(size % ROWS == 0 for size in weights.shape[1:])
    )


def activation_gradient(
    d_out: jax.Array,
    weights: jax.Array,
    pre: tuple[jax.Array, ...],
    factors: jax.Array,
    tiles: RowTiles,
    spec: ExpertSpec,
    *,
    saved_rows: int,
) -> list[jax.Array]:
    """``rowwise.activation_gradient`` of ``d_out`` times w2.

    Args:
      d_out: [C, H], the cotangent of the result, anything in padding rows.
      weights: w2, [L, H, I].
      pre: the pre-activations that were kept, [saved_rows, 2*I], and those computed again, [C, 2*I], if not
        all were kept. The cotangent takes the memory of the last of them.
      factors: f32[C], the row weights, 0 in padding.
      tiles: the tiles of rows.
      spec: names the activation.
      saved_rows: how many rows were kept; a multiple of ``ROWS``.

    Returns:
      The weighted activations [C, I], the cotangent of the pre-activations [C, 2*I], both zero in the padding
      of runs, and shares of that of the row weights, f32[n, C], to be summed.
    """
    capacity, depth, inner = tiles.capacity, d_out.shape[1], weights.shape[2]
    width = 256 if inner % 256 == 0 else 128
    blocks = (Block(ROWS, _DEPTH, 1), Block(_DEPTH, width, 0))

    def body(table: Any, d_out_ref: Any, weights_ref: Any, factors_ref: Any, *refs: Any) -> None:
        pre_refs, (act_ref, d_pre_ref, shares_ref) = refs[: len(pre)], refs[len(pre) :]

        def tile(lanes: Lanes, row_tile: Any, col_tile: Any) -> Work:
            expert, at_rows = launch.rows_of_tile(table, row_tile)
            at = _Tile(at_rows.start, OfTile(table, row_tile).stop, col_tile * width, width, inner)

            def multiply(_: Any, __: Any, operands: Any, sums: Any) -> None:
                x, w = operands
                mg.wgmma(sums, x.at[pl.ds(lanes.me * _DEPTH, _DEPTH)], w)

            def fetch(n: int, places: tuple[Any, ...], arrived: Any) -> None:
                if len(pre) == 1:
                    _fetch(at, n, pre_refs[0], places[1], arrived)
                else:
                    kept = at.first < saved_rows
                    pl.when(kept)(lambda: _fetch(at, n, pre_refs[0], places[1], arrived))
                    pl.when(jnp.logical_not(kept))(lambda: _fetch(at, n, pre_refs[1], places[1], arrived))

            def finish(sums: jax.Array, tail: Tail) -> None:
                mine = at.rows(lanes.me)
                factor = launch.of_rows(factors_ref.at[mine])
                shares_ref[col_tile, mine] = _finish(at, lanes, spec, sums, factor, tail, act_ref, d_pre_ref)

            return Work(
                depth // _DEPTH,
                (d_out_ref.at[at_rows, :], weights_ref.at[expert].at[:, pl.ds(at.first_col, width)]),
                (_DEPTH, width),
                multiply,
                finish,
                tail=_TAIL,
                fetch=fetch,
            )

        launch.all_tiles(blocks, d_out.dtype, table, tiles, inner // width, tile)

    shapes = [
        ((capacity, inner), d_out.dtype),
        ((capacity, 2 * inner), d_out.dtype),
        ((inner // width, capacity), jnp.float32),
    ]
    operands = (tiles.table, d_out, weights, factors, *pre)
    return launch.call(body, operands, shapes, {len(operands) - 1: 1})


def _fetch(at: _Tile, n: int, pre_ref: Any, place: Any, arrived: Any) -> None:
    """Copies what step n of the tail brings: in two parts, for as many arrivals are those of a step."""
    half, warpgroup = divmod(n, 2)
    source = pre_ref.at[at.rows(warpgroup), at.cols(half, 0, at.width)]
    for rows in (slice(0, _DEPTH // 2), slice(_DEPTH // 2, _DEPTH)):
        mg.copy_gmem_to_smem(source.at[rows], place.at[rows], arrived)


def _finish(
    at: _Tile,
    lanes: Lanes,
    spec: ExpertSpec,
    sums: jax.Array,
    factor: jax.Array,
    tail: Tail,
    act_ref: Any,
    d_pre_ref: Any,
) -> jax.Array:
    """Stores a warpgroup's results, a few columns at a time; returns its rows' shares, f32[_DEPTH]."""
    for n in range(_TAIL):
        tail.wait(n)
    gate_place, up_place = (tail.blocks(2 * half + lanes.me)[1] for half in range(2))
    mine = at.rows(lanes.me)
    row = mg.layout_cast(lax.broadcasted_iota(jnp.int32, (_DEPTH, PIECE), 0), mg.Layout.WGMMA)
    real = row < lax.broadcast_in_dim(at.stop - mine.start, row.shape, ())
    factor = lax.broadcast_in_dim(factor, row.shape, (0,))
    share: Any = 0.0
    for col in range(0, at.width, PIECE):
        here = slice(col, col + PIECE)
        gate, up = (jnp.where(real, x[:, here].astype(jnp.float32), 0.0) for x in (gate_place, up_place))
        d = jnp.where(real, sums[:, here], 0.0)
        act, by_gate, by_up = activation.with_derivatives(gate, up, spec)
        share = share + jnp.sum(d * act, axis=1)
        d = d * factor
        parts = [(act * factor, act_ref.at[mine, pl.ds(at.first_col + col, PIECE)])]
        for half, by in enumerate((by_gate, by_up)):
            parts.append((d * by, d_pre_ref.at[mine, at.cols(half, col, PIECE)]))
        lanes.leave(parts)
    for n in range(_TAIL):
        tail.release(n)
    return share
