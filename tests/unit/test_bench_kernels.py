"""``bench kernels`` on small shares: what it checks, counts, records and draws. Kernels run interpreted."""

import dataclasses
import importlib.util
import json
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep.bench.against import baselines, dense, grouped, hopper, torch_mlp
from jax_moriep.bench.kinds import kernels, kernels_result, products, quantised
from jax_moriep.bench.measure import repeat
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.measure.programs import Work, on_device
from jax_moriep.bench.measure.repeat import repeated
from jax_moriep.bench.problem import shares
from jax_moriep.bench.show import kernels_picture, kernels_report
from jax_moriep.cli import main
from jax_moriep.errors import ConfigError

MANY = shares.Share(3, 64, 32, 192)
FEW = shares.Share(4, 32, 16, 64)
SIZES = np.array([100, 0, 92], np.int32)
NO_TORCH = importlib.util.find_spec("torch") is None


@pytest.fixture(scope="module")
def data():
    return shares.Data.of(MANY, SIZES)


@pytest.fixture(scope="module")
def wanted(data):
    return shares.checked_experts(data)


@pytest.fixture(scope="module")
def right(data):
    """A result and gradients that are right, by a plain loop over experts in f32."""
    rows, factors, _, w1, w2 = (np.asarray(x, np.float32) for x in data.operands)

    def forward(x, factor, up, down):
        gate, up = jnp.split(x @ up.T, 2, axis=1)
        return (jax.nn.silu(gate) * up * factor[:, None]) @ down.T

    results = [np.zeros_like(a) for a in (rows, rows, factors, w1, w2)]
    for expert, (start, size) in enumerate(zip(data.starts, SIZES, strict=True)):
        at = slice(start, start + size)
        out, pull = jax.vjp(forward, rows[at], factors[at], w1[expert], w2[expert])
        by_rows, by_factors, by_w1, by_w2 = pull(jnp.asarray(data.d_out[at], jnp.float32))
        for result, value in zip(results[:3], (out, by_rows, by_factors), strict=True):
            result[at] = value
        results[3][expert], results[4][expert] = by_w1, by_w2
    return tuple(jnp.asarray(x) for x in results)


def test_right_results_have_no_errors(data, wanted, right):
    found = shares.errors(data, wanted, right)
    assert set(found) == {"padding", "non_finite", "out", "d_rows", "d_row_weights", "dw1", "dw2"}
    assert found["padding"] == found["non_finite"] == 0
    assert max(found.values()) < 1e-5
    assert shares.wrong(found) == []
    # The empty expert is not the emptiest of those that have rows.
    assert set(wanted) == {0, 2}


@pytest.mark.parametrize(
    ("result", "at", "value", "what"),
    [
        (0, (0, 3), 1e3, "out"),
        (0, (99, 0), np.nan, "non_finite"),
        (0, (99, 0), np.nan, "out"),
        (0, (100, 5), 1e-6, "padding"),
        (1, (-1, 0), np.nan, "padding"),
        (1, (0, 0), -1e3, "d_rows"),
        (2, (0,), 1e4, "d_row_weights"),
        (3, (1, 2, 3), np.inf, "non_finite"),
        (3, (0, 32, 3), 1e4, "dw1"),
        (4, (2, 5, 31), 1e4, "dw2"),
        (4, (2, 5, 31), np.nan, "dw2"),
    ],
)
def test_wrong_results_are_noticed(data, wanted, right, result, at, value, what):
    changed = list(right)
    changed[result] = changed[result].at[at].set(value)
    assert what in shares.wrong(shares.errors(data, wanted, changed))


def test_a_zero_result_is_wrong(data, wanted, right):
    found = shares.errors(data, wanted, [jnp.zeros_like(x) for x in right])
    assert shares.wrong(found) == ["out", "d_rows", "d_row_weights", "dw1", "dw2"]


