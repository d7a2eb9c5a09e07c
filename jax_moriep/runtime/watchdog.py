"""Ends a process whose program waits for ever beside an exchange that has failed; the last resort.

XLA reports the error of a custom call when every operation of its program has ended. A collective of jax's
own that waits for a missing rank does not end, so the error that names the rank would never be seen. Where a
group has failed and the program that was running then has not ended after the time limit, the text is printed
and the process ends.

A program runs while an array that it computes is not ready. XLA runs small programs inside the call, so it
also runs while the main thread is inside a call of jax and executes no Python at all; that the thread
sleeps, or waits for a person or a child, does not count. At the end of the process, when jax has given up its
devices, only that thread counts.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_moriep.runtime import settings

_INTERVAL_SECONDS = 0.5
EXIT_CODE = 70  # EX_SOFTWARE


class _Watched(NamedTuple):
    platform: str
    trouble: Callable[[], str | None]


class _Running(NamedTuple):
    """What a process is at."""

    since: float
    arrays: list[weakref.ref[Any]]
    python_runs: int

    @classmethod
    def now(cls, platform: str) -> _Running:
        # jax would open its devices anew, to no end but an error of its own.
        live = [] if _leaving.is_set() else jax.live_arrays(platform)
        arrays = [weakref.ref(array) for array in live if _is_unready(array)]
        return cls(time.monotonic(), arrays, _main_thread.runs())

    def goes_on(self) -> bool:
        stands_still = _main_thread.runs() == self.python_runs and _main_thread.is_inside_jax()
        return stands_still or any(_is_unready(ref()) for ref in self.arrays)


class _MainThread:
    """Counts the times at which the main thread was seen to execute Python.

    The interpreter runs a pending call in the main thread when that comes to its next bytecode, and not while
    it is inside a C function.
    """

    def __init__(self) -> None:
        self._runs, self._pending = 0, False
        self._call = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._mark)

    def runs(self) -> int:
        if not self._pending:
            self._pending = ctypes.pythonapi.Py_AddPendingCall(self._call, None) == 0
        return self._runs

    def is_inside_jax(self) -> bool:
        """Whether it waits for jax, as far as its Python frames tell: not for a person, a lock or a child."""
        if _leaving.is_set():
            return True
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            if frame.f_globals.get("__name__", "").partition(".")[0] in ("jax", "jaxlib"):
                return True
            frame = frame.f_back
        return False

    def _mark(self, argument: int | None) -> int:
        del argument
        self._runs += 1
        self._pending = False
        return 0


_main_thread = _MainThread()
_leaving = threading.Event()
_watched: dict[str, _Watched] = {}
_lock = threading.Lock()


def watch(name: str, platform: str, trouble: Callable[[], str | None]) -> None:
    """Watches a group from now on.

    Args:
      name: of the group; a later one of the same name replaces it.
      platform: of its devices, as jax names it.
      trouble: what has happened to the group that lets a program wait for ever, or None.
    """
    if not settings.WATCHDOG.value():
        return
    with _lock:
        first = not _watched
        _watched[name] = _Watched(platform, trouble)
    if first:
        # It runs before what jax has registered.
        atexit.register(_leaving.set)
        threading.Thread(target=_run, daemon=True, name="moriep-watchdog").start()


def _run() -> None:
    running: dict[str, _Running] = {}
    while True:
        time.sleep(_INTERVAL_SECONDS)
        with _lock:
            groups = list(_watched.items())
        for name, group in groups:
            text = group.trouble()
            if text is None:
                running.pop(name, None)
            elif name not in running or not running[name].goes_on():
                running[name] = _Running.now(group.platform)
            elif time.monotonic() - running[name].since > settings.TIMEOUT.value():
                _end(text)


def _is_unready(array: Any) -> bool:
    return array is not None and not array.is_deleted() and not array.is_ready()


def _end(text: str) -> None:
    print(  # noqa: T201 - the process ends here, and has nobody to raise to
        f"jax_moriep: {text}; a program of this process still waits {settings.TIMEOUT.value():g} s later, "
        "in an operation outside the exchange, such as a collective of jax's own that a missing rank does "
        "not join; ending the process (JAX_MORIEP_WATCHDOG=0 would let it wait)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT_CODE)
