"""What every kernel here shares: tiles and masks of operands, products, and the call of Pallas itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_moriep.runtime import compat

PASS_PROGRAMS = 16896
"""The most programs of a pass that is bound by memory: 128 for each of an H100's 132 multiprocessors. It came
with the H100's table, in place of 16 for each; the measurement is not recorded."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel is cut; every choice gives the same result up to the order of f32 sums.

    Attributes:
      rows: rows of the result per program; a power of two, as are the next two.
      cols: columns of the result per program; in a kernel with gate and up, of each.
      depth: how much of the contracted dimension is read at a time.
      warps: warps per program.
      stages: depth of the software pipeline.
      programs: how many programs share all tiles by turns; None: one for each tile.
      group: how many tiles of rows take their turn at one tile of columns before the next, for the L2 cache.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    programs: int | None = None
    group: int = 8

    def fitted(self, cols: int, depth: int) -> Tile:
        """The same, no wider than the matrix; a depth that divides ``depth`` needs no mask in the loop.

        It is not cut below 32, which is two instructions of a matrix unit. Not tuned.
        """
        step = self.depth
        while step > 32 and depth % step:
            step //= 2
        if depth % step:
            step = self.depth
        return dataclasses.replace(
            self, cols=min(self.cols, power_of_two(cols)), depth=min(step, power_of_two(depth))
        )