def test_compact_results(data, wanted, right):
    real = shares.real_rows(data.sizes, data.spec.block, right[0].shape[0])
    compact = (*(x[real] for x in right[:3]), *right[3:])
    assert shares.wrong(shares.errors(data, wanted, compact, compact=True)) == []
    moved = (jnp.roll(compact[0], 1, axis=0), *compact[1:])
    assert shares.wrong(shares.errors(data, wanted, moved, compact=True)) == ["out"]


def test_every_kind_of_sizes_has_one_capacity():
    for share in shares.SHARES.values():
        for kind in shares.SIZES:
            sizes = shares.group_sizes(share, kind)
            assert sizes.sum() == share.rows
            assert shares.padded_rows(sizes, share.block) < shares.capacity_of(share)


def test_dense_references_have_the_kernels_flops(data):
    act, pre = products.of_rows(data)
    matmuls = dense.dense(data, act, pre)
    assert set(matmuls) == set(products.UNITS)
    for label in [*matmuls, *kernels_result.PASSES]:
        names = kernels_result.kernels_of(label)
        work = dense.chain([matmuls[name] for name in names])
        analysis = jax.jit(work.fn).lower(*work.operands).cost_analysis()
        flops = products.flops(data.share, names)
        assert analysis is not None
        assert analysis["flops"] == pytest.approx(flops, rel=0.02), label
        # Real rows, each times the weights of one expert.
        units = {"gate_up": 2, "forward": 3, "forward+backward": 9}.get(label)
        assert units is None or flops == units * 2 * 192 * 64 * 32


def test_entry(data):
    found = kernels_result.entry(data, "down", [2e-3, 1e-3, 9e-3], [1e-3], 0)
    flops = 2 * 192 * 64 * 32
    assert found["ms"] == 2
    assert found["ms_max"] == 9
    assert found["tflop_per_s"] == pytest.approx(flops / 2e-3 / 1e12)
    assert found["of_dense"] == 0.5
    assert found["of_padded"] == pytest.approx(0.5 * shares.padded_rows(SIZES, MANY.block) / 192)
    few = dataclasses.replace(data, share=FEW, sizes=np.array([64, 0, 0, 0], np.int32))
    found = kernels_result.entry(few, "forward", [1e-3], [2e-3], 5000)
    assert found["copy_tb_per_s"] == pytest.approx(1e4 / 2e-3 / 1e12)
    assert found["weights_tb_per_s"] == pytest.approx(3 * 2 * 32 * 16 / 1e-3 / 1e12)


def test_a_chain_that_leaves_out_work_is_noticed():
    run = {"kernels": {"gate_up": {"dense_ms": 2.0}, "down": {"dense_ms": 1.0}}}
    kernels_result.check_chain(run, "forward", {"dense_ms": 2.9})
    kernels_result.check_chain({"kernels": {}}, "forward", {"dense_ms": 0.1})
    for together in (2.2, 9.9):
        with pytest.raises(RuntimeError, match=f"took {together:.3f} ms together"):
            kernels_result.check_chain(run, "forward", {"dense_ms": together})


@pytest.mark.parametrize("times", [1, 5])
def test_repeated_work_is_done_every_time(times):
    calls = []

    def fn(x, w):
        count = jax.pure_callback(lambda a: calls.append(1) or a, jax.ShapeDtypeStruct((), x.dtype), x[0, 0])
        return x @ w + count, w

    run = jax.jit(repeated(fn, times))
    jax.block_until_ready(run(jnp.ones((4, 4)), jnp.ones((4, 8))))
    assert len(calls) == times


def test_nothing_large_is_changed_where_barriers_hold(monkeypatch):
    large = [jax.ShapeDtypeStruct((1 << 20,), jnp.float32)] * 2
    for hold in (False, True):
        monkeypatch.setattr(repeat, "barriers_hold", lambda hold=hold: hold)
        program = str(jax.make_jaxpr(repeated(lambda x, y: x * y, 3))(*large))
        assert ("scatter" in program) is not hold
    copied, how = dense.copy(1 << 21)
    assert how == "XLA"  # without a GPU nothing else is there
    assert "scatter" in str(jax.make_jaxpr(repeated(copied.fn, 3))(*copied.operands))


