"""Programs for ``bench kernels``: compiled in threads, repeated on the device, timed by turns."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jax_moriep.bench.measure.turns import repeated

MOST_TIMES = 400


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is timed: ``run`` does the work ``times`` times, to its end."""

    run: Callable[[], Any]
    times: int


class Programs:
    """Compiled programs by key; a key's program is compiled once and serves all operands of its shapes.

    XLA tries matmul algorithms on the GPU while it compiles. Programs with matmuls of XLA's own are therefore
    compiled one after the other, beside those that need no GPU to be compiled.
    """

    def __init__(self) -> None:
        self._free = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
        self._on_gpu = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile-on-gpu")
        self._futures: dict[Any, concurrent.futures.Future[Any]] = {}

    def start(
        self,
        key: Any,
        fn: Callable[..., Any],
        operands: Sequence[jax.Array],
        times: int | None,
        *,
        on_gpu: bool = False,
    ) -> None:
        """Begins to compile fn(*operands), repeated if ``times`` is given; the first with a key counts."""
        if key in self._futures:
            return
        # Shapes alone, so that nothing here keeps the operands' memory.
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        jitted = jax.jit(fn if times is None else repeated(fn, times))
        pool = self._on_gpu if on_gpu else self._free
        self._futures[key] = pool.submit(lambda: jitted.lower(*shapes).compile())

    def get(self, key: Any) -> Callable[..., Any]:
        """The compiled program; raises what compiling raised."""
        return self._futures[key].result()

    def in_background(self, fn: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Runs anything beside the compilers."""
        return self._free.submit(fn)

    def wait(self) -> None:
        """Waits until nothing is being compiled."""
        concurrent.futures.wait(self._futures.values())

    def close(self) -> None:
        """Ends the threads; what has not begun is not compiled."""
        for pool in (self._free, self._on_gpu):
            pool.shutdown(wait=True, cancel_futures=True)


def times_for(seconds_each: float, seconds: float) -> int:
    """How often a program repeats work that takes ``seconds_each``, to take about ``seconds``."""
    return max(1, min(MOST_TIMES, round(seconds / seconds_each)))


def bound(program: Callable[..., Any], operands: Sequence[jax.Array], times: int) -> Timed:
    """A compiled program with its operands."""
    return Timed(lambda: jax.block_until_ready(program(*operands)), times)


def by_turns(calls: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds of one repetition of each: in every round all run once, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call.run()
            taken = (time.perf_counter() - began) / call.times
            if round_:
                seconds[name].append(taken)
    return seconds


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The median, the least and the most."""
    return {
        "ms": statistics.median(seconds) * 1e3,
        "ms_min": min(seconds) * 1e3,
        "ms_max": max(seconds) * 1e3,
    }


def seconds_of(call: Callable[[], Any], calls: int = 3) -> float:
    """Seconds of a call by a few in a row, the first left out; ``call`` returns before its work is done."""
    jax.block_until_ready(call())
    began = time.perf_counter()
    result = None
    for _ in range(calls):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / calls
