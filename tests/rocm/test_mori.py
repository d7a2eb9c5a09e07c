"""The real amd-mori on simulated devices: the libraries and, compiled here, the kernels of its wheel."""

import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.rocm import simulated
from tests.rocm.mori_rank import Config
from tests.rocm.simulated import LIBRARIES, MORI, SYSROOT

HERE = Path(__file__).parent / "kernels"
SOURCES = MORI / "_jit-sources"
INCLUDES = ("", "include", "src", "3rdparty/spdlog/include", "3rdparty/msgpack-c/include")
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


@pytest.fixture(scope="session")
def kernels() -> Path:
    """A folder with the code object alone. It takes minutes to compile, so it is kept with the build."""
    source = HERE / "mori_kernels.hip"
    output = simulated.BUILD / "mori-kernels" / "ep_intranode.hsaco"
    if not is_newer(output, source):
        output.parent.mkdir(parents=True, exist_ok=True)
        # clang-19 lacks this builtin; the kernels only ask it for fences of the whole system.
        fence = '-D__scoped_atomic_thread_fence(order,scope)=__builtin_amdgcn_fence(order,"")'
        includes = [f"-isystem{SOURCES / path}" for path in INCLUDES]
        made = output.with_suffix(".new")
        simulated.compile_kernels(source, made, "-DHIP_ENABLE_WARP_SYNC_BUILTINS", fence, *includes)
        shutil.move(made, output)
    return output.parent


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e4m3fnuz"])
@pytest.mark.parametrize(("ranks", "top_k"), [(2, 2), (4, 8), (8, 8)])
def test_dispatch_and_combine(host_library, kernels, ranks, top_k, dtype):
    run_ranks(
        Config(
            host=str(host_library),
            kernels=str(kernels),
            ranks=ranks,
            hidden=256,
            top_k=top_k,
            experts_per_rank=8 // ranks * 2,
            max_tokens=64,
            dtype=dtype,
            rounds=20,
            seed=0,
        )
    )


@pytest.mark.parametrize("seed", range(3))
def test_waves_in_other_orders(host_library, kernels, seed):
    config = Config(str(host_library), str(kernels), 4, 128, 4, 3, 64, "bfloat16", 10, seed)
    run_ranks(config, ROCM_SIM_SEED=str(seed))
