"""``jax-moriep tune``: measures how the Triton kernels are best cut on a GPU, and makes a table of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep.bench.kinds.products import of_triton
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.measure.programs import on_device
from jax_moriep.bench.measure.turns import in_a_row
from jax_moriep.bench.problem.shares import Data, Share
from jax_moriep.errors import ConfigError, rule
from jax_moriep.experts.pallas.launch import Tile
from jax_moriep.experts.pallas.triton import tuning

BLOCK_AND_ROWS = {"few": (8, 32), "some": (32, 160), "many": (128, 1024)}
"""What stands for a class of ``tuning.CLASSES``: rows per block, and rows of each expert."""


def candidates(kernel: str, name: str) -> list[Tile]:
    """The tiles that are tried for a kernel and a class. gate_up has twice as many sums as columns say."""
    half = 2 if kernel == "gate_up" else 1
    cut: Any
    of_rows = kernel in ("dw1", "dw2")
    if name == "few" and not of_rows:
        cut = itertools.product((16, 32, 64), (64, 128), (64, 128), (4,), (3, 4), (None,))
    elif of_rows:
        depths = {"few": (32,), "some": (32, 64), "many": (64,)}[name]
        cut = [
            *itertools.product((128,), (256,), depths, (8,), (3, 4), (None, 132, 264)),
            *itertools.product((128,), (128,), depths, (4,), (3,), (None, 264)),
        ]
    elif name == "some":
        cut = itertools.product((64, 128), (128, 256), (64,), (4, 8), (3, 4), (None,))
    else:
        cut = itertools.product((128,), (128, 256), (64,), (8,), (3, 4), (None, 132))
    return [Tile(rows, cols // half, *others) for rows, cols, *others in cut]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The sizes: L, H and I."""

    experts: int
    hidden: int
    intermediate: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(rule(f"--{name}", value, "be at least 1", "pass a positive number"))


def run(asked: Asked, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures every kernel and class on this process's first GPU; see ``Study``.

    Returns:
      What ``tuning.table`` reads: the device's kind and its tiles.

    Raises:
      ConfigError: there is no GPU.
    """
    if jax.default_backend() != "gpu":
        raise ConfigError(rule("platform", jax.default_backend(), "be a GPU", "run tune on one"))
    kernels: dict[str, dict[str, Any]] = {kernel: {} for kernel in tuning.KERNELS}
    for name, (block, rows) in BLOCK_AND_ROWS.items():
        share = Share(asked.experts, asked.hidden, asked.intermediate, asked.experts * rows)
        data = Data.of(share, np.full(share.experts, rows, np.int32), block)
        shape = data.operands[0].shape[0], share.inner
        act = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
        pre = jax.random.normal(jax.random.key(2), (shape[0], 2 * share.inner), jnp.bfloat16)
        for kernel in tuning.KERNELS:
            tile, seconds, tried = _best(data, kernel, candidates(kernel, name), act, pre)
            kernels[kernel][name] = tuning.as_entry(tile)
            say(f"{kernel} {name}: {seconds * 1e3:.3f} ms, the best of {tried}: {tile}")
    table = {"devices": {jax.devices()[0].device_kind: kernels}, "jax": jax.__version__}
    save(table)
    return table


def _best(
    data: Data, kernel: str, tiles: list[Tile], act: jax.Array, pre: jax.Array
) -> tuple[Tile, float, int]:
    """The fastest tile, its seconds, and how many could run: one that needs too much memory cannot."""
    sizes = data.operands[2]
    operands_of: dict[Tile, tuple[jax.Array, ...]] = {}
    with contextlib.closing(Pool()) as pool:
        for tile in tiles:
            fn, operands = of_triton(data, kernel, tile, act, pre)
            operands_of[tile] = (sizes, *operands)
            pool.start(tile, on_device(fn, operands_of[tile]))
        calls: dict[Tile, Callable[[], Any]] = {}
        for tile in tiles:
            # Any other error is one of the program.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                calls[tile] = functools.partial(pool.get(tile).begin, *operands_of[tile])
    timed = [(in_a_row(call, 5, 3), i, tile) for i, (tile, call) in enumerate(calls.items())]
    seconds, _, tile = min(timed)
    return tile, seconds, len(timed)
