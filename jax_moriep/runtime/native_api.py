"""The C functions of a backend's library by which Python opens groups: ``csrc/include/moriep/c_api.h``."""

from __future__ import annotations

import atexit
import ctypes
import functools
from collections.abc import Callable
from typing import Any

from jax_moriep.errors import TransportError
from jax_moriep.runtime import library

ADDRESS_WORDS = 12
"""int64 words of a rank's address, by which other processes reach its memory."""
CONNECTED, FAILED = 2, 3
"""States of a group; 0 is one that is not open."""
_ERROR_BYTES = 1024


@functools.cache
def loaded(backend: str) -> ctypes.CDLL:
    """A backend's library, whose functions know their types.

    Raises:
      LibraryError: it is missing or does not fit.
    """
    lib = library.load(backend)
    i64, i32, text = ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p
    i64_array = ctypes.POINTER(i64)
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "moriep_group_open": (
            i32,
            [text, i64, i64, i64_array, ctypes.POINTER(ctypes.c_uint8), ctypes.c_double, text, i64],
        ),
        "moriep_group_address": (i32, [text, i64, i64, i64_array, text, i64]),
        "moriep_group_connect": (i32, [text, i64, i64, i64_array, text, i64]),
        "moriep_group_connect_failed": (None, [text, i64, text]),
        "moriep_group_state": (i32, [text]),
        "moriep_group_failure": (i32, [text, text, i64]),
        "moriep_close_all": (None, []),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    # Peers that still wait for this process learn that it left in good order, instead of finding it dead.
    atexit.register(lib.moriep_close_all)
    return lib


def call(function: Callable[..., int], *arguments: Any) -> None:
    """Calls a library function whose last arguments are a buffer for an error's text and its size.

    Raises:
      TransportError: it gave another code than 0; with the text.
    """
    buffer = ctypes.create_string_buffer(_ERROR_BYTES)
    if function(*arguments, buffer, _ERROR_BYTES):
        raise TransportError(buffer.value.decode(errors="replace"))


def failure(native: ctypes.CDLL, name: str) -> str | None:
    """Why a backend's group of this process has failed, or None."""
    buffer = ctypes.create_string_buffer(_ERROR_BYTES)
    failed = native.moriep_group_failure(name.encode(), buffer, _ERROR_BYTES)
    return buffer.value.decode(errors="replace") if failed else None


def check_group(native: ctypes.CDLL, name: str) -> None:
    """Raises TransportError if a backend's group of this process has failed."""
    if (why := failure(native, name)) is not None:
        raise TransportError(why)


def has_failed(native: ctypes.CDLL, name: str) -> bool:
    """Whether a backend's group of this process has failed."""
    return native.moriep_group_state(name.encode()) == FAILED
