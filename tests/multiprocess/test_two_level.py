"""transport="two_level" across processes: pairs of them are nodes, and what is between nodes has errors too."""

import re

import pytest

from tests.multiprocess.test_native import check_against_one_process, errors_of, shards_of, start

PAIRS = {"JAX_MORIEP_RANKS_PER_NODE": "2"}


@pytest.mark.parametrize(("nprocs", "devices"), [(4, 1), (3, 2)])
def test_nodes_give_the_numbers_of_one_process(tmp_path, nprocs, devices):
    result = start("script_parity.py", nprocs, tmp_path, "two_level", devices=devices, **PAIRS)
    assert result.returncode == 0, "\n".join(result.outputs)
    shards = shards_of(tmp_path, nprocs)
    assert len({str(s["digest"]) for s in shards}) == 1, "the compiled programs differ between the processes"
    check_against_one_process(shards, nprocs * devices)


@pytest.mark.parametrize(("fault", "deadline"), [("kill", 30), ("stop", 5)])
def test_a_lost_rank_is_an_error_on_both_nodes(fault, deadline):
    """The rank beside it names it; the ranks of the other node hear of it from jax or from each other."""
    env = {"JAX_MORIEP_TIMEOUT": str(deadline), **PAIRS}
    result = start("script_faults.py", 4, fault, 3, "two_level", grace=15, **env)
    assert result.returncode not in (0, 124)
    lost = float(re.search(r"time ([\d.]+)", result.outputs[3]).group(1))
    found = errors_of(result.outputs, skip=3)
    for when, text in found.values():
        assert when - lost < (5 if fault == "kill" else 5 + 10)
        assert "moriep" in text or "Gloo" in text
    expected = r"moriep node 1 \(ranks 2 to 3, here counted from 0\), dispatch, rank 0, step \d+: .*rank 1 \(pid"
    assert re.search(expected, found[2][1])


def test_processes_must_agree_on_the_size_of_nodes(tmp_path):
    script = tmp_path / "differs.py"
    script.write_text(
        "import os, jax, jax_moriep as jm\n"
        "from tests.multiprocess import common\n"
        "os.environ['JAX_MORIEP_RANKS_PER_NODE'] = str(1 + jax.process_index())\n"
        "jm.initialize(common.mesh(), cfg=common.config('two_level'))\n"
    )
    result = start(script, 2, grace=5)
    assert result.returncode == 1
    told = "JAX_MORIEP_RANKS_PER_NODE='1 in process 0 and 2 in process 1' must be the same in all processes"
    assert any(told in text for text in result.outputs), result.outputs
