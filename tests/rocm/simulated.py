"""Where the simulator lies, and how processes are started on it."""

import os
import subprocess
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "rocm-sim"
LIBRARIES = BUILD / "lib"
HIP = LIBRARIES / "libamdhip64.so.7"
SYSROOT = BUILD / "sysroot"
MORI = BUILD / "mori" / "mori"
AITER = BUILD / "aiter"
PYTHON = ROOT / ".venv-rocm" / "bin" / "python"
# jax_moriep's own libraries, and the search path of Python processes that use jax.
LIBRARY = ROOT / "build" / "rocm-library" / "csrc"
JAX_PATH = f"{ROOT / 'tests' / 'rocm' / 'site'}:{ROOT}"
COMPILER = "clang++-19"

# rocBLAS, hipBLASLt and MIOpen are not simulated: XLA must use its own kernels, and not choose by trying.
XLA_FLAGS = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_cublaslt=false --xla_gpu_enable_triton_gemm=true "
    "--xla_gpu_cublas_fallback=false"
)


def skip_unless_built() -> None:
    if not (HIP.exists() and PYTHON.exists()):
        pytest.skip("the simulator is not built; run: make rocm-sim")


def environment(devices: int, **more: str) -> dict[str, str]:
    """The environment of a process on the simulated devices. Nothing of the caller's ROCm or jax settings."""
    ours = ("JAX_", "XLA_", "HIP_", "ROCM_SIM_", "MORI_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "LD_LIBRARY_PATH": f"{LIBRARIES}:{SYSROOT}/usr/lib/x86_64-linux-gnu",
        "ROCM_SIM_DEVICES": str(devices),
        "JAX_PLATFORMS": "rocm",
        "XLA_FLAGS": XLA_FLAGS,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def start(
    *command: object,
    devices: int = 1,
    stdin: bool = False,
    stderr: IO[str] | int = subprocess.PIPE,
    **more: str,
) -> subprocess.Popen:
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(devices, **more),
        cwd=ROOT,
        text=True,
        bufsize=1,
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )


def finish(process: subprocess.Popen, deadline: float) -> tuple[str, str]:
    """Waits for a process; kills it and fails with what it said when it is not done in time."""
    try:
        out, err = process.communicate(timeout=deadline)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        pytest.fail(f"the process did not end within {deadline} s\n{out}\n{err}")
    return out, err


def run(*command: object, deadline: float = 120, devices: int = 1, **more: str) -> tuple[str, str]:
    """Runs a command on the simulated devices; it must succeed."""
    process = start(*command, devices=devices, **more)
    out, err = finish(process, deadline)
    assert process.returncode == 0, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def _run_compiler(*arguments: object) -> None:
    command = [COMPILER, *(str(part) for part in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def _compile(*arguments: object) -> None:
    hip = ("-x", "hip", "--offload-arch=gfx942", f"--rocm-path={SYSROOT}/rocm", "-D__HIP_PLATFORM_AMD__")
    _run_compiler(*hip, "-std=c++17", "-O2", *arguments)


def compile_kernels(source: Path, output: Path, *options: object) -> Path:
    """Compiles the kernels of a HIP source for gfx942 to a code object."""
    _compile("--cuda-device-only", "--no-gpu-bundle-output", *options, source, "-o", output)
    return output


def compile_library(source: Path, output: Path, *options: object) -> Path:
    """Compiles a HIP source to a library that registers its kernels."""
    kernels = compile_kernels(source, output.with_suffix(".hsaco"), *options)
    half = output.with_suffix(".o")
    embed = ("-Xclang", "-fcuda-include-gpubinary", "-Xclang", kernels)
    _compile("--cuda-host-only", "-c", "-fPIC", *embed, *options, source, "-o", half)
    _run_compiler("-shared", half, f"-L{LIBRARIES}", f"-l:{HIP.name}", "-Wl,-z,defs", "-o", output)
    return output
