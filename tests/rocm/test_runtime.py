"""The HIP runtime without kernels: streams, events, graphs, memory that processes share."""

import os
import signal

import pytest

from tests.rocm import runtime_cases, simulated

MODULE = "tests.rocm.runtime_cases"


def python(module, *arguments):
    return (simulated.PYTHON, "-m", module, *arguments)


@pytest.mark.parametrize("case", runtime_cases.CASES, ids=lambda case: case.__name__)
def test_case(case):
    simulated.run(*python(MODULE, case.__name__))


@pytest.mark.parametrize("seed", range(5))
def test_graphs_in_other_orders(seed):
    name = runtime_cases.graphs_run_in_an_order_that_dependencies_allow.__name__
    simulated.run(*python(MODULE, name), ROCM_SIM_SEED=str(seed))


def test_unknown_calls_say_their_name():
    _, err = simulated.run(*python(MODULE, runtime_cases.unknown_calls_say_their_name.__name__))
    assert "hipMemCreate of libamdhip64.so.7 is not simulated" in err


def shared_memory_files():
    return set(os.listdir("/dev/shm"))


def start_owner():
    """A process that shares memory, and the handle that it printed."""
    owner = simulated.start(*python("tests.rocm.ipc_owner"), stdin=True)
    return owner, owner.stdout.readline().strip()


def test_processes_share_memory():
    before = shared_memory_files()
    owner, handle = start_owner()
    simulated.run(*python("tests.rocm.ipc_peer", handle))
    owner.stdin.write("\n")
    simulated.finish(owner, deadline=60)
    assert owner.returncode == 0
    assert shared_memory_files() == before


def test_nothing_is_left_after_a_kill():
    before = shared_memory_files()
    owner, handle = start_owner()
    peer = simulated.start(*python("tests.rocm.ipc_peer", handle, "wait"), stdin=True)
    assert peer.stdout.readline().strip() == "opened"
    owner.send_signal(signal.SIGKILL)
    simulated.finish(owner, deadline=60)
    # The memory is there as long as a process has it mapped, as on the device.
    peer.stdin.write("\n")
    _, err = simulated.finish(peer, deadline=60)
    assert peer.returncode == 0, err
    out, _ = simulated.run(*python("tests.rocm.ipc_peer", handle, "gone"))
    assert out.strip() == "gone"
    assert shared_memory_files() == before
