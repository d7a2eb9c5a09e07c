"""transport="two_level" across processes, of which pairs are nodes: numbers, and errors on every node."""

import re

from tests.multiprocess.test_native import check_against_one_process, errors_of, shards_of, start

PAIRS = {"JAX_MORIEP_RANKS_PER_NODE": "2"}


def test_nodes_give_the_numbers_of_one_process(tmp_path):
    result = start("script_parity.py", 4, tmp_path, "two_level", **PAIRS)
    assert result.returncode == 0, "\n".join(result.outputs)
    shards = shards_of(tmp_path, 4)
    assert len({str(s["digest"]) for s in shards}) == 1, "the compiled programs differ between the processes"
    check_against_one_process(shards, 4)


def test_a_stopped_rank_is_an_error_on_both_nodes():
    """The rank beside it names it and their node; the other node hears of it from jax and from each other."""
    result = start("script_faults.py", 4, "stop", 3, "two_level", grace=5, JAX_MORIEP_TIMEOUT="5", **PAIRS)
    assert result.returncode not in (0, 124)
    stopped = float(re.search(r"time ([\d.]+)", result.outputs[3]).group(1))
    found = errors_of(result.outputs, skip=3)
    for when, text in found.values():
        assert 4 < when - stopped < 14
        assert "moriep" in text or "Gloo" in text
    node = r"moriep node 1 \(ranks 2 to 3, here counted from 0\), "
    assert re.search(node + r"dispatch, rank 0, step \d+: waited 5 s for rank 1 \(pid", found[2][1])


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


def test_nodes_that_run_different_configs_get_nan(tmp_path):
    """All sizes are the same, so nothing but the digest between the nodes can tell."""
    script = tmp_path / "differs.py"
    script.write_text(
        "import jax, numpy as np, jax_moriep as jm\n"
        "from tests.multiprocess import common\n"
        "mesh = common.mesh()\n"
        "for name, activation in (('same', 'silu'), ('other', ['silu', 'gelu'][jax.process_index()])):\n"
        "    cfg = common.config('two_level', activation=activation)\n"
        "    x, params = common.placed_case(cfg, mesh)\n"
        "    y, _ = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh))(x, params)\n"
        "    here = np.concatenate([np.ravel(s.data) for s in y.addressable_shards])\n"
        "    print(name, 'nan', np.isnan(here).mean())\n"
        "common.meet('done')\n"
    )
    result = start(script, 2, JAX_MORIEP_RANKS_PER_NODE="1")
    assert result.returncode == 0, result.outputs
    for text in result.outputs:
        assert "same nan 0.0" in text
        assert "other nan 1.0" in text


def test_one_process_may_ask_what_would_run(tmp_path):
    """The others take native, and never look at nodes: process 0 would wait for them, and they for it."""
    script = tmp_path / "explains.py"
    script.write_text(
        "import jax, jax_moriep as jm\n"
        "from tests.multiprocess import common\n"
        "mesh, cfg = common.mesh(), common.config('auto')\n"
        "if jax.process_index() == 0:\n"
        "    print(jm.explain(cfg, mesh, num_tokens=8))\n"
        "jm.initialize(mesh, cfg=cfg, num_tokens=8)\n"
        # Who ends first takes along the memory that the other has yet to open.
        "common.meet('opened')\n"
    )
    result = start(script, 2, timeout=60)
    assert result.returncode == 0, result.outputs
    assert "transport: native" in result.outputs[0]
