"""How operands come to a Hopper GPU's matrix units: one warpgroup copies blocks, two multiply them.

A program's tiles are one stream. While the results of a tile leave the registers, the blocks of the next one
arrive already; with a short contraction that is a good part of a tile's time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mg

PLACES = 4
"""Steps of the stream that have a place in shared memory at the same time: of 48 KiB at most, 192 KiB."""
PIECE = 64
"""Rows that leave a warpgroup's registers at a time, mostly as many columns as 128 bytes hold: 8 KiB."""
PIECES = 2
"""How many of them have a place in shared memory; two warpgroups' are 32 KiB. With ``PLACES`` steps that is
224 KiB, and a program can have 227."""
_MULTIPLIERS = 2
"""Warpgroups that multiply: with the sums of a tile of 128 x 256 each thread holds 128 values."""
_COPIER = _MULTIPLIERS
"""The number of the one behind them."""
COPIER_REGISTERS = 40
"""Of each of the copier's 128 threads, which need few: the others get what is left."""
MULTIPLIER_REGISTERS = 232
"""The most that 64K registers leave for each thread of both when the copier's have 40: half of 512 - 40, in
steps of 8."""


@dataclasses.dataclass(frozen=True)
class Block:
    """What a step reads of an operand: [rows, cols], and the next step further along ``dim``.

    Attributes:
      rows: rows of its place in shared memory.
      cols: columns likewise.
      dim: along it a step follows the other.
      parts: how many copies fill the place, one below the other.
      wide: rows of so many bytes are swizzled together.
    """

    rows: int
    cols: int
    dim: int
    parts: int = 1
    wide: int = 128

    def at(self, source: Any, step: Any) -> Any:
        """The block of a step."""
        size = (self.rows, self.cols)[self.dim]
        along = pl.ds(pl.multiple_of(step * size, size), size)
        return source.at[along, :] if self.dim == 0 else source.at[:, along]

    def places(self, count: int, dtype: Any) -> Any:
        """Where the blocks of some steps lie in shared memory."""
        return mg.SMEM((count, self.rows, self.cols), dtype, transforms=_swizzled(dtype, self.wide))


