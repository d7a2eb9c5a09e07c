"""What seconds that were measured come to: of processes, of iterations, of repetitions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_moriep.bench.measure.turns import Span

MOST_TIMES = 400


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


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the least and the most."""
    return {
        "ms": statistics.median(seconds) * 1e3,
        "ms_min": min(seconds) * 1e3,
        "ms_max": max(seconds) * 1e3,
    }


def joined(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls of a case, as all processes saw them."""
    return [_joined([of_process["calls"][i] for of_process in found]) for i in range(len(found[0]["calls"]))]


def _joined(of_process: list[dict[str, Any]]) -> dict[str, Any]:
    """One call, as all processes saw it; a time is that of one of its repeats."""
    spans = [call["spans"] for call in of_process]
    seconds = slowest(spans) / of_process[0]["repeats"]
    return {
        "name": of_process[0]["name"],
        "operation": of_process[0]["operation"],
        **{key: of_process[0][key] for key in ("how", "memory") if of_process[0].get(key)},
        "p50": percentile(seconds, 50),
        "p90": percentile(seconds, 90),
        "seconds": seconds.tolist(),
        "spans": np.swapaxes(np.asarray(spans), 0, 1).tolist(),
    }


def times_for(seconds_each: float, seconds: float) -> int:
    """How often a program repeats work that takes ``seconds_each``, to take about ``seconds``."""
    return max(1, min(MOST_TIMES, round(seconds / seconds_each)))
