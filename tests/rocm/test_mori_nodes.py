"""transport="mori" between machines that processes play: values, gradients, bytes and faults."""

import shutil
import threading
import time

import numpy as np
import pytest

from jax_moriep.mori import kernels, wheel
from tests.rocm import mori_jobs, nic
from tests.rocm.test_mori import KERNEL_SETTINGS
from tests.rocm.test_mori_exchange import ADVERSARIAL, RECORDED

# Goes round until it is told that something is wrong.
ROUND = {"timeout": 8, "abrupt": True, "linger": 12, "rounds": 500, "kernel": "InterNodeV1"}
# Messages and completions that are late by up to so many microseconds.
LATE = {"ROCM_SIM_NIC_DELAY_US": "3000"}
# Emulated by messages that the peer's host carries out.
NO_ATOMICS = {"ROCM_SIM_NIC_ATOMICS": "0"}
pytestmark = pytest.mark.timeout(600)


def test_two_nodes():
    """Below the row format: forward and backward, a node without a token, no token at all, any order."""
    cases = (
        ("round_trip", {"kernel": "InterNodeV1", "rounds": 2}),
        ("any_order", {"kernel": "InterNodeV1", "rounds": 2}),
        ("round_trip", {"kernel": "InterNodeV1LL", "rounds": 1, "full": True}),
        ("round_trip", {"tokens": 0, "rounds": 1}),
    )
    mori_jobs.run_cases(2, *cases, nodes=2, deadline=550, **RECORDED, **ADVERSARIAL, **LATE)


def test_two_nodes_of_two():
    cases = (
        ("round_trip", {"kernel": "InterNodeV1", "rounds": 2, "dtype": "bfloat16", "tokens": 70}),
        ("round_trip", {"kernel": "InterNodeV1", "rounds": 1, "dtype": "bfloat16", "wire": "fp8"}),
        ("any_order", {"kernel": "InterNodeV1LL", "rounds": 1, "dtype": "bfloat16", "full": True}),
    )
    mori_jobs.run_cases(4, *cases, nodes=2, deadline=550, **ADVERSARIAL, **LATE, **NO_ATOMICS)


@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        (2, ("every_routing:InterNodeV1", "fp8_wire")),
        (4, ("every_routing", "bfloat16")),
        (8, ("bfloat16:InterNodeV1",)),
    ],
)
def test_training_steps(ranks, cases):
    """Values and gradients against an oracle and another transport; "auto" is InterNodeV1LL here."""
    job = mori_jobs.start_module(ranks, "tests.rocm.mori_layer_job", str(ranks), *cases, nodes=2, **LATE)
    for index, out in enumerate(mori_jobs.finish(job, 550)):
        assert f"rank {index} agrees: {cases[-1]}" in out


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (2, 4)])
def test_no_more_crosses_than_routes_require(tmp_path, nodes, per_node):
    """Dispatch sends a token once to each other node that has an expert for it, combine one row back."""
    board = nic.Board(tmp_path / "board")
    options = {"kernel": "InterNodeV1", "dtype": "bfloat16", "hidden": 1024, "tokens": 64, "full": True}
    said = mori_jobs.run_cases(
        nodes * per_node,
        ("counted", options),
        nodes=nodes,
        deadline=550,
        ROCM_SIM_NIC_BOARD=str(board.path),
        ROCM_SIM_NIC_DELAY_US="0",
    )
    crossing = sum(int(out.split("crossing: ")[1].split()[0]) for out in said)
    required = 2 * crossing * 1024 * 2
    sent = sum(pair.bytes for pair in board.traffic())
    messages = sum(pair.messages for pair in board.traffic())
    print(
        f"{nodes} x {per_node}: {crossing} tokens cross, {sent} bytes in {messages} messages, "
        f"{100 * (sent / required - 1):.2f} % more than {required}"
    )
    assert required <= sent <= 1.05 * required


def test_a_rank_killed_between_steps_is_named():
    options = {"timeout": 8, "abrupt": True, "linger": 12, "kernel": "InterNodeV1"}
    said = mori_jobs.run_cases(4, ("killed", options), nodes=2, lost=3, JAX_MORIEP_TIMEOUT="8")
    assert all("rank 3 on node 1 " in out for out in said[:-1])