def power_of_two(n: int) -> int:
    """The least power of two that is at least n and at least 16, a side that every matrix unit takes."""
    return max(16, 1 << (n - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class Span:
    """Some indices of one dimension: ``size`` from ``first`` on, those at or above ``stop`` left out.

    ``stop`` is None where the indices are known to lie inside.
    """

    first: Any
    size: int
    stop: Any = None

    @property
    def slice(self) -> Any:
        # jax 0.12 looks at a number whether the slice lies inside, whatever is masked.
        return pl.ds(self.first if self.stop is None else jnp.int32(self.first), self.size)

    @property
    def mask(self) -> jax.Array | None:
        return None if self.stop is None else self.first + jnp.arange(self.size) < self.stop


def span(first: Any, size: int, limit: int) -> Span:
    """A span of a dimension of ``limit`` indices; masked only if the size does not divide them."""
    return Span(first, size, None if limit % size == 0 else limit)


def _mask(a: Span, b: Span) -> jax.Array | None:
    if a.mask is None and b.mask is None:
        return None
    mask = jnp.ones((a.size, b.size), jnp.bool_)
    if a.mask is not None:
        mask &= a.mask[:, None]
    if b.mask is not None:
        mask &= b.mask[None, :]
    return mask


def load(ref: Any, a: Span, b: Span, *lead: Any) -> jax.Array:
    """The [a, b] tile of ``ref[*lead]``, zeros where it is masked."""
    mask = _mask(a, b)
    return plgpu.load(ref.at[(*lead, a.slice, b.slice)], mask=mask, other=_zero(ref, mask))


def load_rows(ref: Any, first: Any, size: int, depth: Span) -> jax.Array:
    """The [size, depth] tile of ``ref`` from a row on; behind the last row that one again, so without a mask.

    With a mask for its rows, products in tiles of 128 x 256 came out wrong by some 5% on an H200 where the
    pipelined loop was short (Pallas-Triton of jax 0.11.2; tests/gpu/test_quantised.py).
    """
    rows = jnp.minimum(first + jnp.arange(size), ref.shape[0] - 1)
    cols = depth.first + jnp.arange(depth.size)
    mask = None if depth.mask is None else jnp.broadcast_to(depth.mask[None, :], (size, depth.size))
    return plgpu.load(ref.at[rows[:, None], cols[None, :]], mask=mask, other=_zero(ref, mask))


def _zero(ref: Any, mask: Any) -> Any:
    """What a masked load gives; Pallas makes no float8 of an integer."""
    if mask is None:
        return None
    return 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0


def load_pairs(ref: Any, lead: Any, cols: Span, second: int, depth: Span) -> jax.Array:
    """Rows ``cols`` of ``ref[lead]`` and the rows ``second`` behind each, by turns: [2 * cols, depth].

    A product with them has the columns that belong together side by side, in one thread's registers, so that
    ``unpaired`` moves no data; and it is one wide product, for which a matrix unit reads less than for two.
    """
    pair = jnp.arange(2 * cols.size)
    row = cols.first + pair // 2
    index = (row + pair % 2 * second)[:, None], (depth.first + jnp.arange(depth.size))[None, :]
    mask = None
    if cols.stop is not None:
        mask = jnp.broadcast_to((row < cols.stop)[:, None], (2 * cols.size, depth.size))
    if depth.mask is not None:
        mask = depth.mask[None, :] & (jnp.ones_like(index[0], jnp.bool_) if mask is None else mask)
    lead = jnp.broadcast_to(lead, (1, 1))
    return plgpu.load(ref.at[(lead, *index)], mask=mask, other=_zero(ref, mask))


def unpaired(sums: jax.Array) -> tuple[jax.Array, ...]:
    """The even and the odd columns."""
    return tuple(jnp.unstack(sums.reshape(sums.shape[0], -1, 2), axis=2))


def store(ref: Any, a: Span, b: Span, values: jax.Array, *lead: Any) -> None:
    """Writes the [a, b] tile of ``ref[*lead]``, where it is not masked."""
    plgpu.store(ref.at[(*lead, a.slice, b.slice)], values.astype(ref.dtype), mask=_mask(a, b))


def load_vector(ref: Any, a: Span, *lead: Any) -> jax.Array:
    """``ref[*lead, a]`` in f32, zeros where it is masked."""
    mask = a.mask
    vector = plgpu.load(ref.at[(*lead, a.slice)], mask=mask, other=None if mask is None else 0)
    return vector.astype(jnp.float32)


def store_vector(ref: Any, a: Span, values: jax.Array, *lead: Any) -> None:
    """Writes ``ref[*lead, a]``, where it is not masked."""
    plgpu.store(ref.at[(*lead, a.slice)], values.astype(ref.dtype), mask=a.mask)


def in_slices(rows: Span, size: int, body: Callable[[Span], None]) -> None:
    """Runs body on slices of ``size`` rows, one after the other, so that few values are alive at a time."""

    def one(i: Any, carry: Any) -> Any:
        body(Span(rows.first + i * size, size, rows.stop))
        return carry

    lax.fori_loop(0, rows.size // size, one, ())


def barrier(interpret: bool) -> None:
    """Lets every thread of the program see what the others wrote to global memory before."""
    if not interpret:
        plgpu.debug_barrier()


def dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Contracts one dimension of each and sums in f32.

    f32 values are multiplied as ``jax.default_matmul_precision`` says where the kernel is traced, which is
    ``ExpertSpec.multiplying``. Products of shorter values are exact.
    """
    precision = None if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def by_turns(num_programs: int, total: Any, body: Callable[[Any], None]) -> None:
    """Runs body(t) for every t < total that is this program's turn."""
    program = pl.program_id(0)
    turns = lax.div(total - program + (num_programs - 1), num_programs)

    def turn(i: Any, carry: Any) -> Any:
        body(program + i * num_programs)
        return carry

    lax.fori_loop(0, turns, turn, ())


def call(
    kernel: Callable[..., None],
    name: str,
    operands: Sequence[jax.Array],
    results: Sequence[tuple[tuple[int, ...], Any]],
    programs: int,
    tile: Tile,
    interpret: bool,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Runs ``kernel(*operand_refs, *result_refs)`` in a row of programs.

    Args:
      kernel: the body; sees whole arrays.
      name: of the kernel in profiles.
      operands: the arrays.
      results: shape and dtype of each result.
      programs: how many.
      tile: warps and stages.
      interpret: run as plain XLA operations, for tests on a CPU.
      aliases: which operand's memory, and so its values, each result takes over.

    Returns:
      The results; what the kernel did not write is undefined.
    """
    like = compat.union_varying(*operands)
    shapes = [compat.result_type(like[0], shape, dtype) for shape, dtype in results]
    # Kernels count in int32, with literals that x64 would make int64.
    with jax.enable_x64(False):
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=(programs,),
            name=name,
            interpret=interpret,
            input_output_aliases=aliases or {},
            compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        )(*like)
