"""Jobs of several processes with transport="mori" on simulated devices, a device and a rank for each."""

import json
import socket
import subprocess

from tests.rocm import simulated
from tests.rocm.simulated import LIBRARIES, MORI, SYSROOT

ENVIRONMENT = {
    # Where MORI looks for ROCm SMI, unless told.
    "MORI_ROCM_SMI_PATH": str(LIBRARIES / "librocm_smi64.so.1"),
    # The simulated devices are in no PCI tree, and near no processor.
    "MORI_DISABLE_TOPO": "1",
    "MORI_IGNORE_CPU_AFFINITY": "1",
    "MORI_SOCKET_IFNAME": "lo",
    "JAX_MORIEP_MORI_DIR": str(MORI),
    "JAX_MORIEP_ROCM_PATH": str(SYSROOT / "rocm"),
    "JAX_MORIEP_CACHE_DIR": str(simulated.BUILD / "mori-cache"),
    "JAX_MORIEP_LIB_DIR": str(simulated.LIBRARY),
    "JAX_MORIEP_ARENA_MB": "16",
    "PYTHONPATH": simulated.JAX_PATH,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(ranks: int, *command: object, each: list[dict[str, str]] | None = None, **more: str):
    """Starts a process for each rank; ``each`` is what their environments differ in."""
    libraries = simulated.environment(ranks)["LD_LIBRARY_PATH"]
    environment = ENVIRONMENT | {"LD_LIBRARY_PATH": f"{libraries}:{MORI}"} | more
    return [
        simulated.start(*command, devices=ranks, **environment, **(each[rank] if each else {}))
        for rank in range(ranks)
    ]


def start_module(
    count: int, module: str, *arguments: str, nodes: int = 1, **more: str
) -> list[subprocess.Popen]:
    """Starts a module in so many processes of one job, which play so many machines."""
    port = free_port()
    each = [{"JAX_MORIEP_TEST_JOB": f"{port} {count} {index}"} for index in range(count)]
    if nodes > 1:
        for index, one in enumerate(each):
            one["JAX_MORIEP_NODE"] = f"machine {index * nodes // count}"
        libraries = simulated.environment(count)["LD_LIBRARY_PATH"]
        more = {
            "LD_LIBRARY_PATH": f"{simulated.BUILD / 'nic'}:{libraries}:{MORI}",
            "MORI_IB_GID_INDEX": "0",
        } | more
    return start(count, simulated.PYTHON, "-m", module, *arguments, each=each, **more)


def start_cases(ranks: int, *cases: tuple[str, dict], nodes: int = 1, **more: str) -> list[subprocess.Popen]:
    """Starts cases of mori_job.py, one after the other."""
    return start_module(ranks, "tests.rocm.mori_job", json.dumps(cases), nodes=nodes, **more)


def kill_at(process: subprocess.Popen, kernel: str, time: int) -> None:
    """Kills a process, which says what it runs, when it says so many times that it runs a kernel."""
    assert process.stderr is not None
    seen = 0
    for line in process.stderr:
        seen += kernel in line
        if seen == time:
            process.kill()
            return


def finish(processes: list[subprocess.Popen], deadline: float, lost: int = -1) -> list[str]:
    """Waits for all ranks, of which one may be lost on the way; gives what each wrote to stdout."""
    try:
        said = [simulated.finish(process, deadline) for process in processes]
    finally:
        # A rank that failed leaves its peers waiting.
        for process in processes:
            process.kill()
    bad = [
        f"rank {rank}: exit {process.returncode}\n{out[-2500:]}\n{err[-2500:]}"
        for rank, (process, (out, err)) in enumerate(zip(processes, said, strict=True))
        if process.returncode != (-9 if rank == lost else 0)
    ]
    assert not bad, "\n".join(bad)
    return [out for out, _ in said]


def run_cases(
    ranks: int,
    *cases: tuple[str, dict],
    nodes: int = 1,
    deadline: float = 300,
    lost: int = -1,
    **more: str,
) -> list[str]:
    """Runs cases of mori_job.py on all ranks to their end; gives what each said."""
    said = finish(start_cases(ranks, *cases, nodes=nodes, **more), deadline, lost)
    for rank, out in enumerate(said):
        assert f"rank {rank} agrees" in out, out
    return said
