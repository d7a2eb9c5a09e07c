"""The floors under what is compared: copies, collectives and products of the same bytes and FLOPs."""

from __future__ import annotations

import ctypes
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_moriep.bench.against import copies
from jax_moriep.bench.measure.calls import Entry, local_call
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import DENSE_COPY_READ, READ
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
    rows = _rows_that_move(case)

    def make() -> tuple[jax.Array, jax.Array]:
        return jnp.ones((rows, case.hidden), case.numpy_dtype), jnp.full(1, -1, case.numpy_dtype)

    placed = functools.cache(lambda: world.make(make, P(AXIS)))
    fastest = copies.fastest_copy()
    copy = functools.partial(_passes, fastest.run, times)
    entry = Entry("copy", operation, case, world)
    return local_call(entry, copy, jax.eval_shape(make), placed, how=fastest.told)


def _passes(run: copies.Pass, times: int, x: jax.Array, factor: jax.Array) -> jax.Array:
    for _ in range(times):
        x = lax.optimization_barrier(run(x, factor))
    return x


def _rows_that_move(case: Case) -> int:
    """Half of T and T*K: what is read, and as much is written."""
    return case.tokens * (1 + case.top_k) // 2


def read(operation: str, case: Case, world: World, used: float) -> Call:
    """The fastest sum over as many bytes as the weights of ``used`` experts have, in each of the layers.

    A program reads those of all layers, so that no cache has them when it runs again.
    """
    elements = int(used * 3 * case.hidden * case.intermediate)

    def make() -> tuple[jax.Array, ...]:
        # Ones would draw less power than numbers, and run at higher clocks.
        keys = jax.random.split(jax.random.key(0), case.layers)
        numbers = [jax.random.normal(key, (elements,), case.numpy_dtype) for key in keys]
        return *numbers, jnp.ones(1, case.numpy_dtype)

    placed = functools.cache(lambda: world.make(make, P(AXIS)))
    fastest = copies.fastest_sum()

    def total(*given: jax.Array) -> list[jax.Array]:
        return [fastest.run(x, given[-1]) for x in given[:-1]]

    entry = Entry(READ, operation, case, world)
    call = local_call(entry, total, jax.eval_shape(make), placed, how=fastest.told)
    return dataclasses.replace(call, repeats=call.repeats * case.layers)


def dense_copy(name: str, operation: str, case: Case, world: World) -> Call:
    """The layer of one rank as dense products of its FLOPs, and copies of the bytes of permute and combine.

    Forward the router's product and two of experts, and twice as many more with the gradients; two copies,
    and two more. These products read the weights of one expert. ``DENSE_COPY_READ`` reads those of all others
    too; with gradients twice, and writes as many.
    """
    rows, hidden, inner = case.tokens * case.top_k, case.hidden, case.intermediate
    backward = "+" in operation
    copy, total = copies.fastest_copy(), copies.fastest_sum()

    def make() -> dict[str, jax.Array]:
        sizes = {"x": (rows, hidden), "act": (rows, inner), "w1": (2 * inner, hidden), "w2": (hidden, inner)}
        sizes.update(tokens=(case.tokens, hidden), router=(hidden, case.routed_experts))
        sizes.update(moved=(_rows_that_move(case), hidden))
        if backward:
            sizes.update(d_out=(rows, hidden), d_pre=(rows, 2 * inner))
            sizes.update(d_logits=(case.tokens, case.routed_experts))
        if name == DENSE_COPY_READ:
            sizes.update(others=(2, max(1, (case.experts - 1) * 3 * hidden * inner // 2)))
        # Ones would draw less power than numbers, and run at higher clocks.
        keys = jax.random.split(jax.random.key(0), len(sizes))
        made = {
            name: jax.random.normal(key, size, case.numpy_dtype)
            for key, (name, size) in zip(keys, sizes.items(), strict=True)
        }
        return {**made, "factor": jnp.full(1, -1, case.numpy_dtype)}

    def work(given: dict[str, jax.Array]) -> list[jax.Array]:
        tokens, factor = given["tokens"], given["factor"]
        results = [tokens @ given["router"], given["x"] @ given["w1"].T, given["act"] @ given["w2"].T]
        if backward:
            d_out, d_pre, d_logits = given["d_out"], given["d_pre"], given["d_logits"]
            results += [
                d_logits @ given["router"].T,
                tokens.T @ d_logits,
                d_out @ given["w2"],
                d_pre @ given["w1"],
                d_pre.T @ given["x"],
                d_out.T @ given["act"],
            ]
        if name == DENSE_COPY_READ:
            others = given["others"]
            results += [total.run(others, factor)]
            if backward:
                # As many bytes as all have are read and written together.
                again, half = lax.optimization_barrier((others, others[0]))
                results += [total.run(again, factor), copy.run(half, factor)]
        return [*results, _passes(copy.run, 4 if backward else 2, given["moved"], factor)]

    placed = functools.cache(lambda: (world.make(make, P(AXIS)),))
    entry, shapes = Entry(name, operation, case, world), (jax.eval_shape(make),)
    return local_call(entry, work, shapes, placed, alone=True, how=copy.told)
