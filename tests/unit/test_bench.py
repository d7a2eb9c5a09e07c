"""The bench without processes: its accounting, its statistics, its oracles, and every kind on 4 devices."""

import argparse
import dataclasses
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemes_oracle

from jax_moriep import cli, exchange
from jax_moriep.bench.kinds import decode
from jax_moriep.bench.kinds.table import KINDS, new_case
from jax_moriep.bench.measure import memory
from jax_moriep.bench.measure.seconds import percentile, slowest
from jax_moriep.bench.measure.turns import Call, interleave
from jax_moriep.bench.problem import decode_oracle, formats, formula, oracle, patterns, traffic
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.world import Barrier, World
from jax_moriep.bench.show import picture, report
from jax_moriep.cli import bench_cases
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, MoriepError
from jax_moriep.plan import ExchangeShape
from jax_moriep.transports import collective

SMALL: dict[str, Any] = {
    "tokens": 12,
    "hidden": 16,
    "intermediate": 8,
    "experts": 6,
    "top_k": 2,
    "iters": 1,
    "warmup": 1,
}


@pytest.mark.parametrize("name", patterns.PATTERNS)
def test_patterns_give_distinct_experts(name):
    ids = patterns.PATTERNS[name](np.random.default_rng(3), 500, 10, 4)
    again = patterns.PATTERNS[name](np.random.default_rng(3), 500, 10, 4)
    assert ids.shape == (500, 4)
    assert ids.dtype == np.int32
    assert ids.min() >= 0
    assert ids.max() < 10
    assert all(len(set(row)) == 4 for row in ids.tolist())
    np.testing.assert_array_equal(ids, again)


def test_patterns_load_experts_as_they_say():
    counts = {
        name: np.bincount(pattern(np.random.default_rng(0), 6000, 8, 1).ravel(), minlength=8)
        for name, pattern in patterns.PATTERNS.items()
    }
    np.testing.assert_allclose(counts["uniform"], 750, rtol=0.15)
    harmonic = 1 / np.arange(1, 9)
    np.testing.assert_allclose(np.sort(counts["zipf"])[::-1], 6000 * harmonic / harmonic.sum(), rtol=0.15)
    assert counts["one-hot"].tolist() == [6000, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", patterns.PATTERNS)
def test_traffic_counts_distinct_pairs(name):
    num_ranks, num_tokens, num_experts, row_bytes = 4, 30, 10, 24
    per_rank = 3  # the last rank holds one expert
    ids = patterns.PATTERNS[name](np.random.default_rng(1), num_ranks * num_tokens, num_experts, 3)
    moved = traffic.of_routes(ids, num_ranks, per_rank, row_bytes)
    for rank in range(num_ranks):
        received = remote = 0
        for token in range(num_ranks * num_tokens):
            destinations = {expert // per_rank for expert in ids[token].tolist()}
            if rank in destinations:
                received += row_bytes
                if token // num_tokens != rank:
                    remote += row_bytes
        assert moved.received[rank] == received
        assert moved.remote[rank] == remote


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([7], 50, 7),
        ([7], 90, 7),
        ([3, 1, 2], 50, 2),
        ([4, 3, 2, 1], 50, 2),
        (range(1, 11), 90, 9),
        (range(1, 21), 90, 18),
    ],
)
def test_percentile_is_a_measured_value(values, percent, expected):
    assert percentile(np.array(values, float), percent) == expected


def test_slowest_counts_from_the_first_start_to_the_last_end():
    one = [(10.0, 11.0), (20.0, 21.0)]
    other = [(10.5, 12.0), (19.5, 20.0)]
    np.testing.assert_allclose(slowest([one, other]), [2.0, 1.5])


def test_calls_take_turns_and_first_and_last_results_are_checked():
    said = []
    counts = {"a": 0, "b": 0}

    def call(name):
        def run():
            said.append(name)
            counts[name] += 1
            return counts[name]

        return Call(name, "op", run, lambda result: [Check(name, "op", f"result {result}", 0.0, 0.0)])

    spans, checks = interleave([call("a"), call("b")], iters=2, warmup=1, barrier=lambda: said.append("|"))
    assert "".join(said) == "|a|b|a|b|a|b"
    assert [len(of_call) for of_call in spans] == [2, 2]
    assert all(start <= end for of_call in spans for start, end in of_call)
    assert [(check.name, check.what) for check in checks] == [
        ("a", "result 1"),
        ("b", "result 1"),
        ("a", "result 3"),
        ("b", "result 3"),
    ]