def test_programs_are_compiled_once_and_failures_are_kept():
    traced = []

    def double(x):
        traced.append(1)
        return 2 * x

    pool = Pool()
    for _ in range(2):
        pool.start("double", on_device(double, (jnp.ones(3),)))
    pool.start("bad", on_device(lambda x: x @ x, (jnp.ones((2, 3)),)))
    pool.wait()
    np.testing.assert_array_equal(pool.get("double")(jnp.arange(3.0)), [0, 2, 4])
    assert len(traced) == 1
    with pytest.raises(TypeError):
        pool.get("bad")
    pool.close()


@pytest.mark.parametrize(
    "name",
    [
        "ragged_dot",
        pytest.param("torch", marks=pytest.mark.skipif(NO_TORCH, reason="torch is not installed")),
    ],
)
def test_baselines(data, wanted, name):
    pool = Pool()
    ready = baselines.BASELINES[name]("share", data, data.compact(), pool)
    for backward in (False, True):
        results = ready.results(ready.run(backward))
        assert len(results) == (5 if backward else 1)
        assert shares.wrong(shares.errors(data, wanted, results, compact=True)) == []
        ready.repeated(backward, 2)()
    pool.close()


def test_the_derivative_made_of_jaxs_two_kernels(data, wanted):
    """Their places are taken by functions that know their layouts and take their arguments."""
    rows_tiles, dw_tiles = (64, 32, 32, 4, 8), (128, 64, 64, 4, 1)

    def dot(
        x, w, *, group_sizes, transpose_rhs, block_m, block_n, block_k, max_concurrent_steps, grid_block_n
    ):
        w = jnp.swapaxes(w, 1, 2) if transpose_rhs else w
        assert (block_m, block_n, block_k, max_concurrent_steps) == rows_tiles[:4]
        assert w.shape[2] // block_n % grid_block_n == 0
        return jax.lax.ragged_dot(x, w, group_sizes)

    def dot_transposed(d, x, *, group_sizes, block_m, **_):
        assert block_m == dw_tiles[0]
        ends = np.cumsum(SIZES)
        return jnp.stack([d[e - s : e].T @ x[e - s : e] for e, s in zip(ends, SIZES, strict=True)])

    product = hopper.hopper_product(dot, dot_transposed, rows_tiles, dw_tiles)
    compact = data.compact()
    fn = jax.jit(grouped.with_gradients(grouped.mlp(product), True))
    results = fn(compact.d_out, compact.rows, compact.factors, *data.operands[2:])
    assert shares.wrong(shares.errors(data, wanted, results, compact=True)) == []


