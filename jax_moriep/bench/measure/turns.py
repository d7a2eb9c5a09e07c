"""Timing by turns: A B C A B C ..., so that whatever disturbs the machine disturbs all that is compared."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_moriep.bench.measure.programs import Program
from jax_moriep.bench.problem.checks import Check

Span = tuple[float, float]
"""Start and end of a call, in seconds of the clock that all processes of a machine share."""


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
      how: a line about how it does so, where that was chosen in this run; "" where there is nothing to tell.
      memory: bytes that it has while it runs, beside its operands and results; None where it cannot tell.
    """

    name: str
    operation: str
    run: Callable[[], Any]
    check: Callable[[Any], list[Check]] = lambda result: []
    repeats: int = 1
    once: Callable[[], Any] | None = None
    programs: tuple[Program, ...] = ()
    how: Callable[[], str] = str
    memory: Callable[[], int | None] = lambda: None


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
            {
                "name": call.name,
                "operation": call.operation,
                "repeats": call.repeats,
                "how": call.how(),
                "memory": call.memory(),
                "spans": of_call,
            }
            for call, of_call in zip(calls, spans, strict=True)
        ],
        "checks": [{**dataclasses.asdict(check), "ok": check.ok} for check in checks],
    }


def by_turns(calls: Sequence[Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of one repetition of each call, by name: ``interleave`` in one process, after one round that
    does not count."""
    spans, _ = interleave(calls, rounds, 1, lambda: None)
    return {
        call.name: [(end - start) / call.repeats for start, end in of_call]
        for call, of_call in zip(calls, spans, strict=True)
    }


def in_a_row(call: Callable[[], Any], calls: int = 3, rounds: int = 1) -> float:
    """Seconds of a call by a few in a row, the first left out: the median of some rounds.

    For choices among settings, where nothing is compared by turns. ``call`` returns before its work is done.
    """
    jax.block_until_ready(call())
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        result = None
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - began) / calls)
    return statistics.median(taken)
