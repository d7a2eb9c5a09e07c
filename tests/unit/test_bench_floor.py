"""``bench floor``: its copies, kinds and baselines on small sizes, and what it writes, tells and draws."""

import dataclasses
import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_torch import Tensor, Torch, grouped_product

from jax_moriep.bench.against import copies, plain, torch_layer
from jax_moriep.bench.kinds import products, route
from jax_moriep.bench.kinds.table import KINDS, new_case
from jax_moriep.bench.measure import turns
from jax_moriep.bench.measure.turns import interleave
from jax_moriep.bench.problem import formats, oracle, shares
from jax_moriep.bench.problem.world import Barrier, World
from jax_moriep.bench.run import floor, floor_plan, host
from jax_moriep.bench.run.devices import Devices
from jax_moriep.bench.show import floor_picture, floor_report, floor_rows
from jax_moriep.cli import main
from jax_moriep.errors import ConfigError

SMALL: dict[str, Any] = {"tokens": 12, "hidden": 16, "intermediate": 8, "experts": 6, "top_k": 2}
GPU = Devices("gpu", "NVIDIA H200", 1, {})


def calls_of(case, tmp_path):
    Barrier.create(tmp_path / "barrier", 1)
    world = World(case.ranks, tmp_path / "barrier")
    kind = KINDS[case.kind]
    return kind.calls(case, world, kind.make_data(case, world))


def run_here(case, tmp_path):
    return interleave(calls_of(case, tmp_path), 1, 1, lambda: None)[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(1024,), (7, 100), (3,)])
def test_copies_and_sums(shape, dtype):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    factor = jnp.ones(1, dtype)
    whole = float(np.asarray(x, np.float64).sum())
    copy = copies._tiled(copies._copy_kernel, 64, 4, False, x, factor, interpret=True)
    np.testing.assert_array_equal(copy, x)
    sums = copies._tiled(copies._sum_kernel, 64, 4, True, x, factor, interpret=True)
    assert float(sums.sum()) == pytest.approx(whole, rel=1e-4, abs=1e-4)
    for run in (*copies._copies().values(), *copies._sums().values()):
        jax.jit(run).trace(x, factor).lower(lowering_platforms=("cuda",))
    np.testing.assert_array_equal(copies.fastest_copy().run(x, factor), x)
    assert float(copies.fastest_sum().run(x, factor)[0]) == pytest.approx(whole, rel=1e-2, abs=1e-2)


def test_the_fastest_pass_is_taken_and_told(monkeypatch):
    seconds = iter([4.0, 1.0, 2.0])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(copies, "_TRIED_BYTES", 16)
    monkeypatch.setattr(copies, "in_a_row", lambda call, rounds: next(seconds))
    passes = {name: lambda x, factor: x for name in ("XLA", "b", "c")}
    fastest = copies._fastest(passes, 2)
    assert fastest.name == "b"
    assert fastest.tb_per_s["b"] == 4 * fastest.tb_per_s["XLA"]
    assert fastest.told.startswith("b, of TB/s: XLA 0.00, b 0.00")


@pytest.mark.parametrize("model_experts", [0, 9])
def test_a_share_is_routed_over_all_experts_of_its_model(model_experts, tmp_path):
    case = new_case(
        "layer",
        ranks=1,
        processes=1,
        model_experts=model_experts,
        compare=("native+blocked", "plain"),
        floors=("dense+copy", "dense+copy+read"),
        **SMALL,
    )
    calls = calls_of(case, tmp_path)
    seen = turns.measured(calls, 1, 1, lambda: None)
    assert [check for check in seen["checks"] if not check["ok"]] == []
    assert {check["name"] for check in seen["checks"]} == {"native+blocked", "plain"}
    assert [call["name"] for call in seen["calls"]] == [*case.floors, *case.compare] * 2
    how = {call["name"]: call["how"] for call in seen["calls"]}
    assert how["dense+copy"] == "XLA"
    assert how["native+blocked"] == ""
    assert all(call["memory"] > 0 for call in seen["calls"] if call["name"] in case.compare)


