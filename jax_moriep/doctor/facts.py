"""What this machine has: all that ``jax-moriep doctor`` tells, as one dict."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import jax

from jax_moriep import experts, transports
from jax_moriep.doctor import mori
from jax_moriep.errors import LibraryError, TransportError
from jax_moriep.runtime import compat, library, settings
from jax_moriep.runtime.place import Place
from jax_moriep.transports import delivery
from jax_moriep.version import __version__

PACKAGES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint", "matplotlib", "torch")
VARIABLES = ("JAX_PLATFORMS", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Not ours, and they matter too."""


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
      - mori: as ``mori.examine`` says.
      - settings: our variables, as ``settings.describe`` says; one that nothing reads is seen too.
      - environment: others' variables that matter too, where they are set.
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
        "experts_details": {
            p: experts.details(place, reasons[p]["experts"], None) for p, place in places.items()
        },
        "chosen": chosen,
        "native_dispatch": {p: _native_dispatch(place) for p, place in places.items() if p == "gpu"},
        "machine": {"memfd": _memfd_reason(), "peer memory": _peer_memory_reason()},
        "mori": mori.examine(),
        "settings": settings.describe(),
        "environment": _environment(),
        "ok": default is not None and None not in chosen[default].values(),
    }


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


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
