"""Timing by turns: A B C A B C ..., so that whatever disturbs the machine disturbs all that is compared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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
    """

    name: str
    operation: str
    run: Callable[[], Any]
    check: Callable[[Any], list[Check]] = lambda result: []


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
                checks += call.check(result)
            del result
    return spans, checks


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
