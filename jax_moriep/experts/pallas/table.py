"""The table of a call's tiles, made on the device from ``group_sizes``: on CUDA by one small kernel.

Of the same formula XLA makes several kernels, because of the sums along the experts. With 128 experts they
took 45 us before the products on an H200, and decoding a few tokens takes hardly longer than that.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_moriep.experts.pallas.launch import Span, Tile, call, power_of_two, span, store_vector
from jax_moriep.runtime import compat

_VALUES = 4096
"""Comparisons of a tile with an expert's run in one program of 128 threads. Not tuned."""


@dataclasses.dataclass(frozen=True)
class Cut:
    """How runs are cut into tiles; see ``tiles.row_tiles``.

    Attributes:
      block: every run starts at a multiple of it.
      size: rows per tile.
      first_row: tiles that end at or before this row are left out.
      group: the most tiles of a group.
      max_tiles: the most tiles that any ``group_sizes`` can need.
    """

    block: int
    size: int
    first_row: int
    group: int
    max_tiles: int


@functools.partial(jax.jit, static_argnums=1)
def table_of(group_sizes: jax.Array, cut: Cut, first_expert: jax.Array | None = None) -> jax.Array:
    """i32[6, max_tiles + 1], the lines that ``tiles`` names; the experts' numbers begin at ``first_expert``.

    A function of its own in the program, so that XLA sees two tables of one cut to be the same.
    """
    operands = (group_sizes.astype(jnp.int32),)
    if first_expert is not None:
        operands += (first_expert.astype(jnp.int32).reshape(1),)
    operands = compat.union_varying(*operands)
    axes = compat.varying_axes(operands[0])

    def by_xla(sizes: jax.Array, *first: jax.Array) -> jax.Array:
        return compat.pcast_varying(formula(sizes, cut, *first), axes)

    def by_kernel(sizes: jax.Array, *first: jax.Array) -> jax.Array:
        return compat.pcast_varying(kernel(sizes, cut, *first, interpret=False), axes)

    # No AMD GPU has run the kernel, and the formula is right everywhere.
    return lax.platform_dependent(*operands, cuda=by_kernel, default=by_xla)


def formula(group_sizes: jax.Array, cut: Cut, first_expert: jax.Array | None = None) -> jax.Array:
    """``table_of`` by plain operations."""
    tile = jnp.arange(cut.max_tiles, dtype=jnp.int32)
    lines = jnp.stack(_of_tiles(tile, group_sizes, cut, first_expert))
    return jnp.concatenate([lines, jnp.stack(_of_call(group_sizes, cut))[:, None]], axis=1)


def kernel(group_sizes: jax.Array, cut: Cut, *first: jax.Array, interpret: bool) -> jax.Array:
    """``formula`` as a kernel; ``first`` is i32[1], ``first_expert``, or nothing. See ``launch.call``."""
    experts = group_sizes.size
    padded = power_of_two(experts)
    size = min(max(16, _VALUES // padded), power_of_two(cut.max_tiles + 1))
    programs = -(-(cut.max_tiles + 1) // size)

    def body(sizes_ref: Any, *refs: Any) -> None:
        *first_refs, table_ref = refs
        all_experts = span(0, padded, experts)
        mask = all_experts.mask
        sizes = plgpu.load(sizes_ref.at[all_experts.slice], mask=mask, other=None if mask is None else 0)
        # The last column is the call's, as if it were one more tile's.
        here = Span(pl.program_id(0) * size, size, cut.max_tiles + 1)
        tile = here.first + jnp.arange(size)
        add = [ref[0] for ref in first_refs]
        lines = zip(_of_tiles(tile, sizes, cut, *add), _of_call(sizes, cut), strict=True)
        for line, (of_tiles, of_call) in enumerate(lines):
            store_vector(table_ref, here, jnp.where(tile < cut.max_tiles, of_tiles, of_call), jnp.int32(line))

    results = [((6, cut.max_tiles + 1), jnp.int32)]
    # Only warps and stages are of the tile's fields that a call reads.
    tile = Tile(rows=size, cols=padded, depth=padded, warps=4, stages=1)
    return call(body, "moriep_tiles", (group_sizes, *first), results, programs, tile, interpret)[0]


def _of_tiles(
    tile: jax.Array, sizes: jax.Array, cut: Cut, first_expert: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """The six lines of some tiles; of one that is not in use they mean nothing."""
    aligned, counts = _runs(sizes, cut)
    ends = jnp.cumsum(counts)
    # Sums over the runs that end before a tile, where Triton knows no gather.
    behind = tile[:, None] >= ends[None, :]

    def sum_before(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(behind, values[None, :], 0), axis=1, dtype=jnp.int32)

    expert = sum_before(jnp.ones_like(sizes))
    own = expert[:, None] == jnp.arange(sizes.size, dtype=jnp.int32)[None, :]

    def of_own(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(own, values[None, :], 0), axis=1, dtype=jnp.int32)

    start, first_of_run, real = sum_before(aligned), sum_before(counts), of_own(sizes)
    rows = lax.div(real + (cut.block - 1), jnp.int32(cut.block)) * cut.block
    count = lax.div(rows + (cut.size - 1), jnp.int32(cut.size))
    in_run = tile - first_of_run
    num_groups = jnp.maximum(1, lax.div(count + (cut.group - 1), jnp.int32(cut.group)))
    # Group n of a run begins at its tile count * n / num_groups, so this is the group of tile in_run.
    in_group = lax.div((in_run + 1) * num_groups - 1, jnp.maximum(1, count))
    return (
        expert if first_expert is None else expert + first_expert,
        start + in_run * cut.size,
        start + real,
        start + rows,
        first_of_run + lax.div(count * in_group, num_groups),
        first_of_run + lax.div(count * (in_group + 1), num_groups),
    )


def _of_call(sizes: jax.Array, cut: Cut) -> tuple[jax.Array, ...]:
    """The six values behind them: tiles in use, the end of the last run's blocks, the first tile to do."""
    aligned, counts = _runs(sizes, cut)
    starts = jnp.cumsum(aligned) - aligned
    left_out = jnp.clip(lax.div(cut.first_row - starts, jnp.int32(cut.size)), 0, counts)
    nothing = jnp.zeros_like(jnp.sum(sizes, dtype=jnp.int32))
    sums = (jnp.sum(values, dtype=jnp.int32) for values in (counts, aligned, left_out))
    return (*sums, nothing, nothing, nothing)


def _runs(sizes: jax.Array, cut: Cut) -> tuple[jax.Array, jax.Array]:
    """Rows of every run with its blocks' padding, and its tiles."""
    aligned = lax.div(sizes + (cut.block - 1), jnp.int32(cut.block)) * cut.block
    return aligned, lax.div(aligned + (cut.size - 1), jnp.int32(cut.size))
