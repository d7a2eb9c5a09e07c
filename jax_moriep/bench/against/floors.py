"""The floors under what is compared: copies, collectives and products of the same bytes and FLOPs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_moriep.bench.measure.calls import Entry, local_call
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import DENSE_COPY
from jax_moriep.bench.problem.traffic import Traffic
from jax_moriep.bench.problem.world import AXIS, World

_ALIGNMENT = 256


def of_exchange(name: str, operation: str, case: Case, world: World, moved: Traffic) -> Call:
    """The floor of a name under an operation of the exchange."""
    times = 2 if "+" in operation else 1
    match name:
        case "memcpy":
            return _memcpy(operation, times, world, moved)
        case "nccl":
            return _all_to_all(operation, times, case, world, moved)
        case _:
            return _copy(operation, times, case, world)


def _memcpy(operation: str, times: int, world: World, moved: Traffic) -> Call:
    """One copy, by each rank at the same time, of as many bytes as it receives, between two warm buffers."""
    buffers = [
        (np.ones(moved.received[r], np.uint8), np.ones(moved.received[r], np.uint8)) for r in world.ranks
    ]

    def copy(pair: tuple[np.ndarray, np.ndarray]) -> None:
        for to, source in (pair, pair[::-1])[:times]:
            ctypes.memmove(to.ctypes.data, source.ctypes.data, source.size)

    return Call(
        "memcpy", operation, functools.partial(world.together, [functools.partial(copy, b) for b in buffers])
    )


def _all_to_all(operation: str, times: int, case: Case, world: World, moved: Traffic) -> Call:
    """A collective of as many bytes as the ranks send each other, in equal parts."""
    part = int(moved.remote.mean()) // (case.ranks - 1)
    part = -(-max(1, part) // _ALIGNMENT) * _ALIGNMENT

    def exchange(x: jax.Array) -> jax.Array:
        for _ in range(times):
            x = lax.all_to_all(x, AXIS, 0, 0, tiled=True)
        return x

    def make() -> jax.Array:
        return jnp.zeros((case.ranks**2, part), jnp.uint8)

    placed = functools.cache(lambda: (world.make(make, P(AXIS)),))
    return local_call(Entry("nccl", operation, case, world), exchange, (jax.eval_shape(make),), placed)


def _copy(operation: str, times: int, case: Case, world: World) -> Call:
    """An elementwise pass that reads and writes as many bytes as the rows that must be read and written."""
    make_rows = _rows_that_move(case)

    def make() -> tuple[jax.Array, jax.Array]:
        return make_rows(), jnp.full(1, -1, case.numpy_dtype)

    placed = functools.cache(lambda: world.make(make, P(AXIS)))
    copy = functools.partial(_passes, times)
    return local_call(Entry("copy", operation, case, world), copy, jax.eval_shape(make), placed)


def _passes(times: int, x: jax.Array, factor: jax.Array) -> jax.Array:
    for _ in range(times):
        x = lax.optimization_barrier(x * factor)
    return x


def _rows_that_move(case: Case) -> Callable[[], jax.Array]:
    """Half of T and T*K rows: what is read, and as much is written."""
    rows = case.tokens * (1 + case.top_k) // 2
    return lambda: jnp.ones((rows, case.hidden), case.numpy_dtype)


def dense_copy(operation: str, case: Case, world: World) -> Call:
    """The layer of one rank as dense products of its FLOPs, and copies of the bytes of permute and combine.

    Forward two products, and four more with the gradients; two copies, and two more.
    """
    rows, hidden, inner = case.tokens * case.top_k, case.hidden, case.intermediate
    backward = "+" in operation
    make_moved = _rows_that_move(case)

    def make() -> dict[str, jax.Array]:
        sizes = {"x": (rows, hidden), "act": (rows, inner), "w1": (2 * inner, hidden), "w2": (hidden, inner)}
        if backward:
            sizes.update(d_out=(rows, hidden), d_pre=(rows, 2 * inner))
        # Ones would draw less power than numbers, and run at higher clocks.
        keys = jax.random.split(jax.random.key(0), len(sizes))
        made = {
            name: jax.random.normal(key, size, case.numpy_dtype)
            for key, (name, size) in zip(keys, sizes.items(), strict=True)
        }
        return {**made, "moved": make_moved(), "factor": jnp.full(1, -1, case.numpy_dtype)}

    def work(given: dict[str, jax.Array]) -> list[jax.Array]:
        results = [given["x"] @ given["w1"].T, given["act"] @ given["w2"].T]
        if backward:
            d_out, d_pre = given["d_out"], given["d_pre"]
            results += [
                d_out @ given["w2"],
                d_pre @ given["w1"],
                d_pre.T @ given["x"],
                d_out.T @ given["act"],
            ]
        return [*results, _passes(4 if backward else 2, given["moved"], given["factor"])]

    placed = functools.cache(lambda: (world.make(make, P(AXIS)),))
    shapes = (jax.eval_shape(make),)
    return local_call(Entry(DENSE_COPY, operation, case, world), work, shapes, placed, alone=True)