@dataclasses.dataclass(frozen=True)
class Line:
    """What a step reads of an f32 operand [steps, size]: its own line."""

    size: int
    parts: int = dataclasses.field(default=1, init=False)

    def at(self, source: Any, step: Any) -> Any:
        """The line of a step."""
        return source.at[step, :]

    def places(self, count: int, dtype: Any) -> Any:
        """As in ``Block``; ``dtype`` is that of the matrices."""
        del dtype
        return mg.SMEM((count, self.size), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Work:
    """One tile of a result.

    Attributes:
      steps: how many blocks of each operand there are; may be 0.
      sources: the operands; the blocks begin at their first row and column. One of several parts is a tuple
        of them, and one with fewer rows than its block fills the first ones.
      sums: the shape of one warpgroup's sums, f32.
      multiply: multiply(step, place, blocks, sums) enqueues one product into the sums; the place in shared
        memory has a number below ``PLACES``.
      finish: finish(values of the sums) stores them, by ``Lanes.leave``; with a tail finish(values, tail).
      short: (condition, work), work of equally many steps that is done in place of this one where the
        condition holds; or None.
      tail: steps behind those of the product, at most ``PLACES``: what ``finish`` finds in shared memory;
        0 where there is short work.
      fetch: fetch(n, places, arrived) copies what step n of the tail brings, as many copies as a step of the
        product has.
    """

    steps: Any
    sources: tuple[Any, ...]
    sums: tuple[int, int]
    multiply: Callable[[Any, Any, tuple[Any, ...], Any], None]
    finish: Callable[..., None]
    short: tuple[Any, Work] | None = None
    tail: int = 0
    fetch: Callable[[int, tuple[Any, ...], Any], None] | None = None

    def chosen(self, do: Callable[[Work], None]) -> None:
        """Does one of the two."""
        if self.short is None:
            do(self)
            return
        condition, other = self.short
        pl.when(condition)(lambda: do(other))
        pl.when(jnp.logical_not(condition))(lambda: do(self))


@dataclasses.dataclass(frozen=True)
class Tail:
    """What a warpgroup finds behind the last step of a product.

    Attributes:
      first: the number of the tail's first step in the program's stream.
      buffers: the places of each operand's blocks.
      produced: their barriers, as in ``run``.
      consumed: likewise.
    """

    first: Any
    buffers: tuple[Any, ...]
    produced: Any
    consumed: Any

    def blocks(self, n: Any) -> tuple[Any, ...]:
        """The places of step n."""
        return tuple(places.at[self._place(n)] for places in self.buffers)

    def wait(self, n: Any) -> None:
        """Waits until step n has come; each warpgroup waits for each step."""
        mg.barrier_wait(self.produced.at[self._place(n)])

    def release(self, n: Any) -> None:
        """Lets the places of step n be filled again."""
        mg.barrier_arrive(self.consumed.at[self._place(n)])

    def _place(self, n: Any) -> Any:
        return lax.rem(self.first + n, jnp.int32(PLACES))


def _swizzled(dtype: Any, wide: int = 128) -> tuple[Any, ...]:
    """How an operand of the matrix unit lies in shared memory: rows of so many bytes, swizzled."""
    elements = wide // jnp.dtype(dtype).itemsize
    return mg.TilingTransform((8, elements)), mg.SwizzleTransform(wide)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """What a warpgroup has for its results; the one that copies has none.

    Attributes:
      me: its number; those that multiply have 0 and 1.
      pieces: places in shared memory for each dtype of results.
      scratch: what ``run`` was asked for besides.
    """

    me: Any
    pieces: dict[jnp.dtype, Any]
    scratch: tuple[Any, ...]

    def leave(self, parts: list[tuple[Any, Any]], used: Any = None, strip: int = PIECE) -> None:
        """Stores each (values, target) through shared memory, by turns; the copies run on.

        Args:
          parts: what to store, and where.
          used: store so many rows, a multiple of ``strip``; None for all.
          strip: a multiple of 8 that divides ``PIECE``.
        """
        mg.wait_smem_to_gmem(0, wait_read_only=True)
        turn = 0
        for values, target in parts:
            values = values.astype(target.dtype)
            pieces = self.pieces[jnp.dtype(target.dtype)]
            count, wide = pieces.shape[1], pieces.shape[3]
            for row in range(0, values.shape[0], PIECE):
                for col in range(0, values.shape[1], wide):
                    at = (slice(row, row + PIECE), slice(col, col + wide))
                    if turn >= count:
                        mg.wait_smem_to_gmem(count - 1, wait_read_only=True)
                    place = pieces.at[self.me, turn % count]
                    place[...] = values[at]
                    mg.commit_smem()
                    if used is None:
                        mg.copy_smem_to_gmem(place, target.at[at])
                    else:
                        _leave_strips(place, target.at[at], used - row, strip)
                    turn += 1


def _leave_strips(place: Any, target: Any, used: Any, strip: int) -> None:
    """Stores the first ``used`` rows of a piece, as one group of copies."""
    for first in range(0, PIECE, strip):
        at = pl.ds(first, strip)
        copy = functools.partial(mg.copy_smem_to_gmem, place.at[at], target.at[at], commit_group=False)
        pl.when(first < used)(copy)
    mg.commit_smem_to_gmem_group()


def run(
    blocks: tuple[Block | Line, ...],
    dtype: Any,
    turns: tuple[Any, ...],
    work: Callable[[Lanes, Any], Any],
    results: tuple[Any, ...] = (),
    multiply: Callable[..., None] | None = None,
    copier_registers: int = COPIER_REGISTERS,
    piece_bytes: int = 128,
    scratch: tuple[Any, ...] = (),
) -> None:
    """Does all turns of a program.

    Args:
      blocks: of each operand.
      dtype: of the operands.
      turns: how many turns there are in each dimension of ``work``'s index; the programs share them.
      work: work(lanes, index), the tile of a turn.
      results: dtypes of the results, if they are not the operands'.
      multiply: what the warpgroups that multiply do; ``_multiply``, or another that takes the same and knows
        what ``work`` gives.
      copier_registers: of each of the copier's threads; at most ``COPIER_REGISTERS``.
      piece_bytes: how wide the pieces are in which results leave.
      scratch: shared memory and barriers that ``work`` finds in its ``Lanes``.
    """
    results = tuple(dict.fromkeys(jnp.dtype(result) for result in results or (dtype,)))
    count = max(1, PIECES // len(results))

    def scoped(buffers: Any, produced: Any, consumed: Any, pieces: Any, scratch: Any) -> None:
        me = lax.axis_index("wg")
        lanes = Lanes(me, dict(zip(results, pieces, strict=True)), scratch)
        pl.when(me == _COPIER)(
            functools.partial(
                _copy, copier_registers, blocks, turns, work, lanes, buffers, produced, consumed
            )
        )
        pl.when(me != _COPIER)(
            functools.partial(multiply or _multiply, turns, work, lanes, buffers, produced, consumed)
        )
        mg.wait_smem_to_gmem(0, wait_read_only=True)

    pl.run_scoped(
        scoped,
        buffers=tuple(block.places(PLACES, dtype) for block in blocks),
        produced=mg.Barrier(num_arrivals=sum(block.parts for block in blocks), num_barriers=PLACES),
        consumed=mg.Barrier(num_arrivals=_MULTIPLIERS, num_barriers=PLACES),
        pieces=tuple(
            mg.SMEM(
                (_MULTIPLIERS, count, PIECE, piece_bytes // result.itemsize),
                result,
                transforms=_swizzled(result, piece_bytes),
            )
            for result in results
        ),
        scratch=scratch,
        collective_axes="wg",
    )


def _copy(
    registers: int,
    blocks: tuple[Block | Line, ...],
    turns: Any,
    work: Any,
    lanes: Lanes,
    buffers: Any,
    produced: Any,
    consumed: Any,
) -> None:
    mg.set_max_registers(registers, action="decrease")

    def one(info: Any, carry: Any) -> Any:
        tile = work(lanes, info.index)

        def next_place(done: Any) -> Any:
            place = lax.rem(done, jnp.int32(PLACES))
            pl.when(done >= PLACES)(lambda: mg.barrier_wait(consumed.at[place]))
            return place

        def step(k: Any, done: Any) -> Any:
            place = next_place(done)

            def fetch(form: Any) -> None:
                for block, source, places in zip(blocks, form.sources, buffers, strict=True):
                    _fetch(block, source, k, places.at[place], produced.at[place])

            tile.chosen(fetch) if isinstance(tile, Work) else fetch(tile)
            return done + 1

        done = lax.fori_loop(0, tile.steps, step, carry)
        for n in range(tile.tail):
            place = next_place(done + n)
            tile.fetch(n, tuple(places.at[place] for places in buffers), produced.at[place])
        return done + tile.tail

    done: Any = mg.nd_loop(turns, collective_axes="sm", init_carry=jnp.int32(0))(one)

    # No barrier is left with an arrival that nobody waited for.
    @pl.loop(jnp.maximum(done - PLACES, 0), done)
    def _(step: Any) -> None:
        mg.barrier_wait(consumed.at[lax.rem(step, jnp.int32(PLACES))])


def _fetch(block: Block | Line, source: Any, step: Any, place: Any, produced: Any) -> None:
    """Starts the copies of a step's block."""
    if isinstance(block, Line):
        mg.copy_gmem_to_smem(block.at(source, step), place, produced)
        return
    first = 0
    for part in source if isinstance(source, tuple) else (source,):
        values = block.at(part, step)
        height = values.shape[0]
        mg.copy_gmem_to_smem(values, place.at[pl.ds(first, height)], produced)
        first += height


def _multiply(turns: Any, work: Any, lanes: Lanes, buffers: Any, produced: Any, consumed: Any) -> None:
    mg.set_max_registers(MULTIPLIER_REGISTERS, action="increase")

    @mg.nd_loop(turns, collective_axes="sm", init_carry=jnp.int32(0))
    def _(info: Any, carry: Any) -> Any:
        tile = work(lanes, info.index)

        def summed(form: Work, sums: Any) -> None:
            def step(k: Any, nothing: Any) -> Any:
                place = lax.rem(carry + k, jnp.int32(PLACES))
                mg.barrier_wait(produced.at[place])
                form.multiply(k, place, tuple(places.at[place] for places in buffers), sums)
                # The product of this step may run on; those before it are done with their blocks.
                mg.wgmma_wait(1)
                before = lax.rem(carry + k + (PLACES - 1), jnp.int32(PLACES))
                pl.when(k > 0)(lambda: mg.barrier_arrive(consumed.at[before]))
                return nothing

            lax.fori_loop(0, form.steps, step, ())
            mg.wgmma_wait(0)
            last = lax.rem(carry + form.steps + (PLACES - 1), jnp.int32(PLACES))
            pl.when(form.steps > 0)(lambda: mg.barrier_arrive(consumed.at[last]))
            if form.tail:
                form.finish(sums[...], Tail(carry + form.steps, buffers, produced, consumed))
            else:
                form.finish(sums[...])

        def do(form: Work) -> None:
            acc = mg.ACC(form.sums, jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
            pl.run_scoped(functools.partial(summed, form), acc)

        tile.chosen(do)
        return carry + tile.steps + tile.tail