@pytest.fixture(scope="module")
def result():
    """A whole run on small shares, with baselines of which one works, one fails and one cannot run."""

    def failing(name, data, compact, pool):
        ready = baselines.ragged_dot(name, data, compact, pool)

        def run(backward):
            if backward:
                raise RuntimeError("out of luck")
            return tuple(2 * x for x in ready.run(backward))

        return dataclasses.replace(ready, run=run)

    saved = []
    names = ("failing", "ragged_dot", "jax_hopper")
    steps = (
        kernels.Step(names, "few", "zipf"),
        kernels.Step(names[1:], "many", "zipf", ("forward",)),
        kernels.Step(names, "many", "zipf"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "SHARES", {"many": MANY, "few": FEW})
        patch.setattr(kernels, "STEPS", steps)
        patch.setitem(baselines.BASELINES, "failing", failing)
        # This is no Hopper GPU.
        bench = kernels.Bench(
            1, lambda line: None, lambda r: saved.append(json.dumps(r)), seconds=0, copy_bytes=1 << 12
        )
        bench.measure(["many", "few"], ["zipf"], names)
    assert json.loads(saved[-1]) == json.loads(json.dumps(bench.result))
    assert len(json.loads(saved[0])["runs"]) == 1
    return json.loads(saved[-1])


def test_a_run_measures_and_checks_everything(result):
    assert [(run["share"], run["sizes"]) for run in result["runs"]] == [
        ("many", "zipf"),
        ("few", "zipf"),
    ]
    for run in result["runs"]:
        passes = ["forward", "forward+backward"][: 2 if run["share"] == "many" else 1]
        assert list(run["mlp"]) == [f"triton {label}" for label in passes]
        assert list(run["kernels"]) == list(products.UNITS)[: 6 if run["share"] == "many" else 2]
        for entry in (*run["kernels"].values(), *run["mlp"].values()):
            assert entry["of_dense" if run["share"] == "many" else "of_copy"] > 0
        for label in passes:
            assert shares.wrong(run["errors"][f"triton {label}"]) == []
    good = result["runs"][0]["baselines"]["ragged_dot"]
    assert good["forward"]["own_times_faster"] > 0
    assert good["forward+backward"]["own_times_faster"] > 0
    assert good["forward"]["inaccurate"] == []


def test_baselines_that_are_wrong_fail_or_cannot_run_are_recorded(result):
    of_run = result["runs"][0]["baselines"]
    assert of_run["failing"]["forward+backward"]["error"] == "RuntimeError: out of luck"
    assert ["many zipf failing forward+backward", "RuntimeError: out of luck"] in result["failed"]
    assert len(result["failed"]) == 1
    inaccurate = {(title, label, what) for title, label, what, _ in result["inaccurate"]}
    assert inaccurate == {("many zipf", "failing forward", "out"), ("few zipf", "failing forward", "out")}
    assert of_run["failing"]["forward"]["inaccurate"] == ["out"]
    # A baseline's values are not the package's.
    assert result["wrong"] == []
    assert "Hopper" in of_run["jax_hopper"]["unavailable"]
    assert set(result["unavailable"]) == {"jax_hopper"}


def test_the_steps_name_what_there_is():
    for step in kernels.STEPS:
        assert set(step.names) <= set(baselines.BASELINES)
        assert step.share in shares.SHARES
        assert step.kind in shares.SIZES
    slow = [step.share for step in kernels.STEPS if "ragged_dot" in step.names and len(step.passes) == 2]
    assert slow == ["deepseek-v3-ep8"]
    # No limit of time may cost the fast ones.
    first = next(i for i, step in enumerate(kernels.STEPS) if "ragged_dot" in step.names)
    assert all(step.names == ("torch", "jax_hopper") for step in kernels.STEPS[:first])


def test_a_kernel_that_fails_is_recorded_and_late_baselines_do_not_begin(monkeypatch):
    monkeypatch.setattr(kernels, "SHARES", {"few": FEW})

    def broken(data, backward):
        del data, backward
        return Work(lambda x: x @ x, (jnp.ones((2, 3)),))

    monkeypatch.setattr(products, "mlp", broken)
    monkeypatch.setattr(kernels, "STEPS", (kernels.Step(("ragged_dot",), "few", "uniform"),))
    bench = kernels.Bench(1, lambda line: None, lambda r: None, seconds=0, copy_bytes=1 << 12, minutes=0)
    bench.measure(["few"], ["uniform"], ["ragged_dot"])
    assert bench.result["not_run"] == [["few uniform ragged_dot", "no time was left"]]
    (run,) = bench.result["runs"]
    assert "TypeError" in run["mlp"]["triton forward"]["error"]
    assert [title for title, _ in bench.result["failed"]] == ["few uniform triton forward"]
    assert run["kernels"]["down"]["of_copy"] > 0


def test_picture(result, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = kernels_picture.of_reference(result)
    assert set(found["many\nzipf"]) == {*products.UNITS, "forward", "forward+backward"}
    assert found["few\nzipf"]["down"] == result["runs"][1]["kernels"]["down"]["of_copy"]
    against = kernels_picture.times_faster(result)
    assert set(against["many\nzipf"]) == {
        "failing inaccurate forward",
        "ragged_dot forward",
        "ragged_dot forward+backward",
    }
    file, out = tmp_path / "kernels.json", tmp_path / "kernels.png"
    file.write_text(json.dumps({"command": "it", **result}))
    assert main(["plot", str(file), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert main(["plot", str(file), str(other), "--out", str(out)]) == 1
    assert "be all of `bench kernels`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"names": ["mine"]}, "shares=\\['mine'\\] must be some of"),
        ({"kinds": ["odd"]}, "sizes="),
        ({"baselines": ["cublas"]}, "baselines=\\['cublas'\\] must be some of \\('torch', 'ragged_dot'"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({}, "platform='cpu' must be a GPU"),
    ],
)
def test_arguments(changed, text):
    given = {
        "names": ["mixtral-8x7b"],
        "kinds": ["zipf"],
        "rounds": 1,
        "baselines": [],
    }
    with pytest.raises(ConfigError, match=text):
        kernels.run(kernels.Asked(**(given | changed)), print, print)


def test_the_end_is_told():
    result = {
        "unavailable": {"tokamax": "it is not installed"},
        "inaccurate": [["few uniform", "torch forward", "fullest", 0.5]],
        "not_run": [["few zipf torch", "no time was left"]],
        "wrong": [],
        "failed": [["few uniform", "ValueError: no"]],
    }
    assert kernels_report.as_text(result).splitlines() == [
        "tokamax did not run: it is not installed",
        "inaccurate baselines: few uniform, torch forward, fullest, 0.5",
        "not run: few zipf torch, no time was left",
        "wrong: nothing",
        "failed: [['few uniform', 'ValueError: no']]",
    ]
    # Of quantised experts there are no such baselines.
    assert kernels_report.as_text({"wrong": [1], "failed": []}) == "wrong: [1]\nfailed: nothing"


@pytest.mark.parametrize(("wrong", "code"), [([], 0), ([["few", "forward", "fullest", 1.0]], 1)])
@pytest.mark.parametrize("scheme", [None, "fp8_block"])
def test_the_command_writes_what_was_measured(scheme, wrong, code, tmp_path, monkeypatch, capsys):
    asked_of = []

    def run(asked, say, save):
        asked_of.append(asked)
        result = {"wrong": wrong, "failed": []}
        save(result)
        return result

    monkeypatch.setattr(kernels if scheme is None else quantised, "run", run)
    out = tmp_path / "x.json"
    more = [] if scheme is None else ["--quant", scheme]
    argv = ["bench", "kernels", "--shares", "mixtral-8x7b", "--baselines", "none", "--json", str(out), *more]
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    assert main(argv) == code
    (asked,) = asked_of
    assert asked.names == ["mixtral-8x7b"]
    if scheme is None:
        assert (asked.baselines, asked.kinds) == ([], list(shares.SIZES))
    else:
        assert asked.scheme == scheme
    written = json.loads(out.read_text())
    assert written["command"] == shlex.join(["jax-moriep", *argv])
    assert written["wrong"] == wrong
    assert capsys.readouterr().out.splitlines()[-2:] == [f"wrong: {wrong or 'nothing'}", "failed: nothing"]


@pytest.mark.skipif(NO_TORCH, reason="torch is not installed")
def test_release_needs_no_gpu():
    torch_mlp.release()


@pytest.mark.parametrize(
    ("scheme", "share"),
    [("fp8_block", shares.Share(2, 256, 128, 128)), ("int8_token", shares.Share(4, 128, 128, 32))],
)
def test_quantised_experts(scheme, share, monkeypatch):
    """Every number of a scheme is there, beside bf16's, and what the experts give is right."""
    monkeypatch.setitem(shares.SHARES, "small", share)
    monkeypatch.setattr(quantised, "_COPY_BYTES", 1 << 12)
    monkeypatch.setattr(quantised, "DECODE_TOKENS", (4,))
    lines = []
    saved = []
    asked = quantised.Asked(scheme, ["small"], 1, seconds=0.0)
    result = quantised.run(asked, lines.append, saved.append)
    assert saved == [result]
    assert not result["failed"]
    assert not result["wrong"]
    entries = result["runs"][0]["entries"]
    assert {"bf16 forward", f"{scheme} forward"} <= set(entries)
    assert ("copy" in entries) == share.decode
    assert (f"{scheme} forward_backward" in entries) != share.decode
    assert any(f"{scheme} forward" in line for line in lines)
