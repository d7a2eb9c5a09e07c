"""``jax-moriep doctor``: what can run on this machine, and for everything else why not and the cure."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from typing import Any

import jax

from jax_moriep import experts, transports
from jax_moriep.cli import doctor_mori
from jax_moriep.errors import LibraryError, TransportError
from jax_moriep.runtime import compat, library
from jax_moriep.runtime.place import Place
from jax_moriep.transports import delivery
from jax_moriep.version import __version__

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "matplotlib", "torch")
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Not ours, and they matter too."""


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        description="Says what can run on this machine, and for everything else why not and the cure.",
        epilog='The exit code is 0 if transport="auto" and experts="auto" find something that can run.',
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep doctor``; returns 0 if the default path can run, else 1."""
    found = examine()
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0 if found["ok"] else 1


def examine() -> dict[str, Any]:
    """Looks at the machine.

    Returns:
      A JSON-able dict. Under ``libraries``, ``transports``, ``experts`` and ``machine`` a reason is None
      where all is well, else it says why not and the cure:

      - versions: of Python, jax_moriep and the packages it works with; None where one is not installed.
      - ffi_api: "major.minor" of the installed jaxlib.
      - platforms: for each platform of jax its devices, the default platform first.
      - platforms_error: why jax has no devices, or None.
      - libraries: for each backend path, ffi_api that it was built for, and reason.
      - transports, experts: for each platform, for each implementation the reason.
      - experts_details: for each platform what implementations that can run tell of it: which kernels run.
      - chosen: for each platform what "auto" takes.
      - native_dispatch: for each platform with GPUs how "native" dispatches, and why.
      - machine: for each thing that the native transport needs of the system the reason.
      - mori: as ``doctor_mori.examine`` says.
      - environment: the variables that are set, of ours all, so that one that is not read is seen too.
      - ok: whether "auto" finds a transport and experts on the default platform.
    """
    # To look at a GPU is no reason to reserve most of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    devices, devices_error = _devices()
    places = {p: _place(p) for p in devices}
    reasons = {
        p: {"transport": transports.reasons(place), "experts": experts.reasons(place)}
        for p, place in places.items()
    }
    chosen = {p: {kind: _first(found) for kind, found in reasons[p].items()} for p in devices}
    default = next(iter(devices), None)
    return {
        "versions": _versions(),
        "ffi_api": _dotted(compat.ffi_api_version()),
        "platforms": devices,
        "platforms_error": devices_error,
        "libraries": _libraries(),
        "transports": {p: reasons[p]["transport"] for p in devices},
        "experts": {p: reasons[p]["experts"] for p in devices},
        "experts_details": {p: _experts_details(place, reasons[p]["experts"]) for p, place in places.items()},
        "chosen": chosen,
        "native_dispatch": {p: _native_dispatch(place) for p, place in places.items() if p == "gpu"},
        "machine": {"memfd": _memfd_reason(), "peer memory": _peer_memory_reason()},
        "mori": doctor_mori.examine(),
        "environment": _environment(),
        "ok": default is not None and None not in chosen[default].values(),
    }


def as_text(found: dict[str, Any]) -> str:
    """What ``examine`` found, for people."""
    versions = found["versions"]
    installed = [f"{name} {versions[name]}" for name in PACKAGES if versions[name]]
    missing = [name for name in PACKAGES if not versions[name]]
    lines = [
        f"jax_moriep {versions['jax_moriep']}, Python {versions['python']}, {platform.platform()}, "
        f"{os.cpu_count()} CPUs",
        f"  {', '.join(installed)} (XLA FFI API {found['ffi_api']})",
    ]
    if missing:
        lines.append(f"  not installed: {', '.join(missing)}")

    lines.append("devices")
    if found["platforms_error"]:
        lines.append(f"  none: {found['platforms_error']}")
    for name, devices in found["platforms"].items():
        lines.append(f"  {name}: {len(devices)} ({', '.join(dict.fromkeys(devices))})")

    lines.append("native libraries")
    for backend, state in found["libraries"].items():
        built = f"{state['path']}, built for XLA FFI API {state['ffi_api']}"
        lines.append(_line(backend, state["reason"], built))

    for kind, title in (("transport", "transports"), ("experts", "experts")):
        for name in found["platforms"]:
            lines.append(f"{title} on {name} (auto takes {found['chosen'][name][kind] or 'nothing'})")
            for choice, why in found[title][name].items():
                lines.append(_line(choice, why))
                if kind == "experts" and choice in found["experts_details"][name]:
                    lines.append(f"      {found['experts_details'][name][choice]}")
            if kind == "transport" and name in found["native_dispatch"]:
                lines.append(f"      native {found['native_dispatch'][name]}")

    lines.append("what the native transport needs of this machine")
    lines += [_line(name, why) for name, why in found["machine"].items()]
    lines += doctor_mori.lines(found["mori"])
    if found["environment"]:
        lines.append("environment")
        lines += [f"  {name}={value}" for name, value in found["environment"].items()]
    lines.append("the default path can run" if found["ok"] else "the default path can NOT run")
    return "\n".join(lines)


def _line(name: str, reason: str | None, detail: str = "can run") -> str:
    return f"  ok  {name}: {detail}" if reason is None else f"  no  {name}: {reason}"


def _environment() -> dict[str, str]:
    ours = sorted(name for name in os.environ if name.startswith("JAX_MORIEP_"))
    return {name: os.environ[name] for name in (*ours, *VARIABLES) if name in os.environ}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "jax_moriep": __version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _devices() -> tuple[dict[str, list[str]], str | None]:
    """The kinds of the devices of each platform, the default one first, and why there are none."""
    try:
        default = jax.devices()
    except RuntimeError as error:
        return {}, str(error)
    found = {default[0].platform: [d.device_kind for d in default]}
    if "cpu" not in found:
        try:
            found["cpu"] = [d.device_kind for d in jax.devices("cpu")]
        except RuntimeError:
            # JAX_PLATFORMS leaves the CPU out; the environment, which is reported too, says so.
            pass
    return found, None


def _place(platform: str) -> Place:
    """All devices of a platform, with a process for each: the layout in which every transport may run."""
    found = jax.devices(platform)
    return Place(platform, compat.architecture(found[0]), num_ranks=len(found), num_processes=len(found))


def _experts_details(place: Place, reasons: dict[str, str | None]) -> dict[str, str]:
    told = {name: experts.describe(name, place, None) for name, why in reasons.items() if why is None}
    return {name: text for name, text in told.items() if text is not None}


def _native_dispatch(place: Place) -> str:
    try:
        return delivery.describe(place, None)
    except TransportError as error:
        return f"refuses every exchange: {error}"


def _libraries() -> dict[str, dict[str, str | None]]:
    """The CPU's library, and those of other backends where there are any."""
    found: dict[str, dict[str, str | None]] = {}
    for backend in library.BACKENDS:
        path, built, reason = None, None, None
        try:
            path = str(library.find(backend))
            built = _dotted(divmod(library.load(backend).moriep_ffi_api_version(), 1000))
        except LibraryError as error:
            reason = str(error)
        if path is not None or backend == "cpu":
            found[backend] = {"path": path, "ffi_api": built, "reason": reason}
    return found


