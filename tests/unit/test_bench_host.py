"""``bench host`` without processes: its plan, data by formula, repeats, report and verdict."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_bench
from jax.sharding import PartitionSpec as P

from jax_moriep import cli, exchange
from jax_moriep.bench.kinds import train
from jax_moriep.bench.kinds.exchange import routes_of
from jax_moriep.bench.kinds.table import KINDS, new_case, title_of, transports_of
from jax_moriep.bench.measure import pool, programs, repeat
from jax_moriep.bench.measure.turns import Call, interleave
from jax_moriep.bench.problem import formats, formula, layer_oracle, oracle
from jax_moriep.bench.problem.world import AXIS, Barrier, World
from jax_moriep.bench.run import devices, host, host_plan, runner, worker
from jax_moriep.bench.run.environment import environment
from jax_moriep.bench.show import host_picture, host_report, report
from jax_moriep.errors import ConfigError
from jax_moriep.transports import collective

SMALL: dict[str, Any] = {**test_bench.SMALL, "processes": 1, "dtype": "bf16"}
NO_MORI = {"native": None, "mori": "it needs AMD's GPUs; use native", "collective": None, "reference": None}
GPUS = devices.Devices("gpu", "NVIDIA H100 80GB HBM3", 4, NO_MORI)
AMD = devices.Devices("gpu", "AMD Instinct MI300X", 8, dict.fromkeys(NO_MORI))


def world_of(ranks, tmp_path):
    Barrier.create(tmp_path / "barrier", 1)
    return World(ranks, tmp_path / "barrier")


def calls_of(case, world):
    kind = KINDS[case.kind]
    return kind.calls(case, world, kind.make_data(case, world))


def test_formula_is_the_same_on_host_and_device_and_exact_in_every_dtype():
    rows, columns = np.arange(50), 33
    on_host = formula.matrix(formula.W1, rows, columns, -9)
    row, column = jnp.arange(50, dtype=jnp.uint32)[:, None], jnp.arange(33, dtype=jnp.uint32)[None]
    np.testing.assert_array_equal(
        jax.jit(lambda a, b: formula.values(formula.W1, a, b, -9))(row, column), on_host
    )
    for dtype in (jnp.bfloat16, jnp.float16):
        np.testing.assert_array_equal(on_host.astype(dtype).astype(np.float32), on_host)
    assert np.abs(on_host).max() <= 2.0**-2
    assert len(np.unique(on_host)) > 200
    assert abs(on_host.mean()) < 0.05 * on_host.std()
    assert not np.array_equal(on_host, formula.matrix(formula.W2, rows, columns, -9))


def test_layer_oracle_is_an_mlp_for_each_expert():
    case = new_case("layer", ranks=1, **SMALL)
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(6), (12, 1)), axis=1)[:, :2].astype(np.int32)
    problem = layer_oracle.Problem(case, ids)

    def weights(expert):
        turned = [(problem.w1, formula.W1), (problem.w2, formula.W2)]
        return [np.roll(w, expert * formula.STEPS[what], axis=0) for w, what in turned]

    tokens = np.arange(12)
    x, d_y = problem.x(tokens), problem.d_y(tokens)
    y, d_x = problem.of_tokens(tokens)
    for token in (0, 7):
        shares = np.exp(x[token, ids[token]])
        shares /= shares.sum()
        outs = [oracle.mlp(x[[token]], *weights(e), d_y[[token]]) for e in ids[token]]
        np.testing.assert_allclose(
            y[token], np.sum([s * o.y[0] for s, o in zip(shares, outs, strict=True)], axis=0)
        )
        want = np.sum([s * o.d_x[0] for s, o in zip(shares, outs, strict=True)], axis=0)
        d_shares = np.array([d_y[token] @ o.y[0] for o in outs])
        want[ids[token]] += shares * (d_shares - shares @ d_shares)
        np.testing.assert_allclose(d_x[token], want, atol=1e-12)
    token, k = np.nonzero(ids == 4)
    want = oracle.mlp(x[token], *weights(4), problem.weights[k, None] * d_y[token])
    columns1, columns2 = np.array([0, 9]), np.array([3])
    d_w1, d_w2 = problem.weight_gradients(4, columns1, columns2)
    np.testing.assert_allclose(d_w1, want.d_w1[:, columns1], atol=1e-12)
    np.testing.assert_allclose(d_w2, want.d_w2[:, columns2], atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "ranks", "compare", "floors"),
    [
        ("exchange", 2, ("native", "native-fp8", "collective-fp8"), ("nccl",)),
        ("exchange", 1, ("native",), ("copy",)),
        ("link", 2, (), ()),
        ("layer", 2, ("native+blocked",), ()),
        ("layer", 1, ("native+blocked", "plain"), ("dense+copy",)),
        ("train", 2, ("native",), ()),
    ],
)
def test_repeated_work_is_right(kind, ranks, compare, floors, tmp_path):
    # The way back includes the way there.
    operations = ("forward+backward",) if kind == "layer" else ()
    # A model this narrow learns nothing in three steps.
    sizes = {**SMALL, "hidden": 128, "layers": 2} if kind == "train" else SMALL
    case = new_case(
        kind, ranks=ranks, compare=compare, floors=floors, operations=operations, repeats=3, **sizes
    )
    calls = calls_of(case, world_of(ranks, tmp_path))
    assert pool.prepare([call.programs for call in calls]) == [None] * len(calls)
    _, checks = interleave(calls, 1, 1, lambda: None)
    assert [check for check in checks if not check.ok] == []
    assert {call.repeats for call in calls} == {3}
    assert {check.name for check in checks} == set(case.compare)
    assert {call.name for call in calls} == {*case.compare, *floors}


def test_losses_are_compared_with_those_of_the_first_transport():
    start = math.log(256)
    losses = {}
    checks = [
        train._check(name, losses, jnp.array([start, start - 0.1, last]))
        for name, last in {"native": start - 0.2, "collective": start - 0.25, "reference": start}.items()
    ]
    assert [[check.ok for check in of_name] for of_name in checks] == [
        [True, True, True],
        [True, False, True],
        [True, False, False],
    ]
    assert not train._check("native", {}, jnp.array([1.0, 1.0]))[0].ok


@pytest.mark.parametrize(("times", "hold"), [(1, False), (4, False), (4, True)])
def test_repeated_over_runs_as_often_as_it_says(times, hold, tmp_path, monkeypatch):
    monkeypatch.setattr(repeat, "barriers_hold", lambda: hold)
    world, seen = world_of(2, tmp_path), []

    def work(x):
        jax.debug.callback(lambda: seen.append(1))
        return x * 2, jnp.ones((3, 2), x.dtype)

    run = repeat.repeated_over(work, times, world.mesh, AXIS, (P(AXIS), P()))
    x = world.place(np.ones((4, 2), np.float32), P(AXIS))
    assert programs.over(run, world.mesh, (x,), (P(AXIS),), P(AXIS))(x).shape == (2,)
    jax.effects_barrier()
    assert len(seen) == times


def test_wrong_rows_and_nan_are_noticed_where_work_is_repeated(tmp_path, monkeypatch):
    right = collective.dispatch
    case = new_case(
        "exchange", ranks=2, compare=("collective",), operations=("dispatch",), repeats=2, **SMALL
    )
    world = world_of(2, tmp_path)
    for spoil in (lambda rows: rows.at[0].set(rows[1]), lambda rows: rows.at[2, 3].set(jnp.nan)):

        def wrong(*args, spoil=spoil, **kwargs):
            rows, *others = right(*args, **kwargs)
            return spoil(rows), *others

        monkeypatch.setattr(collective, "dispatch", wrong)
        _, checks = interleave(calls_of(case, world), 1, 1, lambda: None)
        bad = [check for check in checks if not check.ok]
        assert {check.what for check in bad} == {"rows of rank 0", "rows of rank 1"}


def test_a_float8_wire_changes_rows_and_is_told_from_a_wrong_row(tmp_path, monkeypatch):
    case = new_case(
        "exchange", ranks=2, compare=("collective-fp8",), operations=("dispatch",), **{**SMALL, "hidden": 256}
    )
    world = world_of(2, tmp_path)
    _, checks = interleave(calls_of(case, world), 1, 1, lambda: None)
    errors = {check.what: check.error for check in checks}
    assert 0 < errors["rows of rank 0"] <= 2.0**-4
    right = exchange.quant.unpack
    monkeypatch.setattr(exchange.quant, "unpack", lambda *args: jnp.roll(right(*args), 1, axis=0))
    _, checks = interleave(calls_of(case, world), 1, 1, lambda: None)
    assert {check.what for check in checks if not check.ok} == {"rows of rank 0", "rows of rank 1"}


def test_what_does_not_compile_or_run_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    case = new_case(
        "layer", ranks=1, compare=("native+triton", "native+blocked"), operations=("forward",), **SMALL
    )
    seen = worker._leniently(case, world_of(1, tmp_path), None)
    assert [(f["name"], f["operation"]) for f in seen["failed"]] == [("native+triton", "forward")]
    assert "it needs a GPU" in seen["failed"][0]["error"]
    assert [call["name"] for call in seen["calls"]] == ["native+blocked"]
    assert seen["checks"]
    assert all(check["ok"] for check in seen["checks"])

    def broken():
        raise RuntimeError("out of memory")

    failed = []
    world = world_of(1, tmp_path)
    good = worker._tried([Call("a", "op", broken), Call("b", "op", lambda: 1)], world, failed)
    assert [call.name for call in good] == ["b"]
    assert failed == [{"name": "a", "operation": "op", "error": "RuntimeError: out of memory"}]
    late = worker._leniently(case, world_of(1, tmp_path), 0.0)
    assert late["failed"][0]["not_run"]


def test_the_plan_for_gpus():
    options = host_plan.Options()
    assert host_plan.ranks_of(options, GPUS) == [4, 1, 2]
    assert host_plan.ranks_of(options, dataclasses.replace(GPUS, count=6)) == [6, 1, 2, 4]
    four = host_plan.cases_of(4, options, GPUS)
    assert [case.kind for case in four] == ["link", *["exchange"] * 6, "layer", "train"]
    assert four[0].tokens * four[0].row_bytes == pytest.approx(256 << 20, rel=1e-3)
    assert {(case.tokens, case.routing) for case in four[1:7]} == {
        (tokens, routing) for tokens in (128, 1024, 4096) for routing in ("uniform", "zipf")
    }
    assert all((case.processes, case.repeats, case.experts) == (4, 20, 256) for case in four[1:7])
    layer = four[7]
    assert (layer.experts, layer.tokens, layer.compare) == (128, 4096, ("native+triton",))
    assert (four[8].hidden, four[8].layers, four[8].experts, four[8].dtype) == (1024, 8, 16, "bf16")
    alone = host_plan.cases_of(1, dataclasses.replace(options, one_process=True), GPUS)
    assert [case.kind for case in alone] == ["layer", "train"]
    assert alone[0].compare == ("native+triton",)
    assert alone[0].floors == ("dense+copy",)
    two = host_plan.cases_of(2, options, GPUS)
    assert [case.kind for case in two] == ["layer", "train", "link", *["exchange"] * 6]
    # A combine pushes up to min(K, R) rows for each token, into one of an arena's two halves.
    megabytes = int(environment(four)["JAX_MORIEP_ARENA_MB"])
    assert megabytes << 20 > 2 * 4096 * 4 * 7168 * 2
    # What is put takes a part for each peer, which can be more than K.
    of_put = new_case(
        "exchange", ranks=8, processes=8, tokens=4096, hidden=7168, top_k=2, compare=("native-put",)
    )
    assert int(environment([of_put])["JAX_MORIEP_ARENA_MB"]) << 20 > 2 * 4096 * 7 * 7168 * 4
    assert host.path_of(Path("x"), GPUS, 4, "json").name == "host-nvidia-h100-80gb-hbm3-x4.json"


def test_mori_is_measured_where_it_can_run():
    exchange_of = {
        c.tokens: c for c in host_plan.cases_of(8, host_plan.Options(), AMD) if c.kind == "exchange"
    }
    natives = ("native", "native-fp8", "native-put", "native-put-fp8")
    assert exchange_of[128].compare == (*natives, "mori", "mori-fp8", "collective")
    layer, step = host_plan.cases_of(8, host_plan.Options(), AMD)[-2:]
    assert (layer.compare, step.compare) == (
        ("native+triton", "mori+triton"),
        ("native", "mori", "collective"),
    )
    assert transports_of(layer) == transports_of(exchange_of[128])[:2] == ("native", "mori")
    named = host_plan.Options(transports=("mori",))
    # () is the link's.
    assert {transports_of(c) for c in host_plan.cases_of(8, named, AMD)} == {("mori",), ()}
    # On CPUs, as where others than ours are named, nothing is left without a transport.
    only = host_plan.Options(transports=("collective",), tokens=(128,))
    assert host_plan.cases_of(4, only, GPUS)[1].compare == ("collective", "collective-fp8")


def test_moris_heap_holds_all_cases():
    cases = host_plan.cases_of(2, host_plan.Options(), AMD)
    heap = int(environment(cases)["JAX_MORIEP_MORI_HEAP_MB"]) << 20
    # 2R + 1 buffers of tokens in each handle: for three numbers of tokens the exchange's plain and fp8 rows,
    # for one the layer's and the training step's, all of them in bf16.
    rows = 2 * sum((128, 128, 1024, 1024, 4096, 4096, 4096)) * 7168 + 2 * 8192 * 1024
    assert 5 * rows < heap < 1.2 * 5 * rows
    assert "JAX_MORIEP_MORI_HEAP_MB" not in environment(host_plan.cases_of(2, host_plan.Options(), GPUS))


def test_a_named_transport_is_refused_with_the_reason(monkeypatch, capsys):
    assert cli.main(["bench", "host", "--platform", "cpu", "--transports", "native,mori"]) == 1
    assert "transport='mori' cannot run here: it needs AMD's GPUs; use" in capsys.readouterr().err
    monkeypatch.setattr(host_plan, "of_host", lambda platform, one_process: AMD)
    assert host_plan.devices_of(host_plan.Options(transports=("mori",))) is AMD


@pytest.mark.parametrize(
    ("kind", "name"), [("exchange", "mori-fp8"), ("layer", "mori+blocked"), ("train", "mori")]
)
def test_a_worker_ends_with_the_reason_and_nothing_else(kind, name, tmp_path):
    case = new_case(kind, ranks=2, compare=("native+blocked" if kind == "layer" else "native", name), **SMALL)
    with pytest.raises(SystemExit, match=r"^transport='mori' cannot run here: it needs AMD's GPUs; use "):
        worker._refuse([case], world_of(2, tmp_path))
    others = dataclasses.replace(case, compare=case.compare[:1])
    puts = dataclasses.replace(others, kind="exchange", compare=("native", "native-put-fp8"))
    with pytest.raises(SystemExit, match="^native-put-fp8 cannot run here: native puts between GPUs only"):
        worker._refuse([puts], world_of(2, tmp_path))
    worker._refuse([others, new_case("experts", ranks=2, **SMALL)], world_of(2, tmp_path))


def test_what_the_host_has_is_asked_in_another_process():
    found = devices.of_host("cpu", one_process=True)
    assert (found.platform, found.kind, found.gpus) == ("cpu", "cpu", False)
    assert found.reasons["native"] is None
    assert "AMD" in found.reasons["mori"]
    assert set(found.reasons) == set(devices.cpus(2).reasons)


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one-hot"])
def test_fitted_capacity_drops_nothing(routing):
    case = host_plan._fitted(new_case("exchange", ranks=4, routing=routing, **{**SMALL, "experts": 10}))
    ids, _ = routes_of(case)
    assert (oracle.place_routes(ids, case.shape).row_of_route != oracle.DROPPED).all()


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--tokens", "0,4"], "tokens=(0, 4) must be positive numbers"),
        (["--kinds", "exchange,tea"], "must be some of"),
        (
            ["--routings", "uniform,none"],
            "must be some of ('uniform', 'zipf', 'one-hot')",
        ),
        (
            ["--transports", "native,carrier-pigeon"],
            "must be some of ('native', 'mori', 'two_level', 'collective'",
        ),
        (["--out", "/no/such/folder"], "must be an existing folder"),
    ],
)
def test_bad_options_are_refused(argv, text, capsys):
    assert cli.main(["bench", "host", "--platform", "cpu", *argv]) == 1
    assert text in capsys.readouterr().err


def test_experts_are_not_repeated():
    with pytest.raises(ConfigError, match=r"repeats=2 must be 1 for experts"):
        new_case("experts", ranks=2, repeats=2, **SMALL)


def test_a_job_survives_its_folder(tmp_path):
    job = worker.Job([new_case("link", ranks=1, **SMALL)], lenient=True, until=3.5, case_seconds=7.0)
    job.write(tmp_path)
    assert worker.Job.read(tmp_path) == job
    assert worker.begun(tmp_path) == 0


def test_new_processes_go_on_behind_the_case_that_ended_the_others(tmp_path, monkeypatch):
    cases = [new_case("link", ranks=1, **{**SMALL, "tokens": tokens}) for tokens in (1, 2, 3, 4)]
    call = {"name": "ppermute", "operation": "ppermute", "repeats": 1, "spans": [[0.0, 1.0]]}
    seen = [{"calls": [call], "checks": [], "failed": [], "seconds": 1.0, "device": "x"}]
    ends = iter([([seen, None, None, None], 2, "it died"), ([seen, None], 2, "it hung")])
    jobs, saved = [], []

    def run_set(job, timeout, platform, env, on_progress):
        jobs.append([case.tokens for case in job.cases])
        assert timeout > 0
        found, begun, error = next(ends)
        on_progress("a line", found)
        return found, begun, error

    monkeypatch.setattr(runner, "run_set", run_set)
    options = host_plan.Options(platform="cpu")
    devices = host_plan.devices_of(options)
    of_set = host.run_cases(1, cases, 100.0, options, devices, lambda line: None, saved.append)
    assert jobs == [[1, 2, 3, 4], [3, 4]]
    assert of_set["errors"] == ["it died", "it hung"]
    assert [bool(entry["calls"]) for entry in of_set["cases"]] == [True, False, True, False]
    assert [len(of_save["cases"]) for of_save in saved] == [1, 3]
    ends = iter([([seen, None, None, None], 2, "it died")])
    # There is no time for more.
    of_set = host.run_cases(1, cases, 10.0, options, devices, lambda line: None, saved.append)
    assert [bool(entry["calls"]) for entry in of_set["cases"]] == [True, False, False, False]


def test_processes_that_disagree_give_no_numbers():
    case = new_case("link", ranks=2, **SMALL)
    call = {"name": "ppermute", "operation": "ppermute", "repeats": 1, "spans": [[0.0, 1.0]]}
    one = {"calls": [call], "checks": [], "failed": [], "seconds": 1.0, "device": "x"}
    lost = {"name": "everything", "operation": "", "error": "it fell over"}
    entry = host._entry(case, [one, {**one, "calls": [], "failed": [lost]}])
    assert entry["calls"] == []
    assert entry["failed"] == [lost]
    assert host._entry(case, [one, one])["calls"][0]["p50"] == 1.0
    assert host._entry(case, None)["failed"]


def test_alone_means_one_rank():
    with pytest.raises(ConfigError, match=r"ranks=2 must be 1 for plain"):
        new_case("layer", ranks=2, compare=("plain",), **SMALL)


def made_up(*, errors=(), wrong=(), failed=(), on=GPUS):
    """A result of two sets: all ranks take 2 ms where one takes 1 ms."""
    options = host_plan.Options(tokens=(128,))
    sets = []
    for ranks in (on.count, 1):
        entries = []
        for case in host_plan.cases_of(ranks, options, on):
            kind = KINDS[case.kind]
            calls = [
                {"name": name, "operation": operation, "p50": seconds, "p90": seconds, "seconds": [seconds]}
                for operation in case.operations or kind.operations
                for name, seconds in {
                    **dict.fromkeys(case.compare, 2e-3 if ranks > 1 else 1e-3),
                    **dict.fromkeys(case.floors, 5e-4),
                }.items()
            ]
            moved = {"received": [4_000_000] * ranks, "remote": [3_000_000] * ranks}
            entries.append(
                {"case": dataclasses.asdict(case), "title": title_of(case), "bytes": moved, "calls": calls}
                | {"checks": 8, "wrong": list(wrong), "failed": list(failed)}
            )
        sets.append(
            {"ranks": ranks, "seconds": 1.0, "errors": list(errors), "not_run": False, "cases": entries}
        )
    machine = {"device": on.kind, "devices": on.count, "cores": 2}
    result = {
        "options": dataclasses.asdict(options),
        "format": formats.HOST,
        "versions": {"jax": "0", "jax_moriep": "0"},
        "machine": machine,
        "sets": sets,
    }
    return json.loads(json.dumps(result))


def test_rows_have_rates_and_efficiency(tmp_path):
    result = made_up()
    rows = host_report.exchange_rows(result)
    native = next(row for row in rows if (row["name"], row["operation"]) == ("native", "dispatch"))
    assert native["gb_per_s"] == pytest.approx(2.0)
    assert native["wire_gb_per_s"] == pytest.approx(1.5)
    assert native["of_nccl"] == pytest.approx(0.25)
    assert native["of_link"] == pytest.approx(1.5e9 / ((256 << 20) / 2e-3), rel=1e-3)
    fp8 = next(row for row in rows if row["name"] == "native-fp8")
    assert fp8["wire_gb_per_s"] == pytest.approx(1.5 * 56 * 132 / (7168 * 2))
    layer = {
        (row["name"], row["operation"], row["ranks"]): row
        for row in host_report.scaling_rows(result, "layer")
    }
    assert layer["native+triton", "forward", 4]["efficiency"] == pytest.approx(0.5)
    assert layer["native+triton", "forward+backward", 1]["of_floor"] == pytest.approx(0.5)
    text = host_report.as_text(result)
    assert "R=4 T=128 uniform dispatch" in text
    assert host.failures(result) == []
    assert host_picture.draw(result, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 20_000


def test_what_mori_has_published_stands_beside_the_same_exchange_only():
    text = host_report.as_text(made_up(on=AMD))
    published = [line.split() for line in text.splitlines() if "not measured here" in line]
    assert [line[:6] for line in published] == [
        ["R=8", "T=128", "uniform", "dispatch", "35.0", "134.0"],
        ["R=8", "T=128", "uniform", "combine", "47.0", "204.0"],
    ]
    assert "  mori, fp8 (published by MORI, not measured here)" in text
    assert "not measured here" not in host_report.as_text(made_up())
    four = dataclasses.replace(AMD, count=4)
    assert "not measured here" not in host_report.as_text(made_up(on=four))


def test_failures_count_but_baselines_do_not():
    check = {"name": "native", "operation": "dispatch", "what": "rows of rank 0", "error": 1.0, "limit": 0.0}
    assert any("WRONG" in line for line in host.failures(made_up(wrong=[check])))
    assert any("died" in line for line in host.failures(made_up(errors=["it died"])))
    plain = made_up(wrong=[{**check, "name": "plain_hopper"}])
    assert host.failures(plain) == []
    assert "inaccurate baseline: " in host_report.as_text(plain)
    own = {"name": "native+triton", "operation": "forward", "error": "no"}
    assert any("FAILED" in line for line in host.failures(made_up(failed=[own])))
    other = made_up(failed=[{**own, "name": "plain"}, {**own, "name": "everything", "not_run": True}])
    assert host.failures(other) == []
    assert "not measured" in host_report.as_text(other)


def test_report_of_an_exchange_beside_a_collective():
    case = new_case(
        "exchange", ranks=2, compare=("native", "native-fp8"), floors=("nccl",), **{**SMALL, "hidden": 128}
    )
    entry = {
        "case": json.loads(case.to_json()),
        "bytes": {"received": [4_000_000] * 2, "remote": [3_000_000] * 2},
        "link": {"p50": 1e-3, "bytes": 6_000_000},
        "calls": [
            {"name": name, "operation": op, "p50": 1e-3, "p90": 1e-3}
            for op in ("dispatch", "combine")
            for name in ("nccl", "native", "native-fp8")
            if (name, op) != ("native-fp8", "combine")
        ],
    }
    lines = report._table(entry, "dispatch")
    assert lines[0].endswith("of the link")
    assert lines[1].split() == ["native", "1.00", "1.00", "1.00", "4", "100%", "3", "50%"]
    assert lines[2].split()[-1] == f"{132 / 256 / 2:.0%}"
    assert [line.split()[0] for line in report._table(entry, "combine")] == ["combine", "native", "nccl"]
