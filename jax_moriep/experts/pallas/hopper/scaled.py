"""Sums of 8-bit products on a Hopper GPU: the matrix unit's own are short, and leave it every 128 of depth.

The matrix unit adds products of 8-bit floats with some 14 bits. Therefore each ``DEPTH`` is a product of its
own, and its result is added in f32, times the scales of its rows and columns. A warpgroup has half of the
tile's columns in the unit at a time, because sums and products of all would not fit into its registers; while
one warpgroup adds, the other one's products keep the unit busy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas.hopper import stream
from jax_moriep.experts.pallas.hopper.stream import Lanes

DEPTH = 128
"""How deep one product is: the columns of a group of scales, and what 128 bytes hold."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One tile of a result.

    Attributes:
      steps: how many blocks of each operand there are; at least 1.
      sources: the operands.
      sums: shapes of one warpgroup's sums, f32.
      multiply: multiply(n, blocks, partial) enqueues the product of sum n.
      row_scales: row_scales(blocks) are the scales of a warpgroup's rows, in a register each; None: there are
        none.
      col_scale: col_scale(n, step) is the scale of all columns of sum n; None: there are none.
      finish: finish(sums) stores them, by ``Lanes.leave``.
      tail: as in ``stream.Work``; there is none.
    """

    steps: Any
    sources: tuple[Any, ...]
    sums: tuple[tuple[int, int], ...]
    multiply: Callable[[int, tuple[Any, ...], Any], None]
    row_scales: Callable[[tuple[Any, ...]], Any] | None
    col_scale: Callable[[int, Any], Any] | None
    finish: Callable[[tuple[Any, ...]], None]
    tail: ClassVar[int] = 0


def multiply(turns: Any, work: Any, lanes: Lanes, buffers: Any, produced: Any, consumed: Any) -> None:
    """See ``stream.run``: the warpgroups' loop over ``Work``."""
    mg.set_max_registers(stream.MULTIPLIER_REGISTERS, action="increase")

    @mg.nd_loop(turns, collective_axes="sm", init_carry=jnp.int32(0))
    def _(info: Any, carry: Any) -> Any:
        done = carry
        tile = work(lanes, info.index)

        def step(k: Any, sums: Any) -> Any:
            place = lax.rem(done + k, jnp.int32(stream.PLACES))
            mg.barrier_wait(produced.at[place])
            blocks = tuple(places.at[place] for places in buffers)

            # Before the first product, so that they arrive while it runs.
            rows = tile.row_scales(blocks) if tile.row_scales else None
            cols = [tile.col_scale(n, k) if tile.col_scale else None for n in range(len(sums))]
            new = []
            for n, total in enumerate(sums):
                partial = _product(tile, n, blocks)
                if n == len(sums) - 1:
                    mg.barrier_arrive(consumed.at[place])
                new.append(_added(total, partial, rows, cols[n]))
            return tuple(new)

        zeros = tuple(mg.layout_cast(jnp.zeros(s, jnp.float32), mg.Layout.WGMMA) for s in tile.sums)
        tile.finish(lax.fori_loop(0, tile.steps, step, zeros))
        return done + tile.steps


def _product(tile: Work, n: int, blocks: tuple[Any, ...]) -> jax.Array:
    def fresh(partial: Any) -> jax.Array:
        tile.multiply(n, blocks, partial)
        return partial[...]

    return pl.run_scoped(fresh, mg.ACC(tile.sums[n], jnp.float32))  # pyright: ignore[reportPrivateImportUsage]


def _added(total: jax.Array, partial: jax.Array, rows: Any, col_scale: Any) -> jax.Array:
    """total + partial * rows * col_scale."""
    if rows is None:
        return total + partial if col_scale is None else total + partial * col_scale
    if col_scale is not None:
        rows = rows * lax.broadcast_in_dim(col_scale, rows.shape, ())
    return total + partial * lax.broadcast_in_dim(rows, partial.shape, (0,))