@pytest.mark.parametrize(("error", "ok"), [(0.0, True), (1.0, True), (1.01, False), (float("nan"), False)])
def test_a_check_needs_a_small_error(error, ok):
    assert Check("native", "dispatch", "rows", error, 1.0).ok is ok


def test_barrier_lets_nobody_pass_alone(tmp_path):
    Barrier.create(tmp_path / "barrier", 2)
    first, second = (Barrier(tmp_path / "barrier", 2, i) for i in range(2))
    passed = threading.Event()
    thread = threading.Thread(target=lambda: (first(), passed.set(), first()))
    thread.start()
    assert not passed.wait(0.1)
    second()
    assert passed.wait(10)
    second()
    thread.join(10)
    assert not thread.is_alive()


def test_peak_memory_sees_what_comes_and_goes():
    size = 64 << 20

    def run():
        np.ones(size, np.uint8)

    seen = memory.peak_during(run)
    assert size * 0.9 < seen["peak"] - seen["idle"] < size * 1.5
    assert seen["shared"] >= 0


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"ranks": 0}, "ranks=0 must be at least 1; raise --ranks"),
        ({"top_k": 0}, "top_k=0 must be at least 1; raise --top-k"),
        ({"iters": 0}, "iters=0 must be at least 1"),
        ({"top_k": 4, "experts": 3}, "top_k=4 must be at most experts=3; lower --top-k or raise --experts"),
        ({"ranks": 4, "processes": 3}, "processes=3 must divide ranks=4"),
        ({"kind": "layer", "hidden": 8, "experts": 16}, "hidden=8 must be at least experts=16"),
        ({"compare": ("native", "smoke")}, "compare='smoke' must be one of"),
        ({"kind": "layer", "compare": ("native",)}, "compare='native' must be one of"),
        ({"capacity_factor": -1.0}, "capacity_factor=-1.0 must be positive"),
    ],
)
def test_bad_arguments_are_refused(changed, text):
    with pytest.raises(ConfigError) as error:
        new_case(**{"kind": "exchange", **changed})
    assert text in str(error.value)


@pytest.mark.parametrize("argv", [["--ranks", "0"], ["--ranks", "4", "--processes", "3"], ["--top-k", "40"]])
def test_the_command_refuses_bad_arguments(argv, capsys):
    assert cli.main(["bench", "exchange", *argv]) == 1
    said = capsys.readouterr().err
    assert said.startswith("jax-moriep bench: ")
    assert " must " in said


def test_the_command_refuses_a_folder_that_is_not_there_before_it_measures(tmp_path, capsys):
    assert cli.main(["bench", "exchange", "--json", str(tmp_path / "no" / "x.json")]) == 1
    assert "make the folder first" in capsys.readouterr().err


def test_a_case_survives_json():
    case = new_case("layer", ranks=2, processes=1, compare=("reference+blocked",), capacity_factor=1.5)
    assert Case.from_json(case.to_json()) == case


def test_options_become_a_case():
    parser = argparse.ArgumentParser()
    bench_cases.add_arguments(parser, "exchange")
    options = "--ranks 6 --top-k 3 --dtype bf16 --routing one-hot --transports reference,native"
    args = parser.parse_args(options.split())
    case = bench_cases.case_of("exchange", args)
    assert (case.ranks, case.processes, case.top_k, case.dtype, case.routing) == (6, 6, 3, "bf16", "one-hot")
    assert case.compare == ("reference", "native")
    assert case.row_bytes == 2048


def test_oracle_places_routes_and_drops_what_does_not_fit():
    shape = ExchangeShape(
        num_ranks=2,
        num_tokens=2,
        top_k=2,
        hidden_size=4,
        num_experts=4,
        num_local_experts=2,
        block=2,
        capacity=4,
    )
    ids = np.array([[0, 1], [0, 2], [1, 0], [2, 1]], np.int32)
    rows = oracle.place_routes(ids, shape)
    # Expert 0 has rows 0 to 2, expert 1 would begin at row 4, which is not there; expert 2 begins at row 0.
    assert rows.row_of_route.tolist() == [[0, -1], [1, 0], [-1, 2], [1, -1]]
    assert rows.counts.tolist() == [3, 0, 2, 0]
    assert [list(map(int, part)) for part in rows.on(0, ids, shape)] == [[0, 1, 2], [0, 0, 1], [0, 1, 2]]
    assert rows.counts_on(1, shape).tolist() == [2, 0]


