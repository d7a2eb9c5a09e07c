"""How this process's allocator treats large buffers that are freed.

By default glibc gives each back to the system, and every step then takes page faults for all of XLA's buffers
anew, which can cost more than the step's copies.
"""

from __future__ import annotations

import ctypes
import functools
import os

from jax_moriep.runtime import settings

# The parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**31 - 1
"""The largest value that mallopt takes: buffers from 2 GiB on still go back to the system."""
_OLD_MMAP_THRESHOLD = 2**25
"""32 MiB, for a glibc that refuses more."""
_USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@functools.cache
def keep_freed() -> bool:
    """Lets glibc keep large buffers that are freed, for the rest of this process.

    Does nothing where ``JAX_MORIEP_KEEP_MEMORY`` is 0, where the user has set glibc's own variables for it,
    or where the C library is another one.

    Returns:
      Whether it was done.

    Raises:
      TransportError: ``JAX_MORIEP_KEEP_MEMORY`` is neither 0 nor 1.
    """
    if not settings.KEEP_MEMORY.value() or _set_by_user():
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    kept = any(libc.mallopt(_M_MMAP_THRESHOLD, size) for size in (_KEPT_BYTES, _OLD_MMAP_THRESHOLD))
    return bool(kept and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))


def _set_by_user() -> bool:
    if any(name in os.environ for name in _USERS_OWN):
        return True
    return "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
