"""The native transport across processes: the same numbers as in one process, and every fault has an error."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_moriep as jm
from jax_moriep.processes.launch import launch
from tests.multiprocess import common

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def start(script, nprocs, *args, devices=1, timeout=100, grace=10.0, **env):
    paths = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return launch(
        HERE / script,
        nprocs,
        devices,
        args=[str(a) for a in args],
        env={"PYTHONPATH": paths, "JAX_MORIEP_TIMEOUT": "30", **env},
        timeout=timeout,
        grace=grace,
        capture=True,
    )


def shared_memory_files():
    return set(os.listdir("/dev/shm"))


def shards_of(folder, nprocs):
    """What each process of ``script_parity.py`` saved."""
    return [dict(np.load(folder / f"{i}.npz")) for i in range(nprocs)]


def check_against_one_process(shards, num_ranks, exact=()):
    """Compares what the processes saved, but for their digests, with the native transport in this one."""
    mesh = Mesh(np.array(jax.devices()[:num_ranks]), ("ep",))
    cfg = common.config(capacity_factor=2.0)
    x, params = common.case(cfg, num_ranks)

    def loss(x, params):
        y, stats = jm.ep_moe(x, params, cfg, mesh=mesh)
        return jnp.sum(jnp.sin(y)) + stats.load_balance_loss, y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(x, params)
    want = {"y": y, "d_x": grads[0], "d_w1": grads[1].w1, "d_router": grads[1].router}
    seen = 0
    for of_process in shards:
        for key, part in of_process.items():
            if key == "digest":
                continue
            name, first = key.split("/")
            expected = np.asarray(want[name])[int(first) : int(first) + len(part)]
            if name in exact:
                np.testing.assert_array_equal(part, expected)
            else:  # losses and replicated gradients are added by XLA, whose order differs
                np.testing.assert_allclose(part, expected, atol=1e-5, rtol=1e-4)
            seen += 1
    assert seen == 3 * num_ranks + len(shards)  # the router's gradient is whole in every process


@pytest.mark.parametrize(("nprocs", "devices"), [(2, 4), (4, 2), (3, 1), (5, 1)])
def test_processes_give_the_bits_of_one_process(tmp_path, nprocs, devices):
    result = start("script_parity.py", nprocs, tmp_path, "native", devices=devices)
    assert result.returncode == 0, "\n".join(result.outputs)
    shards = shards_of(tmp_path, nprocs)
    assert len({str(s["digest"]) for s in shards}) == 1, "the compiled programs differ between the processes"
    check_against_one_process(shards, nprocs * devices, exact=["y"])


def test_collective_across_processes(tmp_path):
    """The portable transport over XLA's own collectives agrees with the native one."""
    assert start("script_parity.py", 2, tmp_path, "collective").returncode == 0
    check_against_one_process(shards_of(tmp_path, 2), 2)


def errors_of(outputs, skip):
    """For each process but the culprit: when its error came and what it said."""
    found = {}
    for rank, text in enumerate(outputs):
        match = re.search(r"error at ([\d.]+) (.*)", text)
        if rank != skip:
            assert match, f"rank {rank} reported no error:\n{text}"
            found[rank] = float(match.group(1)), match.group(2)
    return found


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_killed_rank_is_reported_by_all_others_within_seconds(culprit):
    before = shared_memory_files()
    result = start("script_faults.py", 4, "kill", culprit)
    assert result.returncode == 128 + 9
    died = float(re.search(r"time ([\d.]+)", result.outputs[culprit]).group(1))
    for rank, (when, text) in errors_of(result.outputs, skip=culprit).items():
        assert when - died < 5
        assert "UNAVAILABLE" in text
        assert re.search(rf"rank {rank}, step \d+", text)
        assert f"rank {culprit} (pid" in text
        assert "has died" in text
    assert shared_memory_files() <= before, "something was left in /dev/shm"
    # A new run starts at once.
    assert start("script_faults.py", 2, "none", 0).returncode == 0


