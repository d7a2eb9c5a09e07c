"""Timing by turns: A B C A B C ..., so that whatever disturbs the machine disturbs all that is compared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_moriep.runtime import compat

if TYPE_CHECKING:
    from jax_moriep.bench.measure.compiled import Program

_MOST_COPIED = 1 << 20
"""Bytes of an operand that may be copied in every run of a repeated program."""
_NEVER = -1.2345e37
"""No result is this number, but XLA cannot know."""

Span = tuple[float, float]
"""Start and end of a call, in seconds of the clock that all processes of a machine share."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A comparison of a result with what it must be.

    Attributes:
      name: of the implementation.
      operation: that gave the result.
      what: was compared, such as "rows of rank 2".
      error: largest difference.
      limit: largest difference that is right.
    """

    name: str
    operation: str
    what: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        """Whether the result is right; NaN is not."""
        return self.error <= self.limit


@dataclasses.dataclass(frozen=True)
class Call:
    """What is timed.

    Attributes:
      name: of the implementation.
      operation: what it does here, such as "dispatch".
      run: does it, to its end; what it returns is released outside the timing.
      check: compares what ``run`` returned with an oracle.
      repeats: how often ``run`` does it.
      once: does it once, for ``check``, where ``run`` does it several times and keeps nothing.
      programs: what ``run`` and ``once`` run, to be compiled ahead.
    """

    name: str
    operation: str
    run: Callable[[], Any]
    check: Callable[[Any], list[Check]] = lambda result: []
    repeats: int = 1
    once: Callable[[], Any] | None = None
    programs: tuple[Program, ...] = ()


def interleave(
    calls: Sequence[Call], iters: int, warmup: int, barrier: Callable[[], None]
) -> tuple[list[list[Span]], list[Check]]:
    """Runs all calls by turns, each after a barrier, and checks their first and their last results.

    Args:
      calls: what to run.
      iters: timed iterations.
      warmup: iterations before them.
      barrier: waits for all processes.

    Returns:
      The spans of the timed iterations for each call, and the checks.
    """
    spans: list[list[Span]] = [[] for _ in calls]
    checks: list[Check] = []
    last = warmup + iters - 1
    for iteration in range(warmup + iters):
        for call, of_call in zip(calls, spans, strict=True):
            barrier()
            start = time.clock_gettime(time.CLOCK_MONOTONIC)
            result = call.run()
            end = time.clock_gettime(time.CLOCK_MONOTONIC)
            if iteration >= warmup:
                of_call.append((start, end))
            if iteration in (0, last):
                checks += call.check(result if call.once is None else call.once())
            del result
    return spans, checks


def measured(calls: Sequence[Call], iters: int, warmup: int, barrier: Callable[[], None]) -> dict[str, Any]:
    """What ``interleave`` saw in this process, as its file has it: "calls" and "checks"."""
    spans, checks = interleave(calls, iters, warmup, barrier)
    return {
        "calls": [
            {"name": call.name, "operation": call.operation, "repeats": call.repeats, "spans": of_call}
            for call, of_call in zip(calls, spans, strict=True)
        ],
        "checks": [{**dataclasses.asdict(check), "ok": check.ok} for check in checks],
    }


def repeated(fn: Callable[..., Any], times: int) -> Callable[..., jax.Array]:
    """fn(*operands) many times in one program, so that the host's part of a call is paid once for all.

    Each run takes its operands behind the one before, and a value of each of its results is read. An element
    of a small operand also takes its value from a choice that the run before decides, always the same way. So
    XLA can neither merge, move nor leave out a run. Choosing and reading are a few small kernels a run, and
    part of its time. XLA may copy the operand that is changed, so a large one is left as it is wherever a
    barrier alone is enough.

    Args:
      fn: of arrays, gives arrays; inside ``shard_map`` it sees one rank's.
      times: how often.

    Returns:
      run(*operands) -> f32[1], a number that means nothing.
    """

    def run(*operands: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(operands)
        axes = frozenset().union(*(compat.varying_axes(leaf) for leaf in leaves))
        place = _smallest(leaves, axes)

        def once(_: jax.Array, carry: tuple[jax.Array, jax.Array | None]) -> tuple[Any, Any]:
            seen, chosen = carry
            now = list(leaves)
            if chosen is not None and place is not None:
                now[place] = chosen = nudged(chosen, seen)
            held, before = lax.optimization_barrier((jax.tree.unflatten(tree, now), seen))
            results = jax.tree.leaves(lax.optimization_barrier(fn(*held)))
            read = [leaf.reshape(-1)[:1].astype(jnp.float32) for leaf in results if leaf.size]
            return behind(before, compat.pcast_varying(sum(read, jnp.zeros(1, jnp.float32)), axes)), chosen

        start = compat.pcast_varying(jnp.zeros(1, jnp.float32), axes)
        chosen = None if place is None else leaves[place]
        return lax.fori_loop(0, times, once, (start, chosen))[0]

    return run


def barriers_hold() -> bool:
    """Whether XLA keeps optimization barriers; on CPUs it drops them, and moves what does not change."""
    return jax.default_backend() != "cpu"


def nudged(x: jax.Array, seen: jax.Array) -> jax.Array:
    """x, but XLA must take it for another one whenever ``seen`` is."""
    first = (0,) * x.ndim
    return x.at[first].set(jnp.where(seen[0] == _NEVER, jnp.zeros_like(x[first]), x[first]))


def behind(before: jax.Array, read: jax.Array) -> jax.Array:
    """``read``; that it needs ``before`` as well keeps the barrier from which that comes."""
    return jnp.where(before == _NEVER, before, read)


def _smallest(leaves: Sequence[Any], axes: frozenset[str]) -> int | None:
    """The place of the smallest array of numbers that varies over all axes; None if none may change."""
    fit = [
        (leaf.size * leaf.dtype.itemsize, i)
        for i, leaf in enumerate(leaves)
        if leaf.size and compat.varying_axes(leaf) == axes and jnp.issubdtype(leaf.dtype, jnp.number)
    ]
    if not fit:
        return None
    num_bytes, place = min(fit)
    return None if barriers_hold() and num_bytes > _MOST_COPIED else place


def slowest(spans: Sequence[Sequence[Span]]) -> np.ndarray:
    """Seconds of each iteration, from the first process's start to the last one's end.

    Processes that share too few cores do not leave a barrier together. The last one's own duration would
    leave out the time in which it waited for a core that another process's copy held, and that time is part
    of what the work costs here.

    Args:
      spans: of one call, for each process, for each iteration.

    Returns:
      f64[iterations].
    """
    of_process = np.asarray(spans, np.float64)
    return of_process[..., 1].max(axis=0) - of_process[..., 0].min(axis=0)


def percentile(seconds: np.ndarray, percent: float) -> float:
    """The smallest measured value that at least ``percent`` of the values do not exceed (nearest rank)."""
    ordered = np.sort(np.asarray(seconds, np.float64))
    place = max(1, int(np.ceil(percent / 100 * ordered.size)))
    return float(ordered[place - 1])
