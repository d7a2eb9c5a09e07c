"""Jobs on two machines: the same numbers, one-machine detection, other launchers; every fault ends in time.

The machines are simulated (``machines.py``); where the system does not permit that, these tests are skipped.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_moriep.bench.kinds import plan, plan_bytes
from jax_moriep.bench.problem.models import Model
from jax_moriep.bench.problem.routing import routing
from tests.nodes import common, jobs, measure_exchange
from tests.nodes.machines import Machines, Unavailable

TRANSPORTS = ["collective", "two_level"]
"""Those that run on several machines, and whose faults are tested here; "auto" takes the last."""
SECONDS = 120
"""Deadline of a job that ends by itself."""


@pytest.fixture
def machines():
    try:
        with Machines(2) as made:
            yield made
    except Unavailable as why:
        pytest.skip(f"no simulated machines on this system: {why}")


def check_shards(folder, processes, num_ranks):
    """Compares what ``script_layer.py`` saved with the oracle; returns what one-machine detection told."""
    layer, x, dy = common.case(num_ranks)
    saved = [dict(np.load(folder / f"{process}.npz")) for process in range(processes)]
    told = [json.loads(str(of_process.pop("told"))) for of_process in saved]
    assert all(of_process == told[0] for of_process in told)
    for case, mask in common.masks(num_ranks).items():
        y, want = layer.forward_backward(x.astype(float), dy.astype(float), mask)
        want["y"] = y
        for name, expected in want.items():
            parts = [
                (key, part) for s in saved for key, part in s.items() if key.startswith(f"{case}/{name}/")
            ]
            assert len(parts) == (processes if name == "router" else num_ranks), name
            for key, part in parts:
                first = int(key.rpartition("/")[2])
                of_shard = expected[first : first + len(part)]
                np.testing.assert_allclose(part[: len(of_shard)], of_shard, atol=3e-4, rtol=3e-5, err_msg=key)
                np.testing.assert_array_equal(part[len(of_shard) :], 0)  # experts that nobody routes to
    return told[0]


@pytest.mark.parametrize(
    ("transport", "rate"), [*((name, None) for name in TRANSPORTS), (TRANSPORTS[-1], "4mbit")]
)
def test_a_layer_on_two_machines(machines, tmp_path, transport, rate):
    """Two ranks on each; once all have tokens, once only those of one machine. A slow link is no fault."""
    if rate is not None:
        try:
            machines.slow_down(1, rate)
        except Unavailable as why:
            pytest.skip(f"no slow link on this system: {why}")
    with jobs.launch(machines, "script_layer.py", tmp_path, transport) as job:
        assert [ended.code for ended in job.wait(SECONDS)] == [0, 0], job.said()
    told = check_shards(tmp_path, 4, 4)
    assert "it needs the ranks of a group on one machine" in told["native"]
    assert (
        told["reasons"]["native"] == "it needs the ranks of a group on one machine; use transport='two_level'"
    )
    assert told["reasons"][told["auto"]] is None
    assert told["auto"] == TRANSPORTS[-1]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_link_carries_what_bench_plan_computes(machines, tmp_path, transport):
    steps, tokens, hidden = 8, 512, 512
    sent = []
    with jobs.launch(machines, "script_bytes.py", tmp_path, transport, steps, tokens, hidden) as job:
        for name in ("warm", "counted"):
            job.wait_for(name, 4, SECONDS)
            time.sleep(0.3)  # what the meeting itself sends has arrived
            sent.append([machines.sent_bytes(k) for k in range(2)])
            (tmp_path / name).touch()
        assert [ended.code for ended in job.wait(SECONDS)] == [0, 0], job.said()
    cfg = common.config(transport, hidden)
    sizes = plan.sizes_of(Model(1, cfg), tokens, "float32", 4, 2)
    exchange = plan_bytes.TRANSPORTS[transport](sizes, routing("uniform", cfg)(4, 2))
    for machine in range(2):
        both = exchange.dispatch.between_out + exchange.combine.between_out
        planned = steps * both.reshape(2, 2)[machine].sum()
        assert sent[1][machine] - sent[0][machine] == pytest.approx(planned, rel=0.01)


def test_two_level_sends_six_tenths_of_what_collective_sends(machines):
    sizes = {"tokens": 512, "hidden": 512, "experts": 32, "top_k": 4, "steps": 4}
    found = measure_exchange.measure(machines, ["collective", "two_level"], deadline=SECONDS, **sizes)
    assert all(of_name.error < 1e-5 for of_name in found.values())
    assert found["two_level"].sent <= 0.6 * found["collective"].sent


def slurm(rank):
    """What Slurm sets in the processes of a step, as far as jax reads it."""
    return {
        "SLURM_JOB_ID": "4321",
        "SLURM_STEP_NODELIST": "node[0-1]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
    }


def open_mpi(rank):
    """The same for mpirun of Open MPI 4."""
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.77.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_jax_finds_the_job_of_another_launcher(machines, tmp_path, launcher):
    one = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environments = [{**one, **launcher(rank)} for rank in range(2)]
    with jobs.python(machines, environments, "script_layer.py", tmp_path, "collective", "detect") as job:
        assert [ended.code for ended in job.wait(SECONDS)] == [0, 0], job.said()
    check_shards(tmp_path, 2, 2)


def started(machines, fault, transport, *options):
    """A job whose processes all run steps; the processes, machine by machine, are 0, 1 and 2, 3."""
    job = jobs.launch(machines, "script_faults.py", fault, transport, options=options)
    job.wait_for("running", 4, SECONDS)
    return job


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_killed_rank_ends_all_with_its_name(machines, transport):
    with started(machines, "kill", transport) as job:
        ended = job.wait(SECONDS)
    died = float(re.search(r"time ([\d.]+)", ended[1].output).group(1))
    for machine in ended:
        assert machine.code == 128 + signal.SIGKILL, job.said()
        assert "process 3 on node 1 failed with signal 9 (SIGKILL)" in machine.output
        assert machine.when - died < 20
    errors = re.findall(r"\[(\d)\] error at ([\d.]+)", ended[0].output + ended[1].output)
    assert sorted(rank for rank, _ in errors) == ["0", "1", "2"], job.said()
    assert all(float(when) - died < 10 for _, when in errors)


def test_a_script_that_fails_on_one_machine_ends_the_job_on_both(machines):
    with started(machines, "exit", "collective") as job:
        begin = time.time()
        for machine in job.wait(SECONDS):
            assert machine.code == 7, job.said()
            # Its connections close before it has ended: a peer that raises for that may end sooner.
            first = "; ending the others in 10 s|, which others noticed first"
            assert re.search(f"process 3 on node 1 failed with exit code 7({first})", machine.output)
            assert machine.when - begin < 30


def test_a_name_that_would_let_process_0_wait_for_ever_is_refused(machines):
    machines.misname()
    with jobs.launch(machines, "script_faults.py", "none", "collective") as job:
        for k, machine in enumerate(job.wait(SECONDS)):
            assert machine.code == 1
            assert f"hostname='node{k}' must not be this machine's loopback 127.0.1.1" in machine.output


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_dead_link_is_told_with_the_node_and_where_each_process_waits(machines, transport):
    with started(machines, "none", transport, "--lost-after", "3", "--grace", "2") as job:
        machines.plug(1, into=False)
        pulled = time.time()
        ended = job.wait(SECONDS)
    for machine, other in zip(
        ended, ("1 (10.77.0.2, processes 2 to 3)", "0 (10.77.0.1, processes 0 to 1)"), strict=True
    ):
        assert machine.code == 1
        assert (
            f"node {other} has not answered for 3 s: the machine or the link to it is down" in machine.output
        )
        assert "script_faults.py" in machine.output
        assert machine.when - pulled < 3 + 2 + 20


def test_another_number_of_tokens_on_one_rank_is_no_hang(machines):
    """Nothing of ours runs between the ranks: gloo ends the process that receives too much."""
    with jobs.launch(machines, "script_faults.py", "tokens", "collective", options=["--grace", "2"]) as job:
        for machine in job.wait(SECONDS):
            assert machine.code != 0
            assert re.search(r"process \d on node \d failed", machine.output)
    assert "Is there a distributed collective mismatch in your code?" in job.said()


def test_machines_end_with_the_test(machines, tmp_path):
    """Also if that is killed; ``machines`` is for the skip where there can be none."""
    code = (
        "import time\n"
        "from tests.nodes.machines import Machines\n"
        "with Machines(2) as made:\n"
        "    made.start(1, ['sleep', '600'], {})\n"
        "    print(*(m.pid for m in made._made), flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(jobs.ROOT)},
    )
    with process:
        pids = process.stdout.readline().split()
        assert len(pids) == 3
        process.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/ns/net").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
