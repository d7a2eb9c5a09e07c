"""The real amd-mori on simulated devices: the libraries and, compiled here, the kernels of its wheel."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.rocm import simulated
from tests.rocm.mori_rank import Config
from tests.rocm.simulated import LIBRARIES, MORI, SYSROOT

HERE = Path(__file__).parent / "kernels"
SOURCES = MORI / "_jit-sources"
INCLUDES = ("", "include", "src", "3rdparty/spdlog/include", "3rdparty/msgpack-c/include")
# (part of a kernel's name, type) of rows.
KERNEL_TYPES = {
    "bfloat16": ("bf16", "hip_bfloat16"),
    "float32": ("f32", "float"),
    "float8_e4m3fnuz": ("fp8_fnuz", "__hip_fp8_e4m3_fnuz"),
}
ENVIRONMENT = {
    # Where the library looks for ROCm SMI, unless told.
    "MORI_ROCM_SMI_PATH": str(LIBRARIES / "librocm_smi64.so.1"),
    # The simulated devices are in no PCI tree.
    "MORI_DISABLE_TOPO": "1",
    "MORI_SHMEM_HEAP_SIZE": "64M",
    "MORI_SOCKET_IFNAME": "lo",
    # The devices are near no processor in particular.
    "MORI_IGNORE_CPU_AFFINITY": "1",
}


def is_newer(output: Path, source: Path) -> bool:
    return output.exists() and output.stat().st_mtime > source.stat().st_mtime


@pytest.fixture(scope="session")
def host_library(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("mori") / "libmori_rank.so"
    includes = [f"-isystem{SOURCES / path}" for path in INCLUDES]
    libraries = [f"-l:libmori_{name}.so" for name in ("ops", "shmem", "application", "cco")]
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-D__HIP_PLATFORM_AMD__"]
    command += [*includes, f"-isystem{SYSROOT}/usr/include", HERE / "mori_host.cc", f"-L{MORI}", *libraries]
    command += [f"-L{LIBRARIES}", "-l:libamdhip64.so.7", "-o", output]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return output


def compile_for(dtype: str) -> Path:
    """Compiles the kernels for rows of a type, unless that was done; gives the code object's own folder."""
    source = HERE / "mori_kernels.hip"
    output = simulated.BUILD / "mori-kernels" / dtype / "ep_intranode.hsaco"
    if not is_newer(output, source):
        output.parent.mkdir(parents=True, exist_ok=True)
        name, row_type = KERNEL_TYPES[dtype]
        # clang-19 lacks this builtin; the kernels only ask it for fences of the whole system.
        fence = '-D__scoped_atomic_thread_fence(order,scope)=__builtin_amdgcn_fence(order,"")'
        options = ["-DHIP_ENABLE_WARP_SYNC_BUILTINS", fence, f"-DROW_NAME={name}", f"-DROW_TYPE={row_type}"]
        options += [f"-isystem{SOURCES / path}" for path in INCLUDES]
        made = output.with_suffix(".new")
        simulated.compile_kernels(source, made, *options)
        shutil.move(made, output)
    return output.parent


@pytest.fixture(scope="session")
def kernels() -> dict[str, Path]:
    """The folders of the code objects. They take minutes to compile, so they are kept with the build."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(KERNEL_TYPES, pool.map(compile_for, KERNEL_TYPES), strict=True))


def run_ranks(config: Config, deadline: float = 240, **more: str) -> None:
    """Runs all ranks to their end; each has checked its own results."""
    libraries = simulated.environment(config.ranks)["LD_LIBRARY_PATH"]
    environment = ENVIRONMENT | {"LD_LIBRARY_PATH": f"{libraries}:{MORI}"} | more
    command = (simulated.PYTHON, "-m", "tests.rocm.mori_rank", json.dumps(asdict(config)))
    ranks = [simulated.start(*command, 0, devices=config.ranks, **environment)]
    try:
        unique_id = ranks[0].stdout.readline().strip()
        for rank in range(1, config.ranks):
            ranks.append(simulated.start(*command, rank, unique_id, devices=config.ranks, **environment))
        said = [simulated.finish(process, deadline) for process in ranks]
    finally:
        # A rank that failed leaves its peers waiting.
        for process in ranks:
            process.kill()
    failed = [
        f"rank {rank}: exit {process.returncode}\n{err[-2000:]}"
        for rank, (process, (_, err)) in enumerate(zip(ranks, said, strict=True))
        if process.returncode != 0
    ]
    assert not failed, "\n".join(failed)


@pytest.fixture
def configure(host_library, kernels):
    """Makes a Config with this host library and kernels."""

    def make(dtype: str = "bfloat16", **more: int) -> Config:
        return Config(host=str(host_library), kernels=str(kernels[dtype]), dtype=dtype, **more)

    return make


@pytest.mark.parametrize("memory", ["ordinary", "adversarial"])
@pytest.mark.parametrize("dtype", KERNEL_TYPES)
@pytest.mark.parametrize(("ranks", "top_k"), [(2, 2), (4, 8), (8, 8)])
def test_dispatch_and_combine(configure, ranks, top_k, dtype, memory):
    shape = {"hidden": 256, "top_k": top_k, "experts_per_rank": 8 // ranks * 2, "max_tokens": 64}
    adversarial = "1" if memory == "adversarial" else "0"
    run_ranks(
        configure(dtype, ranks=ranks, rounds=20, seed=0, **shape), ROCM_SIM_ADVERSARIAL_MEMORY=adversarial
    )


@pytest.mark.parametrize("seed", range(3))
def test_waves_in_other_orders(configure, seed):
    shape = {"hidden": 128, "top_k": 4, "experts_per_rank": 3, "max_tokens": 64}
    run_ranks(configure(ranks=4, rounds=10, seed=seed, **shape), ROCM_SIM_SEED=str(seed))
