"""The GPU kernels compile for gfx942 too, and their machine code keeps the rules of memory order.

It needs clang++-19 and a ROCm folder (headers and device libraries): ``ROCM_PATH``, or the one that the tests
on a simulated MI300X build. Nothing here runs on an AMD GPU.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPU = ROOT / "csrc" / "gpu"
CLANG, OBJDUMP = shutil.which("clang++-19"), shutil.which("llvm-objdump-19")
KERNELS = ["stage", "plan", "pull", "push", "reduce", "gather", "quantise"]
LOCAL = ["gather", "quantise"]  # reads and writes what is this rank's alone


def rocm_folder():
    for folder in (os.environ.get("ROCM_PATH"), ROOT / "build/rocm-sim/sysroot/rocm", "/opt/rocm"):
        if folder and (Path(folder) / "include/hip/hip_runtime.h").is_file():
            return Path(folder)
    return None


needs_rocm = pytest.mark.skipif(
    CLANG is None or OBJDUMP is None or rocm_folder() is None, reason="needs clang++-19 and HIP headers"
)


@needs_rocm
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_gfx942(name, tmp_path):
    code = tmp_path / f"{name}.hsaco"
    options = ["--offload-arch=gfx942", "--cuda-device-only", "--no-gpu-bundle-output", "-std=c++20", "-O3"]
    folders = [f"--rocm-path={rocm_folder()}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    source = ["-x", "hip", "-D__HIP_PLATFORM_AMD__", GPU / f"{name}.cc", "-o", code]
    subprocess.run([CLANG, *options, *folders, *source], check=True, timeout=240)
    listing = subprocess.run(
        [OBJDUMP, "-d", "--mcpu=gfx942", code], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    if name not in LOCAL:
        # A release and an acquire of system scope, which reach the L2 of every die.
        assert re.search(r"buffer_wbl2 .*sc0 .*sc1", listing)
        assert re.search(r"buffer_inv .*sc0 .*sc1", listing)
    if name != "plan":
        assert re.search(r"(global|flat)_load_dwordx4", listing)
        # The codes of 16 bytes of bfloat16 are 8 bytes.
        stored = "dwordx2" if name == "quantise" else "dwordx4"
        assert re.search(rf"(global|flat)_store_{stored}", listing)


def test_every_kernel_is_compiled_here():
    """A new file with a kernel belongs in the list above."""
    found = {p.stem for p in GPU.glob("*.cc") if "__global__" in p.read_text()}
    assert found == set(KERNELS)