def test_oracle_gradients_are_finite_differences():
    rng = np.random.default_rng(0)
    inputs = {"x": rng.normal(size=(3, 4)), "w1": rng.normal(size=(10, 4)), "w2": rng.normal(size=(4, 5))}
    d_y = rng.normal(size=(3, 4))
    found = oracle.mlp(**inputs, d_y=d_y)
    for name, value in inputs.items():
        for at in np.ndindex(value.shape):
            step = np.zeros_like(value)
            step[at] = 1e-6
            up, down = (oracle.mlp(**{**inputs, name: value + sign * step}, d_y=d_y).y for sign in (1, -1))
            slope = ((up - down) * d_y).sum() / 2e-6
            np.testing.assert_allclose(getattr(found, f"d_{name}")[at], slope, rtol=1e-5, atol=1e-7)


def run_here(case, tmp_path):
    """Runs a case on devices of this process; gives what the runner would join."""
    Barrier.create(tmp_path / "barrier", 1)
    world = World(case.ranks, tmp_path / "barrier")
    kind = KINDS[case.kind]
    calls = kind.calls(case, world, kind.make_data(case, world))
    spans, checks = interleave(calls, case.iters, case.warmup, world.barrier)
    return calls, spans, checks


@pytest.mark.parametrize(
    ("kind", "routing", "compare"),
    [
        *(("exchange", routing, ("collective", "reference")) for routing in patterns.PATTERNS),
        *(("experts", routing, ("blocked", "ragged_dot", "dense")) for routing in ("zipf", "one-hot")),
        ("layer", "zipf", ("collective+blocked", "reference+ragged_dot")),
    ],
)
def test_every_kind_is_right(kind, routing, compare, tmp_path):
    case = new_case(
        kind, ranks=4 if kind == "exchange" else 2, processes=1, routing=routing, compare=compare, **SMALL
    )
    calls, spans, checks = run_here(case, tmp_path)
    assert [check for check in checks if not check.ok] == []
    assert {call.name for call in calls} - {"memcpy"} == set(compare)
    assert {check.name for check in checks} == set(compare) - {"dense"}
    assert all(len(of_call) == case.iters for of_call in spans)
    operations = {call.operation for call in calls}
    assert operations == {check.operation for check in checks}
    if kind == "exchange":
        # Rows, weights and sizes of dispatch, tokens of the two others; the first and the last result.
        assert len(checks) == len(compare) * case.ranks * (3 + 1 + 1) * 2


@pytest.mark.parametrize(
    ("kind", "dtype", "compare"),
    [
        ("exchange", "bf16", "collective"),
        ("exchange", "f16", "collective"),
        ("experts", "f16", "blocked"),
        ("layer", "bf16", "collective+blocked"),
    ],
)
def test_low_precision_is_right_too(kind, dtype, compare, tmp_path):
    case = new_case(kind, ranks=2, processes=1, dtype=dtype, compare=(compare,), **SMALL)
    assert [check for check in run_here(case, tmp_path)[2] if not check.ok] == []


@pytest.mark.parametrize(
    ("compare", "dtype", "sizes"),
    [
        (("collective+blocked", "reference+ragged_dot"), "f32", {}),
        # Blocks at ragged edges, also between gate and up.
        (("collective+blocked-fp8_block",), "f32", {"hidden": 136, "intermediate": 132}),
        (("collective+blocked", "collective+blocked-int8_token"), "bf16", {}),
    ],
)
def test_decoding_is_right(compare, dtype, sizes, tmp_path):
    case = new_case(
        "decode",
        ranks=2,
        processes=1,
        layers=2,
        operations=("T=1", "T=5"),
        dtype=dtype,
        compare=compare,
        **{**SMALL, **sizes},
    )
    calls, spans, checks = run_here(case, tmp_path)
    assert [check for check in checks if not check.ok] == []
    # One token of each rank, and four; each in every layer, of the first and the last result.
    assert len(checks) == len(compare) * case.ranks * case.layers * 2 * 2
    assert {(call.name, call.operation) for call in calls} == {
        (name, operation) for name in compare for operation in case.operations
    }
    assert all(call.repeats == case.layers for call in calls)