@pytest.mark.parametrize("kernel", ["EpDispatchInterNodeV1Kernel", "EpCombineInterNodeV1Kernel"])
def test_a_rank_killed_inside_a_kernel_of_moris_is_named(kernel):
    more = {"JAX_MORIEP_TIMEOUT": "8", "ROCM_SIM_TRACE": "1"}
    processes = mori_jobs.start_cases(2, ("stopped_inside", ROUND), nodes=2, **more)
    mori_jobs.kill_at(processes[-1], kernel, 3)
    said = mori_jobs.finish(processes, 200, lost=1)
    assert "rank 1 on node 1 " in said[0].split("saw: ")[1]


@pytest.mark.parametrize("retry", ["500", "0"], ids=["an error completes", "nothing completes"])
def test_a_link_that_stops_is_an_error(tmp_path, retry):
    board = nic.Board(tmp_path / "board")
    processes = mori_jobs.start_cases(
        2,
        ("stopped_inside", ROUND),
        nodes=2,
        JAX_MORIEP_TIMEOUT="8",
        ROCM_SIM_NIC_BOARD=str(board.path),
        ROCM_SIM_NIC_RETRY_MS=retry,
    )
    stop_after_some_steps(board)
    for rank, out in enumerate(mori_jobs.finish(processes, 200)):
        assert f"rank {1 - rank} on node {1 - rank} " in out.split("saw: ")[1]


def test_a_message_that_fails_is_an_error():
    said = mori_jobs.run_cases(
        2, ("stopped_inside", ROUND), nodes=2, JAX_MORIEP_TIMEOUT="8", ROCM_SIM_NIC_FAIL_AT="40"
    )
    assert all("on node" in out.split("saw: ")[1] for out in said)


def test_a_link_that_stops_for_a_while_changes_nothing(tmp_path):
    board = nic.Board(tmp_path / "board")

    def stop_and_go():
        stop_after_some_steps(board)
        time.sleep(3)
        board.stop(False)

    helper = threading.Thread(target=stop_and_go)
    helper.start()
    mori_jobs.run_cases(
        2,
        ("round_trip", {"kernel": "InterNodeV1", "rounds": 3}),
        nodes=2,
        ROCM_SIM_NIC_BOARD=str(board.path),
        ROCM_SIM_NIC_RETRY_MS="60000",
    )
    helper.join()


def test_kernels_that_send_by_another_way_than_mori_are_an_error(monkeypatch, tmp_path):
    """Kernels by which the GPU would drive an adapter, under the name of those for MORI's thread."""
    for name, value in (KERNEL_SETTINGS | {"MORI_DEVICE_NIC": "mlx5", "MORI_ENABLE_HOST_PROXY": "0"}).items():
        monkeypatch.setenv(name, value)
    (made,) = kernels.obtain(wheel.find(), "gfx942", [kernels.Unit("InterNodeV1", "float32")])
    shutil.copytree(made, tmp_path / made.name.replace("mlx5", "mlx5_proxy"))
    given = {
        "MORI_DEVICE_NIC": "mlx5",
        "MORI_ENABLE_HOST_PROXY": "1",
        "JAX_MORIEP_MORI_KERNELS": str(tmp_path),
    }
    for out in mori_jobs.run_cases(2, ("stopped_inside", ROUND | {"linger": 2}), nodes=2, **given):
        assert (
            "was compiled to send by the GPU itself, and MORI was opened to send by MORI's host proxy" in out
        )


def stop_after_some_steps(board: nic.Board) -> None:
    deadline = time.monotonic() + 200
    while sum(pair.atomics for pair in board.traffic()) < 8:
        assert time.monotonic() < deadline, "nothing was sent"
        time.sleep(0.01)
    board.stop()


def test_the_board_is_read_as_it_is_written(tmp_path):
    board = nic.Board(tmp_path / "board")
    assert board.traffic() == []
    board.stop()
    assert np.frombuffer(board.path.read_bytes()[:4], np.uint32) == 1
