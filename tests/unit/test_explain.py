"""What explain tells of an exchange: MORI's kernels and launches, from which table's row, and refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh

import jax_moriep as jm
from jax_moriep import transports
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place
from tests.unit.test_mori_wheel import make_wheel

LOWERED = AbstractMesh((8,), ("ep",))
SIZES = (256, 8, 7168, 2048)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An amd-mori whose only table has one row for a dispatch of 8 ranks."""
    folder = make_wheel(tmp_path)
    row = {"dtype": "bf16", "num_tokens": 512, "hidden_dim": 7168, "topk": 8, "block_num": 72}
    rules = [row | {"warp_per_block": 12, "rdma_block_num": 0, "latency_us": 1.0}]
    path = folder / "ops" / "tuning_configs" / "gfx942_mi300x_IntraNode_ep8_dispatch.json"
    path.write_text(json.dumps({"version": "1.0", "rules": rules}))
    monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(folder))
    return folder


def lines_below(told, name):
    """What stands indented below a transport's line."""
    lines = str(told).splitlines()
    below = lines[lines.index(f"  {name}: can run") + 1 :]
    end = next(i for i, line in enumerate(below) if not line.startswith("    "))
    return [line[4:] for line in below[:end]]


@pytest.mark.parametrize("transport", ["mori", "auto"])
def test_kernel_launches_and_the_row_they_are_from(wheel, transport):
    told = jm.explain(jm.MoEConfig(*SIZES, transport=transport), LOWERED, num_tokens=500)
    assert lines_below(told, "mori") == [
        "mori_kernel: IntraNode (all ranks are on one machine)",
        "  dispatch: 72 blocks, of 12 waves (gfx942_mi300x_IntraNode_ep8_dispatch.json: 512 tokens, "
        "hidden 7168, top_k 8, bf16)",
        "  combine: 256 blocks, of 16 waves (no measured row; what sending takes on other models)",
    ]
    assert lines_below(told, "native") == []
    assert told.transport_details == {"mori": "\n".join(lines_below(told, "mori"))}


def test_what_the_user_named_is_told(wheel):
    cfg = jm.MoEConfig(*SIZES, tuning=jm.Tuning("IntraNodeLL", block_num=40))
    kernel, dispatch, _ = lines_below(jm.explain(cfg, LOWERED, num_tokens=64), "mori")
    assert kernel == "mori_kernel: IntraNodeLL (named by cfg.tuning)"
    assert dispatch.startswith("  dispatch: 40 blocks, of 16 waves (block_num by cfg.tuning, the rest: ")


@pytest.mark.parametrize(
    ("cfg", "dtype", "text"),
    [
        ({}, "float16", "refuses it: x.dtype='float16' must be one of float32, bfloat16, "),
        ({"tuning": jm.Tuning(block_num=305)}, "bfloat16", "refuses it: block_num=305 must be between 1 "),
        ({"tuning": jm.Tuning("InterNode")}, "bfloat16", "refuses it: mori_kernel='InterNode' must "),
        ({"tuning": jm.Tuning("IntraNodeLL"), "top_k": 9}, "bfloat16", "refuses it: top_k=9 must be at most"),
    ],
)
def test_a_refusal_is_told(wheel, cfg, dtype, text):
    cfg = dataclasses.replace(jm.MoEConfig(*SIZES), **cfg)
    (line,) = lines_below(jm.explain(cfg, LOWERED, num_tokens=64, dtype=dtype), "mori")
    assert line.startswith(text)


def test_without_the_wheel_the_cure_is_told(monkeypatch):
    monkeypatch.delenv("JAX_MORIEP_MORI_DIR", raising=False)
    (line,) = lines_below(jm.explain(jm.MoEConfig(*SIZES), LOWERED, num_tokens=64), "mori")
    assert line == "refuses it: amd-mori is not installed; run: pip install amd-mori==1.2.4"


def test_nothing_is_told_of_what_cannot_run_or_without_sizes(wheel):
    here = Mesh(np.array(jax.devices()[:2]), ("ep",))
    assert jm.explain(jm.MoEConfig(*SIZES), here, num_tokens=64).transport_details == {}
    assert jm.explain(jm.MoEConfig(*SIZES), LOWERED).transport_details == {}


def test_any_transport_may_tell(monkeypatch):
    class Telling:
        def unavailable_reason(self, place):
            return None

        def describe(self, place, cfg, shape, dtype):
            return f"{shape.num_tokens} tokens of {dtype} on {place.num_ranks}"

    monkeypatch.setitem(transports.IMPLEMENTATIONS, "native", Telling())
    here = Mesh(np.array(jax.devices()[:2]), ("ep",))
    told = jm.explain(jm.MoEConfig(8, 2, 16, 8), here, num_tokens=32, dtype="float32")
    assert lines_below(told, "native") == ["32 tokens of float32 on 2"]


def test_which_kernels_the_experts_run_is_told(monkeypatch):
    """The sizes and the dtype that explain was given decide; on a mesh of GPUs that this machine has not."""
    monkeypatch.setattr(compat, "has_hopper_kernels", lambda: True)
    monkeypatch.setattr(Place, "of", lambda mesh, axis_name: Place("gpu", "sm_90", 8))
    cfg = jm.MoEConfig(*SIZES)
    assert "products by Pallas-Mosaic if block is at least 32" in str(jm.explain(cfg, LOWERED))
    told = jm.explain(cfg, LOWERED, num_tokens=8192)
    assert lines_below(told, "triton") == ["products by Pallas-Mosaic"]
    assert told.experts_details == {"triton": "products by Pallas-Mosaic"}
    why = "products by Pallas-Triton; not by Pallas-Mosaic's kernels: "
    assert lines_below(jm.explain(cfg, LOWERED, num_tokens=8), "triton") == [
        f"{why}block=8 must be a multiple of 8 and at least 32"
    ]
    in_f32 = jm.explain(cfg, LOWERED, num_tokens=8192, dtype="float32")
    assert lines_below(in_f32, "triton") == ["products by Pallas-Mosaic"]
    with jax.default_matmul_precision("highest"):
        exact = jm.explain(cfg, LOWERED, num_tokens=8192, dtype="float32")
    precision = "jax.default_matmul_precision is 'highest', and they multiply float32 in TF32"
    assert lines_below(exact, "triton") == [why + precision]
