"""The HIP compiler of this machine, and what it lacks that MORI's sources ask of it."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from jax_moriep.errors import LibraryError
from jax_moriep.runtime import settings

# The oldest clang that MORI's kernels were seen to compile with.
OLDEST_CLANG = 19
_NEWEST_CLANG = 30
_INSTALL = (
    f"install ROCm's hipcc, name a ROCm installation in {settings.ROCM_PATH.name}, or give compiled "
    f"kernels in {settings.MORI_KERNELS.name}"
)
# A builtin of newer clangs. Where it is missing, the older builtin fences for the whole system, which is the
# widest scope and so right for every use.
_FENCE = "__scoped_atomic_thread_fence"
_WIDER_FENCE = f'-D{_FENCE}(order,scope)=__builtin_amdgcn_fence(order,"")'


@dataclasses.dataclass(frozen=True)
class Compiler:
    """A compiler that makes code objects of HIP sources.

    Attributes:
      program: its path.
      options: what it always needs, such as the ROCm installation whose headers it takes.
      version: what it says of itself.
    """

    program: str
    options: tuple[str, ...]
    version: str

    def code_object(self, source: Path, output: Path, arch: str, options: Sequence[str]) -> None:
        """Compiles a HIP source to a code object for one architecture.

        Raises:
          LibraryError: the compiler fails; the text holds the command and its first words.
        """
        command = [*self._command(arch), *options, str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise LibraryError(
                f"MORI's kernels do not compile (exit code {done.returncode}); use a newer ROCm, or give "
                f"compiled kernels in JAX_MORIEP_MORI_KERNELS\n{' '.join(command)}\n{done.stderr[:2000]}"
            )

    def extra_options(self, arch: str) -> tuple[str, ...]:
        """What this compiler must be told for MORI's sources: found by asking it, not by its version."""
        asked = f"#if __has_builtin({_FENCE})\nmoriep_has_it\n#endif\n"
        command = [*self._command(arch), "-nogpuinc", "-nogpulib", "-E", "-"]
        done = subprocess.run(command, input=asked, capture_output=True, text=True)
        if done.returncode != 0:
            raise LibraryError(
                f"{self.program} must preprocess for --offload-arch={arch}, and says: {done.stderr[:500]}; "
                f"{_INSTALL}"
            )
        return () if "moriep_has_it" in done.stdout else (_WIDER_FENCE,)

    def _command(self, arch: str) -> list[str]:
        # A bare code object, for clang outside ROCm may lack the program that makes bundles.
        device = ("-x", "hip", f"--offload-arch={arch}", "--cuda-device-only", "--no-gpu-bundle-output")
        return [self.program, *device, *self.options]


def find() -> Compiler:
    """The compiler to use: hipcc or clang of a ROCm installation, or else a newer clang with one's headers.

    ROCm installations are those that ``JAX_MORIEP_ROCM_PATH`` and ``ROCM_PATH`` name, and /opt/rocm. The
    first variable forbids the others.

    Raises:
      LibraryError: there is none; the text says where was looked, and the cure.
    """
    named = settings.ROCM_PATH.value()
    roots = [named] if named else [os.environ.get("ROCM_PATH") or "/opt/rocm", "/opt/rocm"]
    installations = [Path(root) for root in dict.fromkeys(roots)]
    for root in installations:
        for program in ("bin/hipcc", "llvm/bin/clang++", "lib/llvm/bin/clang++"):
            if os.access(root / program, os.X_OK):
                return _compiler(str(root / program), root)
    for root in installations:
        if (root / "include" / "hip").is_dir() and (clang := _clang()):
            return _compiler(clang, root)
    if not named and (hipcc := shutil.which("hipcc")):
        return _compiler(hipcc, None)
    looked = " and ".join(map(str, installations))
    raise LibraryError(
        f"no HIP compiler was found in {looked}, nor a clang beside HIP's headers there; {_INSTALL}"
    )


def _compiler(program: str, root: Path | None) -> Compiler:
    return Compiler(program, () if root is None else (f"--rocm-path={root}",), _version(program))


@functools.cache
def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    if done.returncode != 0:
        raise LibraryError(f"{program} --version must succeed, and says: {done.stderr[:500]}; {_INSTALL}")
    return done.stdout.strip()


def _clang() -> str | None:
    """The newest clang++ on the PATH that is new enough."""
    for number in range(_NEWEST_CLANG, OLDEST_CLANG - 1, -1):
        if found := shutil.which(f"clang++-{number}"):
            return found
    found = shutil.which("clang++")
    if (
        found
        and (match := re.search(r"clang version (\d+)", _version(found)))
        and int(match[1]) >= OLDEST_CLANG
    ):
        return found
    return None
