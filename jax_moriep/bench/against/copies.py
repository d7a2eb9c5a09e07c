"""How fast memory is: copies and sums of many bytes by several programs, of which a run takes the fastest.

XLA's own elementwise pass does not reach what a copy kernel does: a floor made of it would be too kind.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_moriep.bench.measure.programs import on_device
from jax_moriep.bench.measure.turns import in_a_row
from jax_moriep.runtime import compat

Pass = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, factor [1]) -> what a pass over x gives: as many values again, or sums of them."""

XLA = "XLA"
_TRIED_BYTES = 1 << 30
_TRIED_TIMES = 8
_TILES = ((2048, 4), (4096, 4), (8192, 8), (16384, 8))
"""Bytes are read 16 a thread and time; a tile of so many values of two bytes, and warps."""


@dataclasses.dataclass(frozen=True)
class Fastest:
    """The fastest of some passes.

    Attributes:
      name: of it.
      run: the pass.
      tb_per_s: what each reached, bytes read and written; {} where none was measured.
    """

    name: str
    run: Pass
    tb_per_s: Mapping[str, float]

    @property
    def told(self) -> str:
        """It and all that were tried, in a line."""
        tried = ", ".join(f"{name} {rate:.2f}" for name, rate in self.tb_per_s.items())
        return f"{self.name}, of TB/s: {tried}" if tried else self.name


@functools.cache
def fastest_copy() -> Fastest:
    """Of all copies, by measuring them once in this process; without a GPU XLA's."""
    return _fastest(_copies(), 2)


@functools.cache
def fastest_sum() -> Fastest:
    """Of all that read and write next to nothing; likewise."""
    return _fastest(_sums(), 1)


def _copies() -> dict[str, Pass]:
    tiled = {_named(tile): functools.partial(_tiled, _copy_kernel, *tile, False) for tile in _TILES}
    # Each value has a factor that XLA does not know, or it would see that nothing is changed.
    return {XLA: lambda x, factor: x * factor, **tiled}


def _sums() -> dict[str, Pass]:
    tiled = {_named(tile): functools.partial(_tiled, _sum_kernel, *tile, True) for tile in _TILES}
    return {XLA: lambda x, factor: jnp.sum(x.astype(jnp.float32)) * factor.astype(jnp.float32), **tiled}


def _named(tile: tuple[int, int]) -> str:
    return f"Triton, {tile[0]} values by {tile[1]} warps"


def _fastest(passes: dict[str, Pass], moved: int) -> Fastest:
    if jax.default_backend() != "gpu":
        return Fastest(XLA, passes[XLA], {})
    x = jax.random.normal(jax.random.key(3), (_TRIED_BYTES // 2,), jnp.bfloat16)
    factor = jnp.full(1, 2, x.dtype)
    rates = {}
    for name, run in passes.items():
        program = on_device(run, (x, factor), _TRIED_TIMES)
        seconds = in_a_row(functools.partial(program.begin, x, factor), rounds=3) / _TRIED_TIMES
        rates[name] = moved * _TRIED_BYTES / seconds / 1e12
    name = max(rates, key=lambda name: rates[name])
    return Fastest(name, passes[name], rates)


def _tiled(
    kernel: Callable[..., None],
    size: int,
    warps: int,
    sums: bool,
    x: jax.Array,
    factor: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """A program for each tile of the values, whatever x's shape."""
    del factor
    # As many bytes whatever the dtype.
    size = max(1, 2 * size // x.dtype.itemsize)
    programs = -(-x.size // size)
    result = ((programs,), jnp.float32) if sums else ((x.size,), x.dtype)
    found = pl.pallas_call(
        functools.partial(kernel, size, x.size),
        out_shape=compat.result_type(x, *result),
        grid=(programs,),
        name="bench_sum" if sums else "bench_copy",
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    )(x.reshape(-1))
    return found if sums else found.reshape(x.shape)


def _copy_kernel(size: int, count: int, x_ref: Any, out_ref: Any) -> None:
    at, mask = _tile(size, count)
    plgpu.store(out_ref.at[at], plgpu.load(x_ref.at[at], mask=mask), mask=mask)


def _sum_kernel(size: int, count: int, x_ref: Any, out_ref: Any) -> None:
    at, mask = _tile(size, count)
    values = plgpu.load(x_ref.at[at], mask=mask, other=None if mask is None else 0)
    out_ref[pl.program_id(0)] = jnp.sum(values.astype(jnp.float32))


def _tile(size: int, count: int) -> tuple[Any, jax.Array | None]:
    first = pl.program_id(0) * size
    mask = None if count % size == 0 else first + jnp.arange(size) < count
    return pl.ds(first, size), mask
