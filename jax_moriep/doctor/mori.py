"""What there is of MORI: the wheel, its kernels, and what it does to a process."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import re
from pathlib import Path
from typing import Any

from jax_moriep.errors import LibraryError, TransportError
from jax_moriep.mori import compiler, kernels, limits, network, wheel
from jax_moriep.runtime import settings

_AFFINITY_VARIABLE = "MORI_IGNORE_CPU_AFFINITY"


def examine() -> dict[str, Any]:
    """Looks for amd-mori and what it needs. A reason is None where all is well.

    Returns:
      A JSON-able dict:

      - folder, version, reason: of amd-mori; the first two are None if it cannot be used.
      - compiler: program and reason.
      - kernels: folder where they are kept or were given, names of those that are there.
      - socket: interface over which ranks find each other, and reason.
      - network: the drivers of the adapters between machines, who sends by them and why, and reason.
      - settings: why MORI's variables forbid its use.
      - affinity: what it does to the thread that opens a group.
      - xla: the packages of XLA for ROCm that hold a MORI of their own.
      - environment: MORI's variables that are set.
    """
    found: dict[str, Any] = {"folder": None, "version": None, "reason": wheel.unavailable_reason()}
    if found["reason"] is None:
        mori = wheel.find()
        found |= {"folder": str(mori.folder), "version": mori.version}
    interface, why = network.chosen_interface(os.environ, network.interfaces())
    return found | {
        "compiler": _compiler(),
        "kernels": _kernels(),
        "socket": {"interface": interface, "reason": why},
        "network": _network(),
        "settings": _settings_reason(),
        "affinity": _affinity(),
        "xla": _own_mori_of_xla(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MORI_")},
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What ``examine`` found, for people; little where there is no amd-mori."""
    said = ["MORI"]
    if found["reason"] is not None:
        return [*said, f"  no  amd-mori: {found['reason']}"]
    said.append(f"  ok  amd-mori: {found['version']} at {found['folder']}")
    for name, state, detail in (
        ("compiler of its kernels", found["compiler"]["reason"], found["compiler"]["program"]),
        ("interface between ranks", found["socket"]["reason"], found["socket"]["interface"]),
        ("sending between machines", found["network"]["reason"], found["network"]["way"]),
        ("settings", found["settings"], "nothing is set that forbids its use"),
    ):
        said.append(f"  ok  {name}: {detail}" if state is None else f"  no  {name}: {state}")
    kept = found["kernels"]
    said.append(f"      kernels in {kept['folder']}: {', '.join(kept['names']) or 'none yet'}")
    said.append(f"      {found['affinity']}")
    said += [
        f"      {package} holds a MORI of its own, which obeys the same MORI_* variables"
        for package in found["xla"]
    ]
    return said + [f"      {name}={value}" for name, value in found["environment"].items()]


def _compiler() -> dict[str, str | None]:
    try:
        return {"program": compiler.find().program, "reason": None}
    except LibraryError as error:
        return {"program": None, "reason": str(error)}


def _kernels() -> dict[str, Any]:
    folder = settings.MORI_KERNELS.value() or kernels.cache_folder()
    # Those whose name begins with a dot are being made.
    names = sorted(path.parent.name for path in folder.glob("[!.]*/*.hsaco"))
    return {"folder": str(folder), "names": names}


def _network() -> dict[str, Any]:
    adapters = network.adapters()
    try:
        proxy, why = network.by_proxy(os.environ, adapters)
    except TransportError as error:
        return {"adapters": adapters, "way": None, "reason": str(error)}
    way = f"by {'a thread of MORI on the host' if proxy else 'the GPU itself'}, for {why}"
    return {"adapters": adapters, "way": way, "reason": None}


def _settings_reason() -> str | None:
    try:
        limits.check_environment(os.environ)
        limits.check_heap(0, os.environ.get("MORI_SHMEM_HEAP_SIZE"))
    except (TransportError, ValueError) as error:
        return str(error)
    return None


def _affinity(nodes: Path = Path("/sys/devices/system/node")) -> str:
    if os.environ.get(_AFFINITY_VARIABLE) == "1":
        return f"threads stay where they are, for {_AFFINITY_VARIABLE}=1"
    count = len([path for path in nodes.glob("node*") if re.fullmatch(r"node\d+", path.name)])
    where = f"{count} NUMA node{'s' if count != 1 else ''}"
    return (
        f"MORI binds the thread that opens a group to the processors near its GPU ({where} here); "
        f"{_AFFINITY_VARIABLE}=1 forbids it"
    )


def _own_mori_of_xla() -> list[str]:
    """The installed XLA clients for ROCm into which MORI's collectives are compiled."""
    found = []
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").replace("_", "-")
        if not re.fullmatch(r"jax-rocm\d+-pjrt", name):
            continue
        for file in distribution.files or ():
            if file.name == "xla_rocm_plugin.so" and _holds(Path(str(distribution.locate_file(file)))):
                found.append(f"{name} {distribution.version}")
    return found


def _holds(path: Path, words: bytes = b"MoriCollectives") -> bool:
    """Whether a file holds some words; mapped, for these files have hundreds of megabytes."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(words) >= 0
    except (OSError, ValueError):
        return False
