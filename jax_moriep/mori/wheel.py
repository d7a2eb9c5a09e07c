"""Finds the installed amd-mori without importing it, and says where its parts are.

Only one version is taken. MORI's C++ classes are compiled into our library and into the kernels, their
layouts change between releases, and nothing in a binary says which layout it has.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from jax_moriep.errors import LibraryError, rule
from jax_moriep.runtime import settings

DISTRIBUTION = "amd-mori"
VERSION = "1.2.4"
INSTALL = f"run: pip install {DISTRIBUTION}=={VERSION}"
# In the order in which each finds the symbols it needs in those before it.
LIBRARIES = ("application", "shmem", "cco", "ops")
# Relative to the sources. MORI's own includes are written from its root as well as from include/.
INCLUDE_FOLDERS = ("", "include", "src", "3rdparty/spdlog/include", "3rdparty/msgpack-c/include")


@dataclasses.dataclass(frozen=True)
class Wheel:
    """An installed or unpacked amd-mori.

    Attributes:
      folder: the Python package ``mori``.
      version: of the distribution.
    """

    folder: Path
    version: str

    @property
    def sources(self) -> Path:
        """The C++ headers and kernel sources."""
        return self.folder / "_jit-sources"

    @property
    def include_folders(self) -> tuple[Path, ...]:
        """What a compiler must search for MORI's headers."""
        return tuple(self.sources / path for path in INCLUDE_FOLDERS)

    @property
    def tables(self) -> Path:
        """The folder of the JSON tables with launch sizes."""
        return self.folder / "ops" / "tuning_configs"

    def library(self, name: str) -> Path:
        """The shared library of a part.

        Args:
          name: one of ``LIBRARIES``.
        """
        return self.folder / f"libmori_{name}.so"

    def sources_digest(self) -> str:
        """A hash of all source files' names and contents, in hexadecimal."""
        return _digest(self.sources)


@functools.cache
def _digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder)}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def find() -> Wheel:
    """The amd-mori to use: the one that ``JAX_MORIEP_MORI_DIR`` names, or else the installed one.

    Returns:
      A wheel of the one version that is taken, with all parts that we use.

    Raises:
      LibraryError: there is none, it has another version, or a part is missing; the text has the cure.
    """
    named = settings.MORI_DIR.value()
    wheel = _installed() if named is None else _named(named)
    if wheel.version != VERSION:
        raise LibraryError(
            f"amd-mori {wheel.version} at {wheel.folder} must be version {VERSION}, whose C++ classes this "
            f"release was compiled for; {INSTALL}"
        )
    for path in (wheel.sources / "src" / "ops" / "kernels", *map(wheel.library, LIBRARIES)):
        if not path.exists():
            raise LibraryError(
                f"amd-mori {VERSION} at {wheel.folder} must hold {path.relative_to(wheel.folder)}; it is no "
                f"complete wheel: {INSTALL} --force-reinstall"
            )
    return wheel


def unavailable_reason() -> str | None:
    """Why no amd-mori can be used here, with the cure; None if one can."""
    try:
        find()
    except LibraryError as error:
        return str(error)
    return None


def _named(folder: Path) -> Wheel:
    """The wheel in a folder that the user names: the package ``mori``, or what a wheel was unpacked into."""
    if not (folder / "_jit-sources").is_dir() and (folder / "mori" / "_jit-sources").is_dir():
        folder = folder / "mori"
    if not (folder / "_jit-sources").is_dir():
        cure = f"name the folder mori of an unpacked {DISTRIBUTION} wheel, or unset the variable"
        raise LibraryError(rule(settings.MORI_DIR.name, str(folder), "hold the folder _jit-sources", cure))
    for metadata in folder.parent.glob("amd_mori-*.dist-info/METADATA"):
        if match := re.search(r"^Version: (\S+)$", metadata.read_text(), re.MULTILINE):
            return Wheel(folder.resolve(), match[1])
    return Wheel(folder.resolve(), _version_in(folder) or "of unknown version")


def _installed() -> Wheel:
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise LibraryError(f"amd-mori is not installed; {INSTALL}") from error
    folder = Path(str(distribution.locate_file("mori")))
    if not folder.is_dir():
        # An editable install: its files are elsewhere, and only the import system knows where.
        spec = importlib.util.find_spec("mori")
        if spec is None or not spec.submodule_search_locations:
            raise LibraryError(
                f"amd-mori {distribution.version} is installed without its package mori; {INSTALL} "
                "--force-reinstall"
            )
        folder = Path(next(iter(spec.submodule_search_locations)))
    return Wheel(folder.resolve(), distribution.version)


def _version_in(folder: Path) -> str | None:
    path = folder / "_version.py"
    match = re.search(r"""__version__ = ['"]([^'"]+)""", path.read_text()) if path.is_file() else None
    return match[1] if match else None


def hip_runtimes(maps: str | None = None) -> list[str]:
    """The different libamdhip64 that this process has mapped.

    Args:
      maps: the text of ``/proc/self/maps``; read if not given.
    """
    if maps is None:
        path = Path("/proc/self/maps")
        maps = path.read_text() if path.exists() else ""
    found = re.findall(r"(/\S*/libamdhip64\.so[.\d]*)(?: \(deleted\))?$", maps, re.MULTILINE)
    return sorted(set(found))


def check_one_hip_runtime(maps: str | None = None) -> None:
    """Refuses a process with no HIP runtime or with two, whose streams and memory do not know each other.

    Args:
      maps: the text of ``/proc/self/maps``; read if not given.

    Raises:
      LibraryError: not exactly one libamdhip64 is mapped.
    """
    found = hip_runtimes(maps)
    if not found:
        raise LibraryError(
            "this process must have loaded ROCm's libamdhip64 before MORI; let jax open its ROCm devices "
            "first (jax.devices())"
        )
    if len(found) > 1:
        raise LibraryError(
            f"this process must have one libamdhip64, and has {', '.join(found)}; make LD_LIBRARY_PATH and "
            "the ROCm of jax's plugin name the same installation, and import no package that brings its own"
        )


def load(wheel: Wheel) -> None:
    """Loads MORI's libraries, so that a library linked against them finds them by name wherever they lie.

    Args:
      wheel: as ``find`` gives it.

    Raises:
      LibraryError: a HIP runtime is missing or there are two, or a library does not load.
    """
    check_one_hip_runtime()
    for name in LIBRARIES:
        try:
            ctypes.CDLL(str(wheel.library(name)), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise LibraryError(
                f"{wheel.library(name)} does not load ({error}); install what it lacks (Debian, Ubuntu: "
                "libnuma1 libpci3 libdrm2 libdrm-amdgpu1), and a wheel for this system's glibc"
            ) from error
    check_one_hip_runtime()