def test_decoding_on_one_rank_runs_often_beside_a_floor_and_a_plain_layer(tmp_path):
    compare = ("collective+blocked", "collective+blocked-fp8_token", "plain")
    sizes = {"ranks": 1, "processes": 1, "layers": 2, "repeats": 2, "operations": ("T=3",)}
    case = new_case("decode", floors=("read",), compare=compare, **{**SMALL, **sizes})
    calls, _, checks = run_here(case, tmp_path)
    # The floor reads weights of both layers, too.
    assert [(call.name, call.repeats) for call in calls] == [("read", 4), *((name, 4) for name in compare)]
    assert len(checks) == len(compare) * case.layers * 2
    assert all(check.ok for check in checks)


def test_experts_that_are_not_quantised_are_noticed_while_decoding(tmp_path, monkeypatch):
    right = MoEConfig.__init__
    monkeypatch.setattr(decode.prepare, "prepare_params", lambda weights, cfg, mesh, ep_axis: weights)
    monkeypatch.setattr(
        MoEConfig,
        "__init__",
        lambda self, *args, **given: right(self, *args, **{**given, "expert_quant": None}),
    )
    compare = ("collective+blocked", "collective+blocked-fp8_block")
    case = new_case("decode", ranks=2, processes=1, layers=1, operations=("T=5",), compare=compare, **SMALL)
    assert {check.name for check in run_here(case, tmp_path)[2] if not check.ok} == {compare[1]}


@pytest.mark.parametrize(
    ("scheme", "format"), [("fp8_block", "e4m3fn"), ("fp8_token", "e4m3fnuz"), ("int8_token", "int8")]
)
def test_the_decoding_oracle_rounds_by_the_schemes(scheme, format):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(2 * 132, 136)) * np.exp2(rng.integers(-30, 30, size=(2 * 132, 1)))
    w = w.astype(np.float32).astype(np.float64)
    w[140:150] = 2.0**-101
    want = schemes_oracle.weights(w[None], scheme, format, 2)[0][0]
    np.testing.assert_array_equal(decode_oracle.rounded_weights(w, scheme, 2, format), want)
    want = schemes_oracle.rounded_columns(w[:20], 128, format)
    np.testing.assert_array_equal(decode_oracle.rounded_columns(w[:20], 128, format), want)


def test_matrices_of_layers_differ_and_have_the_codes_of_the_first():
    height = 300
    first = formula.matrix(formula.W2, np.arange(height), 130).astype(np.float64)
    codes = decode_oracle.rounded_weights(first, "fp8_block", 1, "e4m3fn")
    seen = set()
    for number in range(40):
        row, matrix = np.arange(height, dtype=np.uint32), np.full(1, number, np.uint32)
        source, factor = formula.by_blocks(formula.W2, matrix, row, height, decode_oracle.BLOCK)
        assert sorted(source.tolist()) == row.tolist()
        values = first[source] * factor[:, None]
        again = decode_oracle.rounded_weights(values, "fp8_block", 1, "e4m3fn")
        np.testing.assert_array_equal(again, codes[source] * factor[:, None])
        seen.add(values.tobytes())
    assert len(seen) == 40


def test_options_become_a_case_of_decoding():
    def case_of(options):
        parser = argparse.ArgumentParser()
        bench_cases.add_arguments(parser, "layer")
        parser.add_argument("--platform")
        return bench_cases.case_of("layer", parser.parse_args(options.split()))

    case = case_of("--phase decode --quant fp8_block --ranks 2")
    assert (case.kind, case.layers, case.tokens, case.floors) == ("decode", 4, 128, ())
    assert case.operations == ("T=1", "T=8", "T=32", "T=128")
    assert case.compare == ("native+blocked", "collective+ragged_dot", "native+blocked-fp8_block")
    case = case_of("--phase decode --tokens 3 --layers 2 --platform cuda --ranks 1 --quant int8_token")
    assert (case.operations, case.tokens, case.layers, case.floors) == (("T=3",), 3, 2, ("read",))
    assert case.compare[-3:] == ("plain", "native+triton-int8_token", "collective+triton-int8_token")
    assert case_of("").tokens == 1024
    with pytest.raises(ConfigError, match="quant='fp8_block' must come with --phase decode"):
        case_of("--quant fp8_block")
    with pytest.raises(ConfigError, match="layers=2 must be 1 but for decoding; add --phase decode"):
        case_of("--layers 2")


