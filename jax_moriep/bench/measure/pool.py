"""The pool that compiles programs in threads, for every kind of run."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from jax_moriep.bench.measure.programs import Program

_COMPILERS = 8
_ERROR_CHARACTERS = 1500


class Pool:
    """Compiled programs by key; a key's program is compiled once and serves all operands of its shapes.

    XLA tries matmul algorithms on the device while it compiles. Programs with matmuls of XLA's own, which
    are ``alone``, are therefore compiled one after the other, beside those that need no device for it.

    Args:
      workers: threads; None for as many as Python thinks fit.
    """

    def __init__(self, workers: int | None = None) -> None:
        self._free = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="compile")
        self._on_device = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile-alone")
        self._programs: dict[Any, Program] = {}
        self._futures: dict[Any, concurrent.futures.Future[None]] = {}

    def start(self, key: Any, program: Program) -> None:
        """Begins to compile; the first program with a key counts."""
        if key in self._futures:
            return
        self._programs[key] = program
        executor = self._on_device if program.alone else self._free
        self._futures[key] = executor.submit(program.compile)

    def get(self, key: Any) -> Program:
        """The compiled program; waits for it, and raises what compiling raised."""
        self._futures[key].result()
        return self._programs[key]

    def error(self, key: Any) -> BaseException | None:
        """What compiling raised; waits for it."""
        return self._futures[key].exception()

    def in_background(self, fn: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Runs anything beside the compilers."""
        return self._free.submit(fn)

    def wait(self) -> None:
        """Waits until nothing is being compiled."""
        concurrent.futures.wait(self._futures.values())

    def close(self) -> None:
        """Ends the threads; what has not begun is not compiled."""
        for executor in (self._free, self._on_device):
            executor.shutdown(wait=True, cancel_futures=True)


def prepare(groups: Sequence[Sequence[Program]]) -> list[str | None]:
    """Compiles programs of all processes, some at a time, those that must be alone behind all others.

    Args:
      groups: programs that are of use together only.

    Returns:
      For each group None, or the text of the error that one of its programs met.
    """
    errors: list[str | None] = [None] * len(groups)
    free, alone = [], []
    with contextlib.closing(Pool(max(1, min(_COMPILERS, len(os.sched_getaffinity(0)) // 2)))) as pool:
        for i, group in enumerate(groups):
            for program in group:
                try:
                    # Here and not in the threads, because all processes must trace in the same order.
                    program.lower()
                except Exception as e:  # noqa: BLE001 - recorded, and the others go on
                    errors[i] = describe(e)
                    break
                if program.alone:
                    alone.append((i, program))
                else:
                    free.append((i, program))
                    pool.start(program, program)
        pool.wait()
        for _, program in alone:
            pool.start(program, program)
        for i, program in (*free, *alone):
            error = pool.error(program)
            if error is not None:
                errors[i] = errors[i] or describe(error)
    return errors


def describe(error: BaseException) -> str:
    """An error in one paragraph: some of XLA's have pages."""
    return f"{type(error).__name__}: {(str(error).strip() or repr(error))[:_ERROR_CHARACTERS]}"