def test_a_stopped_rank_is_a_deadline_error():
    result = start("script_faults.py", 3, "stop", 1, grace=5, JAX_MORIEP_TIMEOUT="5")
    assert result.returncode != 0
    stopped = float(re.search(r"time ([\d.]+)", result.outputs[1]).group(1))
    first = [(when, text) for when, text in errors_of(result.outputs, skip=1).values() if "DEADLINE" in text]
    assert first
    for when, text in first:
        assert 4 < when - stopped < 14
        assert re.search(r"waited 5 s for rank 1 \(pid \d+, alive: stopped", text)
        assert "JAX_MORIEP_TIMEOUT" in text


@pytest.mark.parametrize(
    ("fault", "mine", "theirs"),
    [
        ("config", "capacity_factor=2.0", "capacity_factor=3.0"),
        ("tokens", "tokens per rank 6 here", "4 there"),
        ("layers", "the order (which call of the program it is) has", "there"),
    ],
)
def test_a_rank_with_another_program_is_told_both_values(fault, mine, theirs):
    result = start("script_faults.py", 3, fault, 1)
    assert result.returncode != 0
    told = [text for text in result.outputs if "runs another program" in text]
    assert told
    assert any(mine in text and theirs in text for text in told), told


def test_a_rank_that_leaves_early_is_noticed(tmp_path):
    """One process ends in good order while the other runs another step."""
    script = tmp_path / "leaves.py"
    script.write_text(
        "import jax, jax.numpy as jnp, jax_moriep as jm\n"
        "from tests.multiprocess import common\n"
        "mesh, cfg = common.mesh(), common.config()\n"
        "x, params = common.placed_case(cfg, mesh)\n"
        "step = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh)[0])\n"
        "for _ in range(3 + jax.process_index()):\n"
        "    jax.block_until_ready(step(x, params))\n"
    )
    result = start(script, 2)
    assert result.returncode != 0
    assert re.search(r"rank 0 has left the group|rank 0 \(pid \d+\) has died", result.outputs[1])


@pytest.mark.parametrize("how", ["leaves", "sleeps"])
def test_a_missing_rank_is_an_error_of_a_loss_with_a_statistic(how):
    """Statistics ride in the exchange: a psum of theirs would wait for ever and hide the exchange's error."""
    result = start("script_statistics.py", 3, how, 1, grace=5, JAX_MORIEP_TIMEOUT="5")
    assert result.returncode != 0
    missing = float(re.search(r"time ([\d.]+)", result.outputs[1]).group(1))
    for rank, (when, text) in errors_of(result.outputs, skip=1).items():
        # The first to notice ends its process, which the other may notice before its own deadline.
        assert when - missing < 5 + 4
        assert re.search(rf"moriep dispatch, rank {rank}, step \d+: ", text)
    told = [text for _, text in errors_of(result.outputs, skip=1).values()]
    assert any(re.search("rank 1 (has left|\\(pid)|waited 5 s for rank 1", text) for text in told), told


def test_the_library_of_another_place_is_not_needed_to_import():
    """`import jax_moriep` loads no native code and starts no backend."""
    code = (
        "import jax_moriep, jax, sys\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libmoriep' not in maps\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_may_run_programs_of_their_own_groups():
    """Two Python threads, each with its own half of the devices, do not disturb each other."""
    results = {}

    def work(name, devices):
        mesh = Mesh(np.array(devices), ("ep",))
        cfg = common.config()
        x, params = common.case(cfg, len(devices))
        fn = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh)[0])
        results[name] = [np.asarray(fn(x, params)) for _ in range(20)]

    threads = [
        threading.Thread(target=work, args=(i, jax.devices()[4 * i : 4 * i + 4]), daemon=True)
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=100)
        assert not thread.is_alive()
    for outputs in results.values():
        for y in outputs[1:]:
            np.testing.assert_array_equal(y, outputs[0])
    np.testing.assert_array_equal(results[0][0], results[1][0])
