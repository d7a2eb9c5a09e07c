"""The environment variables that steer the package: names, defaults, meanings and rules, all here.

Each is read where it is needed, and when: a variable that is set after the import counts. ``jax-moriep
doctor`` shows what is in force, and ``docs/settings.md`` is compared with this list by a test.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from jax_moriep.errors import TransportError, rule

Value = TypeVar("Value")
_PREFIX = "JAX_MORIEP_"
_MOST = 2**20
"""Of whole numbers; the same in C++."""
_MOST_SECONDS = 1e9
"""What threads and sockets can wait ends somewhere; this is thirty years, as in C++."""


@dataclasses.dataclass(frozen=True)
class Setting(Generic[Value]):
    """An environment variable.

    Attributes:
      name: of the variable.
      default: what holds where it is unset, for people.
      meaning: what it does, for people.
      must: what a value must be, as an error text goes on after "must be".
      parse: makes a value of a text; None where the text breaks the rule.
      unset: the value where the variable is unset.
      empty_is_unset: an empty text counts as unset.
    """

    name: str
    default: str
    meaning: str
    must: str
    parse: Callable[[str], Value | None]
    unset: Value
    empty_is_unset: bool = False

    def text(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """What is written in the variable; None where it is unset."""
        written = environment.get(self.name)
        return None if self.empty_is_unset and not written else written

    def value(self, environment: Mapping[str, str] = os.environ) -> Value:
        """The value in force.

        Args:
          environment: where the variable is looked up.

        Raises:
          TransportError: what is written breaks the rule.
        """
        written = self.text(environment)
        if written is None:
            return self.unset
        value = self.parse(written)
        if value is None:
            raise TransportError(rule(self.name, written, f"be {self.must}", "unset it or fix it"))
        return value


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value <= _MOST_SECONDS else None


def _whole_number(text: str) -> int | None:
    # C++ reads ASCII digits alone, and int() refuses very many.
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST))):
        return None
    return int(text) if 1 <= int(text) <= _MOST else None


def _name(text: str) -> str | None:
    # What is no text, as bytes of another encoding, cannot be told to other processes.
    return text if text.isprintable() else None


def _switch(text: str) -> bool | None:
    return {"0": False, "1": True}.get(text)


def _one_of(*names: str) -> Callable[[str], str | None]:
    return lambda text: text if text in names else None


def _path(name: str, default: str, meaning: str, must: str = "a folder") -> Setting[Path | None]:
    """What must lie there is checked, and said, where it is looked for."""
    return Setting(name, default, meaning, must, Path, None, empty_is_unset=True)


TIMEOUT: Setting[float] = Setting(
    "JAX_MORIEP_TIMEOUT",
    "300",
    "seconds that a rank waits for another one before that is an error",
    "a positive number of seconds, at most 1e9",
    _seconds,
    300.0,
)
WATCHDOG: Setting[bool] = Setting(
    "JAX_MORIEP_WATCHDOG",
    "1",
    "1: a process that still waits beside a failed exchange is ended after the timeout; 0: it waits",
    "0 or 1",
    _switch,
    True,
)
KEEP_MEMORY: Setting[bool] = Setting(
    "JAX_MORIEP_KEEP_MEMORY",
    "1",
    "1: on CPUs the process keeps large buffers that it frees; 0: they go back to the system",
    "0 or 1",
    _switch,
    True,
)
NATIVE_DISPATCH: Setting[str | None] = Setting(
    "JAX_MORIEP_NATIVE_DISPATCH",
    "by the GPU's architecture",
    "pull or put: who moves the tokens of native's dispatch between GPUs; `jm.Tuning` goes before it",
    "pull or put",
    _one_of("pull", "put"),
    None,
)
ARENA_MB: Setting[int] = Setting(
    "JAX_MORIEP_ARENA_MB",
    "1024",
    "MiB of device memory for a GPU rank's arena; the same in all processes",
    "a whole number of MiB from 1 to 1048576",
    _whole_number,
    1024,
)
"""C++ reads it (``csrc/gpu/c_api.cc``), and has the same rule."""
RANKS_PER_NODE: Setting[int | None] = Setting(
    "JAX_MORIEP_RANKS_PER_NODE",
    "as many as a machine has",
    "the most ranks that form a node of two_level; the same in all processes",
    "a whole number from 1 to 1048576",
    _whole_number,
    None,
)
NODE: Setting[str | None] = Setting(
    "JAX_MORIEP_NODE",
    "the kernel's boot id and the PID namespace",
    "name of the machine that the process is on: processes with one name share memory, others do not",
    "a name of printable characters",
    _name,
    None,
    empty_is_unset=True,
)
LIB_DIR = _path(
    "JAX_MORIEP_LIB_DIR", "`lib` in the installed package", "folder that holds the native libraries"
)
CACHE_DIR = _path(
    "JAX_MORIEP_CACHE_DIR",
    "`jax_moriep` in `XDG_CACHE_HOME` or in `~/.cache`",
    "folder where compiled kernels are kept (MORI's in `mori`)",
)
TUNING = _path(
    "JAX_MORIEP_TUNING",
    "the shipped table",
    "file that `jax-moriep tune` wrote: tiles of the Pallas kernels that go before the shipped ones",
    "a file",
)
MORI_DIR = _path("JAX_MORIEP_MORI_DIR", "the installed wheel", "folder `mori` of an unpacked amd-mori")
MORI_KERNELS = _path(
    "JAX_MORIEP_MORI_KERNELS",
    "they are compiled",
    "folder with compiled kernels of MORI's, from another machine's cache; no compiler is needed then",
)
MORI_HEAP_MB: Setting[int | None] = Setting(
    "JAX_MORIEP_MORI_HEAP_MB",
    "twice the first layer's need",
    "MiB of MORI's symmetric heap, fixed when the group opens",
    "a whole number of MiB from 1 to 1048576",
    _whole_number,
    None,
)
ROCM_PATH = _path(
    "JAX_MORIEP_ROCM_PATH",
    "`ROCM_PATH`, then `/opt/rocm`",
    "the ROCm installation whose compiler compiles MORI's kernels",
)
AITER_DIR = _path(
    "JAX_MORIEP_AITER_DIR", "the installed wheel", "folder that an amd-aiter wheel was unpacked into"
)

ALL: tuple[Setting[Any], ...] = (
    TIMEOUT,
    WATCHDOG,
    KEEP_MEMORY,
    NATIVE_DISPATCH,
    ARENA_MB,
    RANKS_PER_NODE,
    NODE,
    LIB_DIR,
    CACHE_DIR,
    TUNING,
    MORI_DIR,
    MORI_KERNELS,
    MORI_HEAP_MB,
    ROCM_PATH,
    AITER_DIR,
)


def check() -> None:
    """Checks all settings of this process, also those that nothing here reads before a step fails.

    Raises:
      TransportError: what is written in one breaks its rule.
    """
    for setting in ALL:
        setting.value()


def describe(environment: Mapping[str, str] = os.environ) -> dict[str, dict[str, str | None]]:
    """What is in force, JSON-able, by the variables' names.

    Returns:
      For each setting ``value`` (what is written, or else the default), ``from`` ("environment" or
      "default"), ``meaning``, and ``error``: None, or the rule that the value breaks, with the cure. A
      variable that begins as ours do and that nothing reads is an error too.
    """
    told: dict[str, dict[str, str | None]] = {}
    for setting in ALL:
        written = setting.text(environment)
        error = None
        try:
            setting.value(environment)
        except TransportError as e:
            error = str(e)
        told[setting.name] = {
            "value": setting.default if written is None else written,
            "from": "default" if written is None else "environment",
            "meaning": setting.meaning,
            "error": error,
        }
    for name in sorted(environment):
        if name.startswith(_PREFIX) and name not in told:
            must, cure = "have the name of a setting", "unset it, or correct its name"
            error = rule(name, environment[name], must, cure)
            told[name] = {"value": environment[name], "from": "environment", "meaning": None, "error": error}
    return told


def lines(described: Mapping[str, Mapping[str, str | None]]) -> list[str]:
    """What ``describe`` gave, for people."""
    said = ["settings"]
    for name, state in described.items():
        mark = " (default)" if state["from"] == "default" else ""
        said.append(f"  {'ok' if state['error'] is None else 'no'}  {name}: {state['value']}{mark}")
        if state["error"] is not None:
            said.append(f"      {state['error']}")
    return said