def _memfd_reason() -> str | None:
    """Why this process cannot make sealed anonymous shared memory."""
    if sys.platform != "linux":
        return f"it exists on Linux only, and this is {sys.platform}; use transport='collective'"
    import fcntl

    try:
        fd = os.memfd_create("moriep-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, 4096)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        finally:
            os.close(fd)
    except OSError as error:
        return f"memfd_create or its seals fail ({error}); allow them, or use transport='collective'"
    return None


def _peer_memory_reason() -> str | None:
    """Why another process of this user cannot open this one's shared memory, which it does through /proc."""
    if sys.platform != "linux":
        return f"it takes Linux's /proc, and this is {sys.platform}; use transport='collective'"
    fd = os.memfd_create("moriep-doctor", os.MFD_CLOEXEC)
    try:
        path = f"/proc/{os.getpid()}/fd/{fd}"
        peer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"open({path!r}, 'r+b')"], capture_output=True, text=True
        )
    finally:
        os.close(fd)
    if peer.returncode == 0:
        return None
    why = (peer.stderr.strip().splitlines() or ["no message"])[-1]
    return (
        f"another process cannot open {path} ({why}); mount /proc without hidepid, use one process with "
        "several devices, or use transport='collective'"
    )


def _first(reasons: dict[str, str | None]) -> str | None:
    return next((name for name, why in reasons.items() if why is None), None)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
