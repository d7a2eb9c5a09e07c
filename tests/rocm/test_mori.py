"""The real amd-mori on simulated devices: the libraries and, compiled here, the kernels of its wheel."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from jax_moriep.mori import kernels as mori_kernels
from jax_moriep.mori import wheel
from tests.rocm import simulated
from tests.rocm.mori_rank import Config
from tests.rocm.simulated import LIBRARIES, MORI, SYSROOT

HERE = Path(__file__).parent / "kernels"
SOURCES = MORI / "_jit-sources"
INCLUDES = ("", "include", "src", "3rdparty/spdlog/include", "3rdparty/msgpack-c/include")
ROW_TYPES = tuple(mori_kernels.ROW_TYPES)
# What jax_moriep.mori needs to know of a wheel that is unpacked and of a ROCm that is not installed.
KERNEL_SETTINGS = {
    "JAX_MORIEP_MORI_DIR": str(MORI),
    "JAX_MORIEP_ROCM_PATH": str(SYSROOT / "rocm"),
    "JAX_MORIEP_CACHE_DIR": str(simulated.BUILD / "kernels"),
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


def link_with_mori(source: Path, output: Path, *options: str) -> Path:
    """Compiles a C++ source that uses amd-mori's own interface."""
    includes = [f"-isystem{SOURCES / path}" for path in INCLUDES]
    libraries = [f"-l:libmori_{name}.so" for name in ("ops", "shmem", "application", "cco")]
    command = ["g++", "-std=c++20", "-O1", *options, "-D__HIP_PLATFORM_AMD__", "-Wl,--allow-shlib-undefined"]
    command += [*includes, f"-isystem{SYSROOT}/usr/include", source, f"-L{MORI}", *libraries]
    command += [f"-L{LIBRARIES}", "-l:libamdhip64.so.7", "-o", output]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return output


@pytest.fixture(scope="session")
def host_library(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("mori") / "libmori_rank.so"
    return link_with_mori(HERE / "mori_host.cc", output, "-shared", "-fPIC")


@pytest.fixture(scope="session")
def kernels() -> dict[str, Path]:
    """The folders of the code objects for each type of rows, kept with the build."""
    units = [mori_kernels.Unit("IntraNode", rows) for rows in ROW_TYPES]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KERNEL_SETTINGS.items():
            patch.setenv(name, value)
        return dict(zip(ROW_TYPES, mori_kernels.obtain(wheel.find(), "gfx942", units), strict=True))


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


# Fewer ranks, and memory in order, are test_mori_exchange.py's.
@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_dispatch_and_combine(configure, dtype):
    shape = {"hidden": 256, "top_k": 8, "experts_per_rank": 2, "max_tokens": 64}
    run_ranks(configure(dtype, ranks=8, rounds=20, seed=0, **shape), ROCM_SIM_ADVERSARIAL_MEMORY="1")


@pytest.mark.parametrize("seed", range(3))
def test_waves_in_other_orders(configure, seed):
    shape = {"hidden": 128, "top_k": 4, "experts_per_rank": 3, "max_tokens": 64}
    run_ranks(configure(ranks=4, rounds=10, seed=seed, **shape), ROCM_SIM_SEED=str(seed))
