"""The bench with real processes: what it writes is what it measured, and wrong values fail the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_moriep
from jax_moriep.bench.problem import patterns, traffic

SIZES = "--ranks 4 --processes 2 --tokens 16 --hidden 32 --intermediate 16 --experts 6 --top-k 2".split()
SMALL = [*SIZES, "--iters", "3", "--warmup", "1"]


def bench(*args, path=()):
    root = Path(jax_moriep.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(root)])}
    command = [sys.executable, "-m", "jax_moriep", "bench", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=250)


def test_a_run_writes_what_it_measured(tmp_path):
    out = tmp_path / "out.json"
    done = bench("exchange", *SMALL, "--memory", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "are right" in done.stdout
    result = json.loads(out.read_text())
    assert result["command"].startswith("jax-moriep bench exchange --ranks 4")
    assert result["case"]["tokens"] == 16
    assert {"jax", "jaxlib", "numpy", "jax_moriep", "python"} <= set(result["versions"])
    assert result["machine"]["cores"] == len(os.sched_getaffinity(0))

    names = {(call["name"], call["operation"]) for call in result["calls"]}
    operations = ("dispatch+combine", "dispatch", "combine")
    assert names == {(name, op) for name in ("native", "collective", "memcpy") for op in operations}
    for call in result["calls"]:
        spans = np.array(call["spans"])
        assert spans.shape == (3, 2, 2)  # iteration, process, start and end
        np.testing.assert_allclose(call["seconds"], spans[..., 1].max(1) - spans[..., 0].min(1))
        assert call["p50"] == sorted(call["seconds"])[1]
        assert call["p90"] == max(call["seconds"])
    # First and last result, 4 ranks, 2 transports; rows, weights and sizes of dispatch, tokens of the others.
    assert len(result["checks"]) == 2 * 4 * 2 * 5
    assert all(check["ok"] for check in result["checks"])

    ids = patterns.uniform(np.random.default_rng(0), 64, 6, 2)
    moved = traffic.of_routes(ids, 4, 2, 32 * 4)
    assert result["bytes"] == {"received": moved.received.tolist(), "remote": moved.remote.tolist()}
    for of_process in result["memory"].values():
        assert len(of_process) == 2
        assert all(seen["peak"] >= seen["before"] > 0 for seen in of_process)


@pytest.mark.parametrize(("kind", "compare"), [("experts", "blocked,dense"), ("layer", "native+blocked")])
def test_the_other_kinds_run(kind, compare):
    # What ``ragged_dot`` gives is looked at without processes: it takes long to compile.
    done = bench(kind, *SMALL, "--routing", "zipf", "--compare", compare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forward+backward" in done.stdout
    assert "are right" in done.stdout


def test_decoding_compares_quantised_experts_with_others_in_one_run(tmp_path):
    out = tmp_path / "out.json"
    options = "--phase decode --quant fp8_block --layers 2 --compare native+blocked --memory".split()
    done = bench("layer", *SMALL, *options, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a program has 2 layers, each with weights of its own; times are of one" in done.stdout
    assert "are right" in done.stdout
    result = json.loads(out.read_text())
    names = [(call["name"], call["operation"]) for call in result["calls"]]
    assert names == [("native+blocked", "T=16"), ("native+blocked-fp8_block", "T=16")]
    assert list(result["memory"]) == [name for name, _ in names]
    # First and last result of both, in each layer of each rank.
    assert len(result["checks"]) == 2 * 2 * 2 * 4


LOAD = "load --gb 0.00009 --processes 2 --rounds 2 --experts 5 --hidden 32 --intermediate 16".split()


def test_loading_compares_every_bit(tmp_path):
    """Five experts on two ranks; the size is met by a number of layers."""
    made, out = tmp_path / "made", tmp_path / "out.json"
    made.mkdir()
    done = bench(*LOAD, "--folder", str(made), "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 layers, E=5, H=32, I=16, bfloat16" in done.stdout
    # First and last result, both ways, in two processes.
    assert "all 8 comparisons of the bits are right" in done.stdout
    assert not list(made.iterdir())
    result = json.loads(out.read_text())
    assert [call["name"] for call in result["calls"]] == ["jm.weights.load", "safetensors"]
    assert all(len(call["seconds"]) == 2 for call in result["calls"])
    assert result["own_bytes"] == 6 * 3 * (3 * 32 * 16 * 2)
    assert all(len(of_process) == 2 for of_process in result["memory"].values())


def test_wrong_bits_fail_the_run(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "right = os.preadv\n"
        "def preadv(descriptor, buffers, offset):\n"
        "    count = right(descriptor, buffers, offset)\n"
        "    if len(buffers[0]) == 32 * 16 * 2:\n"
        "        buffers[0][-1] ^= 1\n"
        "    return count\n"
        "os.preadv = preadv\n"
    )
    done = bench(*LOAD, path=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    # A bit of each of three matrices: 6 layers of three experts, and of two.
    assert "WRONG: 4 of 8 comparisons" in done.stdout
    assert ": 54 bits that differ" in done.stdout
    assert ": 36 bits that differ" in done.stdout


def test_wrong_values_fail_the_run(tmp_path):
    # Python imports a module of this name when it starts: here it spoils one transport in every process.
    (tmp_path / "sitecustomize.py").write_text(
        "from jax_moriep.transports import collective\n"
        "right = collective.combine\n"
        "def combine(*args, **kwargs):\n"
        "    y, scalars, order = right(*args, **kwargs)\n"
        "    return y * 1.001, scalars, order\n"
        "collective.combine = combine\n"
    )
    out = tmp_path / "out.json"
    done = bench("exchange", *SMALL, "--json", str(out), path=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "WRONG: 16 of 80 comparisons" in done.stdout
    wrong = [check for check in json.loads(out.read_text())["checks"] if not check["ok"]]
    assert {(check["name"], check["operation"]) for check in wrong} == {
        ("collective", "dispatch+combine"),
        ("collective", "combine"),
    }


def test_a_process_that_fails_is_quoted(tmp_path):
    empty = tmp_path / "lib"
    empty.mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\nos.environ['JAX_MORIEP_LIB_DIR'] = {str(empty)!r}\n"
    )
    done = bench("exchange", *SMALL, "--transports", "native", path=[tmp_path])
    assert done.returncode == 1
    assert "of the bench ended with code 1; it said:" in done.stderr
    assert "transport='native' cannot run here: the native library" in done.stderr


def test_a_whole_host(tmp_path):
    # A case ends its processes, and new ones go on behind it.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "from jax_moriep.bench.kinds.link import Link\n"
        "def calls(self, case, world, data):\n"
        "    os._exit(3)\n"
        "Link.calls = calls\n"
    )
    sizes = "--tokens 16 --hidden 64 --intermediate 32 --experts 8 --experts-per-rank 4 --top-k 2"
    argv = "--platform cpu --ranks 1,2 --iters 2 --kinds exchange,layer --routings zipf --link-mib 1"
    done = bench("host", *argv.split(), *sizes.split(), "--out", str(tmp_path), path=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "processes of 2 ranks failed" in done.stdout
    result = json.loads((tmp_path / "host-cpu-x2.json").read_text())
    assert result["format"] == "jax-moriep bench host 2"
    assert [(of_set["ranks"], len(of_set["errors"])) for of_set in result["sets"]] == [(2, 1), (1, 0)]
    assert "ended with code 3" in result["sets"][0]["errors"][0]
    link, *entries = [entry for of_set in result["sets"] for entry in of_set["cases"]]
    assert link["case"]["kind"] == "link"
    assert link["failed"]
    assert [entry["case"]["kind"] for entry in entries] == ["exchange", "layer", "layer"]
    assert all(entry["calls"] and entry["checks"] and not entry["failed"] for entry in entries)
    names = {(call["name"], call["operation"]) for call in entries[0]["calls"]}
    assert {("native", "dispatch"), ("native-fp8", "dispatch"), ("nccl", "combine")} <= names
    assert "comparisons with the oracles are right" in done.stdout
    assert (tmp_path / "host-cpu-x2.png").exists()
