"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def read() -> dict[str, int]:
    """Bytes: ``VmRSS`` resident now, ``VmHWM`` the most that ever were, ``RssShmem`` of now, shared."""
    found = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssShmem"):
            found[name] = int(value.split()[0]) * 1024
    return found


def peak_during(run: Callable[[], None]) -> dict[str, int]:
    """Runs something and tells the most memory that was resident meanwhile.

    Returns:
      Bytes: ``idle`` before it, ``peak`` during it, ``shared`` after it, which other processes may map too.
    """
    idle = read()["VmRSS"]
    _CLEAR_REFS.write_text(_RESET_PEAK)
    run()
    after = read()
    return {"idle": idle, "peak": after["VmHWM"], "shared": after["RssShmem"]}