def test_a_model_has_no_fewer_experts_than_a_share():
    with pytest.raises(ConfigError, match="model_experts=5 must be at least experts=6"):
        new_case("layer", ranks=1, processes=1, model_experts=5, **SMALL)
    with pytest.raises(ConfigError, match="hidden=16 must be at least experts=17"):
        new_case("layer", ranks=1, processes=1, model_experts=17, **SMALL)
    with pytest.raises(ConfigError, match="model_experts=7 must be 0 in decoding"):
        new_case("decode", ranks=1, processes=1, model_experts=7, **SMALL)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_layer_of_tokamax_has_swapped_weights_and_checked_gradients(wrong, tmp_path, monkeypatch):
    def product(rows, weights, sizes):
        weights = weights if not wrong else weights * 1.5 - jax.lax.stop_gradient(weights) * 0.5
        return jax.lax.ragged_dot(rows, weights, sizes)

    monkeypatch.setattr(plain, "_tokamax", product)
    case = new_case("layer", ranks=1, processes=1, compare=("plain_tokamax",), **SMALL)
    bad = {check.what for check in run_here(case, tmp_path) if not check.ok}
    assert bad == ({"d_w1 of rank 0", "d_w2 of rank 0"} if wrong else set())


def test_the_layer_of_torch_and_its_gradients_that_are_written_out():
    rng = np.random.default_rng(0)
    tokens, hidden, inner, experts, top_k = 17, 12, 6, 5, 2
    shapes = ((tokens, hidden), (hidden, experts), (experts, 2 * inner, hidden), (experts, hidden, inner))
    operands = [rng.normal(size=shape) for shape in (*shapes, shapes[0])]

    def dense(x, router, w1, w2):
        chosen, ids = jax.lax.top_k(x @ router, top_k)
        gate, up = jnp.split(jnp.einsum("th,tkih->tki", x, w1[ids]), 2, axis=2)
        return jnp.einsum("tk,tki,tkhi->th", jax.nn.softmax(chosen), jax.nn.silu(gate) * up, w2[ids])

    with jax.enable_x64(True):
        y, pull = jax.vjp(dense, *map(jnp.asarray, operands[:4]))
        want = [np.asarray(x) for x in (y, *pull(jnp.asarray(operands[4])))]
    forward, both = torch_layer._written_out(Torch, grouped_product, top_k)
    got = both(*map(Tensor, operands))
    for a, b in zip((*got, *forward(*map(Tensor, operands[:4]))), (*want, want[0]), strict=True):
        np.testing.assert_allclose(a.a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_the_layer_of_torch_in_the_bench(tmp_path):
    case = new_case("layer", ranks=1, processes=1, compare=("torch",), repeats=2, **SMALL)
    checks = run_here(case, tmp_path)
    assert checks
    assert all(check.ok for check in checks)


@pytest.mark.parametrize(("experts", "dtype"), [(16, "f32"), (16, "bf16"), (6, "f32")])
def test_the_router_is_right(experts, dtype, tmp_path):
    case = new_case(
        "route", ranks=1, processes=1, repeats=2, dtype=dtype, **{**SMALL, "experts": experts, "hidden": 64}
    )
    assert (route.config(case).num_groups is None) == (experts == 6)
    calls = calls_of(case, tmp_path)
    _, checks = interleave(calls, 1, 1, lambda: None)
    assert [check for check in checks if not check.ok] == []
    whats = ("tokens with other experts", "weights", "d_x, of the largest", "d_router, of the largest")
    assert {check.what for check in checks} == set(whats)
    assert all(what in calls[1].how() for what in whats)


def test_a_wrong_router_is_noticed(tmp_path, monkeypatch):
    right = route.routing.route

    def wrong(x, params, cfg):
        given = right(x, dataclasses.replace(params, router=params.router[:, ::-1]), cfg)
        return dataclasses.replace(given, weights=given.weights * 1.01)

    monkeypatch.setattr(route.routing, "route", wrong)
    case = new_case("route", ranks=1, processes=1, **{**SMALL, "hidden": 64})
    bad = {check.what for check in run_here(case, tmp_path) if not check.ok}
    assert {"tokens with other experts", "weights", "d_router, of the largest"} <= bad


@pytest.mark.parametrize("activation", ["silu", "swiglu_clamped"])
def test_oracle_gradients_of_experts_with_biases_are_finite_differences(activation):
    rng = np.random.default_rng(0)
    shapes = {"x": (3, 4), "w1": (10, 4), "w2": (4, 5), "b1": (10,), "b2": (4,)}
    inputs = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    d_y, between = rng.normal(size=(3, 4)), oracle.between(activation, 0.9, 1.702)
    found = oracle.mlp(**inputs, d_y=d_y, between=between)
    for name, value in inputs.items():
        for at in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[at] = 1e-6
            up, down = (
                oracle.mlp(**{**inputs, name: value + sign * step}, d_y=d_y, between=between).y
                for sign in (1, -1)
            )
            slope = ((up - down) * d_y).sum() / 2e-6
            np.testing.assert_allclose(getattr(found, f"d_{name}")[at], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_share_with_biases(dtype):
    """All gradients are compared, and one that is wrong is noticed; no kernel is run alone."""
    share = shares.Share(3, 64, 32, 96, "swiglu_clamped", biased=True)
    data = shares.Data.of(share, np.array([50, 0, 46], np.int32), block=16, dtype=dtype)
    assert data.dtype == dtype
    assert products.kernels(data, data.d_out, data.d_out, True) == {}
    work = products.mlp(data, True)
    results = jax.jit(work.fn)(*work.operands)
    wanted = shares.checked_experts(data)
    found = shares.errors(data, wanted, results)
    assert list(found)[-2:] == ["db1", "db2"]
    assert shares.wrong(found, dtype) == []
    for i, name in ((5, "db1"), (6, "db2")):
        changed = [x * 2 if i == j else x for j, x in enumerate(results)]
        assert shares.wrong(shares.errors(data, wanted, changed), dtype) == [name]


def test_random_runs_are_a_routers():
    sizes = shares.group_sizes(shares.SHARES["qwen3-30b-a3b"], "random")
    assert sizes.sum() == 32768
    # Of a multinomial's 128 parts: 256 each, with a deviation of 16.
    assert 10 < sizes.std() < 24


def entry_of(case, times, **fields):
    calls = [
        {"name": name, "operation": operation, "p50": p50, "p90": p50, "seconds": [p50], **more}
        for (name, operation), (p50, more) in times.items()
    ]
    title = KINDS[case.kind].title(case)
    found = {"checks": 4, "wrong": [], "failed": [], "bytes": None, "seconds": 1.0, "device": "GPU"}
    return {"case": dataclasses.asdict(case), "title": title, "calls": calls, **found, **fields}


@pytest.fixture
def entries():
    """What the processes of a run would have found."""
    cases = floor_plan.cases_of(floor_plan.Options())
    deepseek, qwen = cases[:2]
    routed, decoded, _, trained = cases[2:6]
    both, ours = ("forward", "forward+backward"), floor_plan.OURS
    bad = {"operation": both[1], "what": "d_w1 of rank 0", "error": 0.4, "limit": 0.05, "ok": False}
    late = {"name": "torch", "operation": both[0], "error": "ImportError: no torch\nat all"}
    layer = {
        **{("dense+copy", op): (1.0, {"how": "b, of TB/s: XLA 3.20, b 4.28"}) for op in both},
        **{(ours, op): (1.05, {"memory": 800 << 20}) for op in both},
        **{("plain_tokamax", op): (2.1, {}) for op in both},
    }
    read = {("dense+copy+read", op): (1.0, {}) for op in both}
    return [
        entry_of(deepseek, layer, wrong=[{"name": "plain_tokamax", **bad}], failed=[late]),
        entry_of(qwen, {**read, (ours, both[0]): (1.5, {}), ("torch", both[0]): (2.4, {})}),
        entry_of(routed, {("route", both[0]): (1e-4, {"how": "weights 1.00e-07"})}),
        entry_of(decoded, {("read", "T=1"): (1e-4, {}), (ours, "T=1"): (1.5e-4, {})}),
        entry_of(trained, {("native", "step"): (0.04, {})}),
    ]


KERNELS = {
    "dtype": "bf16",
    "wrong": [],
    "failed": [["x down", "ValueError: no"]],
    "runs": [
        {
            "share": "deepseek-v3-ep8",
            "sizes": "random",
            "kernels": {name: {"ms": 1.0, "dense_ms": 0.9} for name in products.UNITS},
            "mlp": {"triton forward": {"of_dense": 0.91}, "triton forward+backward": {"error": "no"}},
        },
        {"share": "d", "sizes": "random", "kernels": {}, "mlp": {"triton forward": {"of_copy": 0.99}}},
    ],
}


@pytest.fixture
def result(entries, monkeypatch, tmp_path):
    """A run whose processes are replaced, by the command."""

    def run_cases(ranks, cases, seconds, options, devices, say, save):
        assert (ranks, devices, options.platform) == (1, GPU, "cuda")
        of_set = {"ranks": 1, "processes": 1, "seconds": 1.0, "errors": [], "not_run": False}
        save({**of_set, "cases": entries[:1]})
        assert len(json.loads(file.read_text())["sets"][0]["cases"]) == 1
        return {**of_set, "cases": entries}

    def run(command, *, env, timeout):
        assert env["JAX_PLATFORMS"] == "cuda"
        if "f32" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        Path(command[-1]).write_text(json.dumps(KERNELS))
        return subprocess.CompletedProcess(command, 1)

    file = tmp_path / "floor.json"
    monkeypatch.setattr(floor, "of_host", lambda platform, one_process: GPU)
    monkeypatch.setattr(host, "run_cases", run_cases)
    # Its own name alone: others start processes too.
    monkeypatch.setattr(
        floor, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    )
    assert main(["bench", "floor", "--platform", "cuda", "--json", str(file)]) == 1
    return json.loads(file.read_text())


def test_rows_have_aims(result):
    assert result["format"] == formats.FLOOR
    rows = {(row.group, row.what): row for row in floor_rows.rows_of(result)}
    share = "deepseek-v3 layer"
    over = rows[share, "forward over dense products and copies"]
    assert (over.value, over.aim) == (pytest.approx(1.05), 1.08)
    assert over.reached is not None
    assert over.reached > 1
    faster = rows[share, "forward+backward, times faster than plain_tokamax (its d_w1 wrong)"]
    assert (faster.value, faster.aim, faster.reached) == (2.0, None, None)
    memory = rows[share, "forward+backward, memory of native+triton beside operands and results"]
    assert (memory.value, memory.unit) == (800, "MiB")
    assert memory.reached == pytest.approx(750 / 800)
    assert rows["qwen3-30b-a3b layer", "forward, times faster than torch"].reached == pytest.approx(1.0)
    assert rows["router, E=256 T=4096 H=7168", "forward"].value == pytest.approx(0.1)
    assert rows["qwen3-30b-a3b decode", "T=1 over reading the used experts"].value == pytest.approx(1.5)
    assert rows["training step", "native"].value == 40
    kernels = "deepseek-v3-ep8 kernels, random runs, bf16"
    assert rows[kernels, "six products, of dense"].value == pytest.approx(0.9)
    assert rows[kernels, "MLP forward, of dense"].value == 0.91


def test_the_report(result, capsys):
    text = floor_report.as_text(result)
    assert "at most 1.08: met" in text
    assert "at least 0.93: not met" in text
    for line in (
        "dense+copy: b, of TB/s: XLA 3.20, b 4.28",
        "route forward: weights 1.00e-07",
        "19 of 20 comparisons with the oracles are right",
        "FAILED: kernels: x down ValueError: no",
        "FAILED: kernels: no time was left for the rest",
    ):
        assert line in text.splitlines()
    assert "inaccurate baseline" in text
    assert "torch forward: ImportError: no torch\n" in text


def test_the_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "floor.json", tmp_path / "floor.png"
    assert main(["plot", str(file), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert floor_picture.read(tmp_path / "none.json") is None


def test_the_plan():
    cases = floor_plan.cases_of(floor_plan.Options())
    assert {case.kind for case in cases} == {"layer", "route", "decode", "train"}
    assert all((case.ranks, case.dtype) == (1, "bf16") for case in cases)
    assert [floor_plan.model_of(case) for case in cases[:2]] == ["deepseek-v3", "qwen3-30b-a3b"]
    assert cases[0].model_experts == 256
    assert floor_plan.model_of(cases[2]) == ""
    only = floor_plan.Options(("kernels",))
    assert floor_plan.cases_of(only) == []
    for kernels in floor_plan.kernels_of(only):
        assert set(kernels.shares) <= set(shares.SHARES)
        assert kernels.sizes in shares.SIZES
        assert kernels.dtype in shares.LIMITS


def test_no_time_and_wrong_options(monkeypatch):
    said = floor._kernels(floor_plan.KERNELS[0], 0.0, None, lambda line: None)
    assert said["not_run"]
    assert floor.failures({"sets": [], "kernels": [said]}) == []
    with pytest.raises(ConfigError, match="parts=\\('all',\\) must be some of"):
        floor_plan.Options(("all",))
    with pytest.raises(ConfigError, match="minutes=0 must be a positive number"):
        floor_plan.Options(minutes=0)
    cpu = dataclasses.replace(GPU, platform="cpu")
    monkeypatch.setattr(floor, "of_host", lambda platform, one_process: cpu)
    with pytest.raises(ConfigError, match="platform='cpu' must be a GPU"):
        floor.run(floor_plan.Options(), "it", print, print)
