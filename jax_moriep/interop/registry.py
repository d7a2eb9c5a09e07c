"""The names by which compiled programs know Python functions.

A program holds a name and never an address, so it is the same in every process that traces the same functions
in the same order. Names are kept, with their functions, for the life of the process: nobody can tell when the
last compiled program that holds one is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_functions: dict[str, Callable[..., Any]] = {}
_names: dict[tuple[int, ...], str] = {}
_counts: dict[str, int] = {}
_lock = threading.Lock()


def name_of(fn: Callable[..., Any]) -> str:
    """The name of a function: ``module.qualname``, and ``#n`` behind it for the n-th other one so named."""
    with _lock:
        key = _key(fn)
        if key not in _names:
            base = _describe(fn)
            count = _counts.get(base, 0)
            _counts[base] = count + 1
            name = f"{base}#{count}" if count else base
            _names[key] = name
            _functions[name] = fn
        return _names[key]


def function(name: str) -> Callable[..., Any]:
    """The function of a name.

    Raises:
      LookupError: this process has no such function, as when a program was deserialised.
    """
    try:
        return _functions[name]
    except KeyError:
        raise LookupError(
            f"this process has not registered the function {name}; before it runs a deserialised program, "
            "call dlpack_call(fn, result_shapes) with the function"
        ) from None


def _key(fn: Callable[..., Any]) -> tuple[int, ...]:
    """Tells functions apart by identity; the registry keeps them alive, so an id is not used again.

    ``object.method`` is a new object each time it is written, so of a method it is its two parts.
    """
    receiver = getattr(fn, "__self__", None)
    method = getattr(fn, "__func__", None)
    return (id(fn),) if receiver is None or method is None else (id(receiver), id(method))


def _describe(fn: Callable[..., Any]) -> str:
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}.{named.__qualname__}"
