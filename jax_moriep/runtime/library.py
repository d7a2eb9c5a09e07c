"""Finds and loads the native libraries, one plain shared object per backend.

The libraries export C symbols only, so they are loaded by ctypes and serve every Python version. They are
loaded on first use: importing jax_moriep needs none of them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from jax_moriep.errors import LibraryError
from jax_moriep.runtime import compat, settings

BACKENDS = ("cpu", "cuda", "rocm", "mori")
_BUILD_HINT = (
    "reinstall jax_moriep with a C++ compiler present, or point JAX_MORIEP_LIB_DIR at a build folder"
)
_BUILD_HINTS = {
    "cuda": "reinstall jax_moriep from source with nvcc on the PATH, or on a machine without it by "
    "`pip install . -C cuda.toolkit=pypi`, or point JAX_MORIEP_LIB_DIR at a build folder",
    "rocm": "reinstall jax_moriep from source where CMake finds ROCm's compiler, or point JAX_MORIEP_LIB_DIR "
    "at a build folder",
    "mori": "reinstall jax_moriep from source where CMake finds ROCm's compiler and amd-mori, or point "
    "JAX_MORIEP_LIB_DIR at a build folder",
}


def backend_of(platform: str) -> str | None:
    """The backend that serves a platform's devices, or None.

    Args:
      platform: of a device: "cpu", or "gpu", which does not say whose GPU it is.
    """
    return compat.gpu_backend() if platform == "gpu" else "cpu" if platform == "cpu" else None


def folder() -> Path:
    """The folder that is searched: ``JAX_MORIEP_LIB_DIR``, or ``lib`` in the installed package."""
    return settings.LIB_DIR.value() or Path(__file__).resolve().parent.parent / "lib"


def _hint(backend: str) -> str:
    return _BUILD_HINTS.get(backend, _BUILD_HINT)


def _why_not_built(backend: str) -> str:
    """What the build left about a library that it did not make; pip shows nobody a build's output."""
    note = folder() / f"libmoriep_{backend}.txt"
    return f" (not built: {note.read_text().strip()})" if note.is_file() else ""


def find(backend: str) -> Path:
    """Path of a backend's library.

    Args:
      backend: "cpu", "cuda", "rocm" or "mori".

    Raises:
      LibraryError: there is no such file; the text names the folder, why it was not built, and the cure.
    """
    path = folder() / f"libmoriep_{backend}.so"
    if not path.is_file():
        raise LibraryError(
            f"the native library of backend={backend!r} is not at {path}{_why_not_built(backend)}; "
            f"{_hint(backend)}"
        )
    return path


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as e:
        raise LibraryError(f"the native library {path} does not load ({e}); {_BUILD_HINT}") from e
    try:
        version = lib.moriep_ffi_api_version
    except AttributeError as e:
        raise LibraryError(
            f"{path} is not a jax_moriep library (no moriep_ffi_api_version); {_BUILD_HINT}"
        ) from e
    version.restype = ctypes.c_int
    check_api_version(path, divmod(version(), 1000))
    return lib


def check_api_version(path: Path, built: tuple[int, int]) -> None:
    """Refuses a library whose FFI API version the installed jaxlib cannot run.

    XLA runs handlers of the same major version and of an equal or older minor version; on GPU plugins a
    newer one is dropped silently, which is why it is checked here.

    Args:
      path: the library, for the text.
      built: (major, minor) of the FFI headers that the library was built with.

    Raises:
      LibraryError: the versions do not fit.
    """
    running = compat.ffi_api_version()
    if built[0] != running[0] or built[1] > running[1]:
        raise LibraryError(
            f"{path} was built for XLA FFI API {built[0]}.{built[1]}, but the installed jaxlib has "
            f"{running[0]}.{running[1]}; rebuild jax_moriep, or install a newer jaxlib"
        )


def load(backend: str) -> ctypes.CDLL:
    """Loads a backend's library once.

    Args:
      backend: "cpu", "cuda", "rocm" or "mori".

    Raises:
      LibraryError: the library is missing, broken, or built for another FFI API version.
    """
    return _load(find(backend))


def why_broken(backend: str) -> str | None:
    """Why a backend's library does not load that should: the CPU's always, others where they were built."""
    try:
        load(backend)
    except LibraryError as e:
        if backend == "cpu" or (folder() / f"libmoriep_{backend}.so").exists():
            return str(e)
    return None
