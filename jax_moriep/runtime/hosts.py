"""Which machine each process of the job runs on; they tell each other through the key-value store."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterable
from pathlib import Path

import jax

from jax_moriep.errors import TransportError
from jax_moriep.runtime import settings
from jax_moriep.runtime.store import DistributedStore, Store

_HOST, _LIMIT = "host", "ranks_per_node"


def identity() -> str:
    """Tells machines apart: the kernel's boot id, and the PID namespace that /proc shows.

    ``JAX_MORIEP_NODE`` names the machine instead: processes with one name are on one machine, and those with
    different names have no memory in common, wherever they run.
    """
    if named := settings.NODE.value():
        return f"named/{named}"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def numbers(processes: Iterable[int]) -> tuple[int, ...]:
    """On which machine each of some processes runs, numbered as they come; asks each of them once.

    Args:
      processes: process indices of jax.

    Raises:
      TransportError: a process did not say within the time limit where it runs.
    """
    indices = list(processes)
    machine = of_processes(indices)
    number = {name: i for i, name in enumerate(dict.fromkeys(machine[index] for index in indices))}
    return tuple(number[machine[index]] for index in indices)


def of_processes(processes: Iterable[int]) -> dict[int, str]:
    """The machine of each of some processes; asks each of them once.

    Args:
      processes: process indices of jax.

    Raises:
      TransportError: a process did not say within the time limit where it runs.
    """
    indices = sorted(set(processes))
    if indices == [jax.process_index()]:
        return {indices[0]: identity()}
    return {index: _of_process(index) for index in indices}


def limit_of(process: int) -> str:
    """A process's ``JAX_MORIEP_RANKS_PER_NODE`` as it is written, or "unset".

    Each process tells it together with its machine: one may look at transport="two_level" (``jm.explain``)
    while the others run another.

    Raises:
      TransportError: the process did not say it within the time limit.
    """
    return _told(_LIMIT, process)


def _of_process(index: int) -> str:
    return _told(_HOST, index)


@functools.cache
def _told(what: str, index: int) -> str:
    store = _announced_store()
    try:
        return store.get(f"jax_moriep/{what}/{index}", time.monotonic() + settings.TIMEOUT.value()).decode()
    except TimeoutError as e:
        raise TransportError(
            f"process {index} did not say within {settings.TIMEOUT.value():g} s which machine it runs on; "
            "does every process trace the same program?"
        ) from e


@functools.cache
def _announced_store() -> Store:
    store = DistributedStore()
    told = {_HOST: identity(), _LIMIT: settings.RANKS_PER_NODE.text() or "unset"}
    for what, value in told.items():
        store.put(f"jax_moriep/{what}/{jax.process_index()}", value.encode())
    return store