def test_dropped_routes_are_expected(tmp_path):
    case = new_case(
        "exchange",
        ranks=2,
        processes=1,
        routing="one-hot",
        capacity_factor=0.5,
        compare=("collective",),
        **SMALL,
    )
    assert (oracle.place_routes(np.zeros((24, 2), np.int32) + [0, 1], case.shape).row_of_route < 0).any()
    assert [check for check in run_here(case, tmp_path)[2] if not check.ok] == []


def test_a_row_in_the_wrong_place_is_noticed(tmp_path, monkeypatch):
    right = collective.replay

    def wrong(link, x, ids, own, order):
        rows, order = right(link, x, ids, own, order)
        return rows.at[0].set(rows[1]).at[1].set(rows[0]), order

    monkeypatch.setattr(collective, "replay", wrong)
    case = new_case("exchange", ranks=2, processes=1, compare=("collective",), **SMALL)
    wrong_checks = [check for check in run_here(case, tmp_path)[2] if not check.ok]
    assert {check.operation for check in wrong_checks} == {"dispatch", "combine", "dispatch+combine"}


def test_a_wrong_gradient_is_noticed(tmp_path, monkeypatch):
    right = exchange._combine_bwd

    def wrong(plan, cotangents):
        d_rows, nothing, token = right(plan, cotangents)
        return d_rows * 1.01, nothing, token

    monkeypatch.setattr(exchange, "_combine_bwd", wrong)
    exchange._combine.defvjp(exchange._combine_fwd, wrong)
    try:
        case = new_case("layer", ranks=2, processes=1, compare=("collective+blocked",), **SMALL)
        wrong_checks = [check for check in run_here(case, tmp_path)[2] if not check.ok]
    finally:
        exchange._combine.defvjp(exchange._combine_fwd, right)
    assert {check.operation for check in wrong_checks} == {"forward+backward"}
    assert {check.what.split()[0] for check in wrong_checks} == {"d_x", "d_w1", "d_w2"}


def result_of(case, *, slow=1.0, error=0.0):
    """A result as the runner gives it, with made-up times of 1, 2, ... milliseconds."""
    kind = KINDS[case.kind]
    names = [*case.compare, *(["memcpy"] if case.kind == "exchange" else [])]
    calls = []
    for operation in kind.operations:
        for i, name in enumerate(names):
            seconds = [1e-3 * (i + 1)] * 9 + [slow]
            spans = [[[0.0, s]] for s in seconds]
            calls.append(
                {"name": name, "operation": operation, "p50": 1e-3 * (i + 1), "p90": 1.5e-3 * (i + 1)}
                | {"seconds": seconds, "spans": spans}
            )
    moved = {"received": [3_000_000, 5_000_000], "remote": [1_000_000, 2_000_000]}
    check = Check(case.compare[0], kind.operations[0], "tokens of rank 0", error, 0.5)
    return {
        "format": formats.BENCH,
        "command": "jax-moriep bench",
        "versions": {"jax": "0", "jax_moriep": "0"},
        "machine": {"cores": 2, "processor": "some CPU"},
        "case": dataclasses.asdict(case),
        "bytes": moved if case.kind == "exchange" else None,
        "calls": calls,
        "checks": [{**dataclasses.asdict(check), "ok": check.ok}],
        "capacity_bytes": 70_000_000,
        "all_routes_bytes": 67_000_000,
    }


def test_report_has_ratios_rates_and_the_verdict():
    result = result_of(new_case("exchange", ranks=2, processes=2))
    text = report.as_text(result)
    assert "a rank receives 4 MB by MORI's convention" in text
    assert "1.5 MB of it from other ranks" in text
    both = text.split("\n\n")[1].splitlines()
    # 2 * 4 MB in 1, 2 and 3 ms; memcpy takes 3 ms here.
    assert both[1].split() == ["native", "1.00", "1.50", "1.00", "8", "300%"]
    assert both[2].split() == ["collective", "2.00", "3.00", "2.00", "4", "150%"]
    assert both[3].split() == ["memcpy", "3.00", "4.50", "3.00", "2.67", "100%"]
    assert "all 1 comparisons with the NumPy oracle are right" in text
    wrong = report.as_text(result_of(new_case("exchange", ranks=2, processes=2), error=0.75))
    assert "WRONG: 1 of 1 comparisons" in wrong
    assert "tokens of rank 0: error 0.75, at most 0.5 is right" in wrong


def test_an_operation_of_the_floor_alone_is_left_out():
    """A combine with the fp8 wire is no other than without, so of names with it alone there is none."""
    result = result_of(new_case("exchange", ranks=2, processes=2, compare=("native-fp8",)))
    result["calls"] = [
        call for call in result["calls"] if (call["name"], call["operation"]) != ("native-fp8", "combine")
    ]
    text = report.as_text(result)
    assert "time over native-fp8" in text
    assert not any(line.startswith("combine ") for line in text.splitlines())


def test_report_names_the_fullest_process():
    result = result_of(new_case("layer", ranks=2, processes=2))
    seen = [
        {"before": 100_000_000, "idle": 1, "peak": 130_000_000, "shared": 5_000_000},
        {"before": 100_000_000, "idle": 1, "peak": 150_000_000, "shared": 6_000_000},
    ]
    result["memory"] = {"native+blocked": seen, "collective+ragged_dot": seen[:1]}
    text = report.as_text(result)
    assert next(line for line in text.splitlines() if line.split()[1:] == ["100", "150", "50", "6"])
    assert "C*H is 70 MB, R*T*K*H is 67 MB" in text


def test_plot_draws_results_side_by_side(tmp_path, capsys):
    files = []
    for kind in KINDS:
        result = result_of(new_case(kind, ranks=2, processes=2))
        if kind == "layer":
            result["memory"] = {
                name: [{"before": 1, "peak": 5_000_000}] for name in result["case"]["compare"]
            }
        files.append(tmp_path / f"{kind}.json")
        files[-1].write_text(json.dumps(result))
    out = tmp_path / "picture.png"
    assert cli.main(["plot", *map(str, files), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 20_000
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize("text", ["no json", "[]", '{"format": "something else"}'])
def test_plot_refuses_other_files(text, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert cli.main(["plot", str(path)]) == 1
    assert "name a file that `jax-moriep bench ... --json FILE` wrote" in capsys.readouterr().err


def test_plot_says_where_it_cannot_write(tmp_path):
    with pytest.raises(ConfigError, match=r"--out='.*' must be writable as a picture; name a file"):
        picture.draw([result_of(new_case("experts", ranks=2, processes=2))], tmp_path / "no" / "x.png")


@pytest.mark.parametrize("name", ["", "picture"])
def test_plot_wants_an_ending(name):
    with pytest.raises(
        ConfigError, match=r"--out='.*' must have an ending that tells the format; name a file"
    ):
        picture.draw([result_of(new_case("experts", ranks=2, processes=2))], Path(name))


@pytest.mark.parametrize("kind", ["plan", "load", "layer", "kernels"])
def test_the_bench_refuses_a_folder_as_its_file_before_it_measures(kind, tmp_path, capsys):
    assert cli.main(["bench", kind, "--json", str(tmp_path)]) == 1
    must = "must be a file, and is a folder; name a file in it"
    assert capsys.readouterr().err == f"jax-moriep bench: --json={str(tmp_path)!r} {must}\n"


@pytest.mark.parametrize("gb", ["nan", "inf", "0"])
def test_bench_load_refuses_a_size_that_is_none(gb, capsys):
    assert cli.main(["bench", "load", "--gb", gb]) == 1
    assert f"--gb={float(gb)} must be positive and finite" in capsys.readouterr().err


def test_plot_says_how_to_get_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MoriepError, match=r"pip install 'jax-moriep\[plot\]'"):
        picture.draw([result_of(new_case("experts", ranks=2, processes=2))], tmp_path / "x.png")
