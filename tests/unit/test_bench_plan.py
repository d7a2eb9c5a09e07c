"""bench plan: chances against draws, bytes against loops and a simulator's counts, and the command."""

import argparse
import json
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jax_moriep import cli
from jax_moriep.bench.kinds import plan, plan_bytes
from jax_moriep.bench.problem import destinations, models, routing, shares
from jax_moriep.bench.show import plan_report
from jax_moriep.cli import bench_plan
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError
from jax_moriep.plan import ExchangeShape
from tests.rocm.counted_inputs import Given
from tests.rocm.counted_inputs import Sizes as Counted

ROOT = Path(__file__).parents[2]


def drawn(popularity, top_k, count, seed=1):
    """Routes of tokens that choose one expert after another."""
    rng = np.random.default_rng(seed)
    left = np.tile(popularity, (count, 1))
    ids = np.zeros((count, top_k), int)
    for k in range(top_k):
        edges = left.cumsum(1)
        ids[:, k] = (rng.random((count, 1)) * edges[:, -1:] < edges).argmax(1)
        left[np.arange(count), ids[:, k]] = 0
    return ids


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(10, 3, 4), (8, 2, 8), (6, 6, 3), (64, 6, 16)])
def test_chances_are_those_of_drawing_one_expert_after_another(experts, top_k, ranks):
    """Also where the ranks do not divide the experts."""
    popularity = destinations.zipf(experts)
    ids = drawn(popularity, top_k, 40_000)
    chosen = destinations.chosen_from(popularity, top_k, np.arange(experts))
    to = destinations.of_popularity(popularity, top_k, ranks, 2 if ranks % 2 == 0 else 1, chosen)
    counted = destinations.of_ids(ids, experts, ranks, to.per_node, of_all=False)
    for name in ("to_rank", "to_node", "routes"):
        np.testing.assert_allclose(getattr(to, name), getattr(counted, name), atol=0.012, err_msg=name)
    assert to.routes.sum() == pytest.approx(top_k)


def test_a_uniform_choice_has_the_closed_form_and_the_integral_agrees():
    sets = np.arange(256) // 32
    exact = 1 - math.comb(224, 8) / math.comb(256, 8)
    np.testing.assert_allclose(destinations.chosen_from(np.ones(256), 8, sets), exact)
    almost = 1 + 1e-9 * np.arange(256)
    np.testing.assert_allclose(destinations.chosen_from(almost, 8, sets), exact, rtol=1e-6)


def test_a_fit_gives_the_counts_back():
    counts = np.bincount(drawn(destinations.zipf(32), 4, 5000).ravel(), minlength=32)
    chosen = destinations.chosen_from(destinations.fitted(counts, 4), 4, np.arange(32))
    np.testing.assert_allclose(chosen * 5000, np.maximum(counts, 0.01), rtol=2e-3)
    with pytest.raises(ConfigError, match="no expert that is chosen more often than there are tokens"):
        destinations.fitted(np.array([9, 1, 1, 1]), 2)


def test_grouped_routes_keep_to_their_groups():
    ids = destinations.sampled(np.ones(64), 8, 8, 3, two_best=True)
    assert (np.sort(ids, 1)[:, 1:] > np.sort(ids, 1)[:, :-1]).all()
    assert max(len(set(token)) for token in (ids[:500] // 8).tolist()) == 3


def test_equal_experts_are_equally_loaded_also_in_a_sample():
    """Ten experts on four ranks: three, three, three and one."""
    to = destinations.of_ids(drawn(np.ones(10), 3, 3000), 10, 4, 2, of_all=False)
    even = destinations.evened(to, 10)
    np.testing.assert_allclose(even.routes[0, :3], to.routes[0, :3].mean())
    np.testing.assert_allclose(even.to_rank[0, 3], to.to_rank[0, 3])
    np.testing.assert_allclose(even.to_node, to.to_node)
    assert even.routes.sum() == pytest.approx(3)


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 50, 10_000])
def test_routes_are_counted_some_at_a_time(monkeypatch, of_all, at_once):
    """Whatever their number, also routes that lead nowhere, and the numbers are those of a loop."""
    ids = drawn(destinations.zipf(10), 3, 30)
    ids[4, 1], ids[9] = -1, 10
    monkeypatch.setattr(destinations, "_COUNTED", at_once)
    to = destinations.of_ids(ids, 10, 6, 2, of_all=of_all)
    to_rank, to_node, routes = np.zeros((6, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    for token, chosen in enumerate(ids.tolist()):
        source, owners = token // 5, [expert // 2 for expert in chosen if 0 <= expert < 10]
        for owner in owners:
            routes[source, owner] += 1 / 5
        to_rank[source, list(set(owners))] += 1 / 5
        to_node[source, list({owner // 2 for owner in owners})] += 1 / 5
    for got, want in ((to.to_rank, to_rank), (to.to_node, to_node), (to.routes, routes)):
        np.testing.assert_allclose(got, want if of_all else want.mean(0, keepdims=True), atol=1e-12)


def test_counting_routes_takes_memory_that_does_not_grow_with_their_number():
    """R x T counts of 256 ranks and 65536 tokens are 64 MiB, and four arrays of that size once were there."""
    ids = np.random.default_rng(0).integers(0, 256, (1 << 16, 8)).astype(np.int32)
    tracemalloc.start()
    try:
        destinations.of_ids(ids, 256, 256, 8, of_all=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Counts, and what is made of them, of as many tokens as are taken at once.
    assert peak < 16 * destinations._COUNTED


SMALL = plan_bytes.Sizes(
    ranks=6, per_node=2, tokens=5, top_k=3, experts=10, hidden=16, inner=8, shared=0, layers=1, row_bytes=64,
    value_bytes=4, weight_bytes=4, capacity=64, words=7,
)  # fmt: skip


def looped(transport, ids):
    """Bytes [4, R] of a dispatch and of a combine, token by token: inside out and in, between out and in."""
    ranks, per_node, local = SMALL.ranks, SMALL.per_node, 2
    dispatch, combine = np.zeros((2, 4, ranks))
    word, row = 4, SMALL.row_bytes
    parcel = row + 2 * word * SMALL.top_k + word

    def move(of, source, to, count):
        inside = source // per_node == to // per_node
        of[0 if inside else 2, source] += count
        of[1 if inside else 3, to] += count

    for s in range(ranks):
        for token in ids[s]:
            owners = {int(e) // local for e in token}
            nodes = {owner // per_node for owner in owners}
            for node in range(ranks // per_node):
                proxy = node * per_node + s % per_node
                if proxy != s and (transport == "two_level" or node in nodes):
                    move(dispatch, s, proxy, parcel if transport == "mori" else row + 2 * word * SMALL.top_k)
                    move(combine, proxy, s, row)
                for owner in owners:
                    if owner // per_node == node and owner != proxy:
                        move(dispatch, proxy, owner, parcel if transport == "mori" else row)
                        move(combine, owner, proxy, row)
                if transport == "two_level":
                    for peer in range(node * per_node, (node + 1) * per_node):
                        if peer != proxy:  # all ids, and the weights of its own rows
                            mine = sum(int(e) // local == peer for e in token)
                            move(dispatch, proxy, peer, word * (SMALL.top_k + mine))
    if transport == "two_level":
        for s in range(ranks):
            for other in range(s % per_node, ranks, per_node):
                if other != s:
                    move(dispatch, s, other, word * SMALL.words)
            for peer in range(s // per_node * per_node, (s // per_node + 1) * per_node):
                if peer != s:
                    move(dispatch, s, peer, word * SMALL.words * (ranks // per_node) + 24)
                    move(combine, s, peer, 24)
    return dispatch, combine


@pytest.mark.parametrize("transport", ["mori", "two_level"])
def test_bytes_of_given_routes_are_those_of_a_loop_over_tokens(transport):
    ids = drawn(destinations.zipf(10), 3, 30).reshape(6, 5, 3)
    to = destinations.of_ids(ids.reshape(30, 3), 10, 6, 2, of_all=True)
    exchange = plan_bytes.TRANSPORTS[transport](SMALL, to)
    for moved, want in zip((exchange.dispatch, exchange.combine), looped(transport, ids), strict=True):
        got = [moved.inside_out, moved.inside_in, moved.between_out, moved.between_in]
        np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("transport", plan_bytes.TRANSPORTS)
def test_ranks_that_are_alike_need_to_be_described_once(transport):
    ids = drawn(destinations.zipf(10), 3, 50)
    once = destinations.of_ids(ids, 10, 6, 2, of_all=False)
    every = destinations.of_ids(np.tile(ids, (6, 1)), 10, 6, 2, of_all=True)
    for what in ("dispatch", "combine"):
        one, each = (getattr(plan_bytes.TRANSPORTS[transport](SMALL, to), what) for to in (once, every))
        for name in ("inside_out", "inside_in", "between_out", "between_in"):
            np.testing.assert_allclose(getattr(one, name), getattr(each, name), err_msg=name)
        # What goes out comes in.
        assert one.inside_out.sum() == pytest.approx(one.inside_in.sum())
        assert one.between_out.sum() == pytest.approx(one.between_in.sum())


def test_the_bytes_that_the_simulator_counted_are_planned():
    """The table of docs/benchmarks.md: MI300X simulated, bytes between devices, the mean over four ranks."""
    recorded = {
        name: [int(cell.replace(",", "")) for cell in cells]
        for name, *cells in re.findall(
            r'^\| `transport="(\w+)"` \| ([\d,]+) \| [\d,]+ \| ([\d,]+) \| [\d,]+ \|$',
            (ROOT / "docs" / "benchmarks.md").read_text(),
            re.MULTILINE,
        )
    }
    assert set(recorded) == {"mori", "native"}
    of = Counted()
    sizes = plan_bytes.Sizes(
        of.ranks,
        of.ranks,
        of.tokens,
        of.top_k,
        of.experts,
        of.hidden,
        1,
        0,
        1,
        of.row_bytes,
        2,
        2,
        1,
        of.words,
    )
    ids = Given.draw(of).ids.reshape(-1, of.top_k)
    to = destinations.of_ids(ids, of.experts, of.ranks, of.ranks, of_all=True)
    for name, counted in recorded.items():
        exchange = plan_bytes.TRANSPORTS[name](sizes, to)
        # MORI pushes both ways; native reads at dispatch and writes at combine: once for each byte.
        planned = [exchange.dispatch.inside_in.mean(), exchange.combine.inside_in.mean()]
        np.testing.assert_allclose(planned, counted, rtol=0.01, err_msg=name)


def test_models_are_those_whose_shares_the_kernels_are_measured_on():
    for name, ranks, of in (
        ("deepseek-v3", 8, "-ep8"),
        ("qwen3-30b-a3b", 8, "-ep8"),
        ("mixtral-8x7b", 1, ""),
    ):
        cfg, share = models.MODELS[name].cfg, shares.SHARES[f"{name}{of}"]
        assert (cfg.num_experts // ranks, cfg.hidden_size, cfg.intermediate_size) == (
            share.experts,
            share.hidden,
            share.inner,
        )


def planned(*argv):
    parser = argparse.ArgumentParser()
    bench_plan.add_parser(parser.add_subparsers())
    asked = bench_plan.asked_of(parser.parse_args(["plan", *argv]))
    return plan.run(asked, print, lambda result: None)


def test_a_plan_by_hand():
    """Mixtral on four ranks, a node of two each: every number in its own words."""
    argv = "--model mixtral-8x7b --ranks 4 --per-node 2 --tokens 400 --inside 100 --between 10 --tflops 500"
    (of_ranks,) = planned(*argv.split())["plans"]
    cfg = models.MODELS["mixtral-8x7b"].cfg
    assert of_ranks["capacity"] == ExchangeShape.of(cfg, 4, 400).capacity
    assert of_ranks["weight_bytes"] == 32 * 2 * (2 * 3 * 4096 * 14336 + 8 * 4096)
    assert of_ranks["expert_seconds"] == pytest.approx(800 * 6 * 4096 * 14336 / 500e12)
    assert of_ranks["transports"]["native"] == {"reason": "it needs the ranks of a group on one machine"}
    # A token goes to another node unless both of its two experts are among this one's four.
    away = 400 * (1 - (4 * 3) / (8 * 7))
    combine = of_ranks["transports"]["mori"]["combine"]
    assert combine["between"]["in"]["max"] == pytest.approx(away * 8192)
    assert combine["seconds"] == pytest.approx(away * 8192 / 10e9)
    collective = of_ranks["transports"]["collective"]
    assert collective["combine"]["between"]["out"]["mean"] == 2 * 400 * 8192
    assert collective["dispatch"]["between"]["out"]["max"] == 3 * (400 * (8192 + 16) + 4 * 19)
    moving = collective["dispatch"]["seconds"] + collective["combine"]["seconds"]
    assert collective["share"]["forward"] == pytest.approx(moving / (moving + of_ranks["expert_seconds"]))


def test_mori_sends_few_tokens_to_every_node():
    """Its kernel for them (InterNodeV1LL) does, and brings a row back for each."""
    few = "--model mixtral-8x7b --ranks 4 --per-node 2 --tokens 256".split()
    (of_ranks,) = planned(*few)["plans"]
    mori = of_ranks["transports"]["mori"]
    for what in ("out", "in"):
        assert mori["dispatch"]["between"][what]["max"] == 256 * (8192 + 16 + 4)
        assert mori["combine"]["between"][what]["max"] == 256 * 8192
    # Not where a rank has one expert: the kernel cannot do that.
    (of_ranks,) = planned(*few, "--experts", "4")["plans"]
    assert of_ranks["transports"]["mori"]["combine"]["between"]["out"]["max"] < 256 * 8192


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--ranks 128", "top_k=8 must be at least the 16 machines with InterNodeV1"),
        ("--ranks 32 --per-node 16", "ranks=32 must be at most 8 on a machine with MORI"),
        ("--ranks 6 --per-node 3", "gpus_per_node=3 must be a power of two"),
        ("--ranks 8 --dtype float16", "dtype='float16' must be one of"),
    ],
)
def test_mori_is_not_planned_where_it_is_refused(argv, text):
    (of_ranks,) = planned(*argv.split())["plans"]
    assert of_ranks["transports"]["mori"]["reason"].startswith(text)
    assert "reason" not in of_ranks["transports"]["two_level"]


def test_the_command_plans_a_config_and_measured_routes(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64}
            | {"intermediate_size": 32, "num_hidden_layers": 3, "hidden_act": "silu"}
        )
    )
    ids = drawn(destinations.zipf(8), 2, 4000)
    np.save(tmp_path / "routes.npy", ids)
    np.save(tmp_path / "counts.npy", np.bincount(ids.ravel(), minlength=8))
    results = []
    for kind in ("zipf", str(tmp_path / "routes.npy"), str(tmp_path / "counts.npy")):
        out = tmp_path / "out.json"
        argv = f"bench plan --config {tmp_path} --ranks 2,8 --per-node 4 --tokens 64 --wire fp8 --json {out}"
        assert cli.main([*argv.split(), "--routing", kind]) == 0
        assert "8 ranks, 2 nodes" in capsys.readouterr().out
        results.append(json.loads(out.read_text()))
    assert results[0]["model"]["layers"] == 3
    assert len(results[0]["plans"]) == 2
    for other in results[1:]:
        for ours, theirs in zip(results[0]["plans"], other["plans"], strict=True):
            a, b = (of["transports"]["mori"]["dispatch"]["inside"]["in"]["mean"] for of in (ours, theirs))
            assert a == pytest.approx(b, rel=0.05)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ("--ranks 8,12", "ranks='8,12' must be numbers of ranks, of whole nodes of 8"),
        ("--ranks x", "ranks='x' must be"),
        ("--per-node 0", "per_node=0 must be at least 1"),
        ("--tokens 0", "tokens=0 must be at least 1"),
        ("--between 0", "between=0.0 must be positive and finite"),
        ("--tflops inf", "tflops=inf must be positive and finite"),
        ("--layers 0", "layers=0 must be at least 1"),
        ("--routing nowhere.npy", "routing='nowhere.npy' must be uniform, zipf, or a file of NumPy"),
    ],
)
def test_wrong_arguments_are_refused(argv, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        planned(*argv.split())


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    np.save(tmp_path / "few.npy", np.arange(7))
    with pytest.raises(ConfigError, match=r"hold integers \[256\] or \[N, 8\], and holds int64\[7\]"):
        routing.routing(str(tmp_path / "few.npy"), MoEConfig(256, 8, 16, 8))


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04"])
def test_a_file_that_was_cut_short_is_refused(start, tmp_path):
    (tmp_path / "of.npy").write_bytes(start)
    with pytest.raises(ConfigError, match=r"routing='.*of\.npy' must be uniform, zipf, or a file of NumPy"):
        routing.routing(str(tmp_path / "of.npy"), MoEConfig(8, 2, 16, 8))


@pytest.mark.parametrize("routes", [np.zeros((0, 2), int), np.full((9, 2), 8), np.zeros(8, int)])
def test_routes_that_lead_nowhere_are_refused(tmp_path, routes):
    """No tokens, another model's experts, counts of nothing."""
    np.save(tmp_path / "of.npy", routes)
    with pytest.raises(ConfigError, match="must lead to at least one of the 8 experts"):
        routing.routing(str(tmp_path / "of.npy"), MoEConfig(8, 2, 16, 8))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.0012345, "0.00123"),
        (0.9996, "1.00"),
        (4.096, "4.10"),
        (12.345, "12.3"),
        (99.96, "100"),
        (512.4, "512"),
        (999.6, "1000"),
        (33554.4, "33554"),
    ],
)
def test_three_digits_are_shown(value, shown):
    assert plan_report._digits(value) == shown


def test_a_plan_of_few_tokens_shows_its_bytes_and_times():
    """One token of 8 KiB a rank: megabytes and microseconds far below one."""
    result = planned(*"--model mixtral-8x7b --ranks 2 --tokens 1".split())
    line = next(line for line in plan_report.as_text(result).splitlines() if "collective" in line)
    of = result["plans"][0]["transports"]["collective"]
    shown = [float(word) for word in line.split()[1:7]]
    exact = [
        *(of["dispatch"]["inside"]["in"]["max"] / 1e6, 0.0),
        *(of["combine"]["inside"]["in"]["max"] / 1e6, 0.0),
        *(of["dispatch"]["seconds"] * 1e6, of["combine"]["seconds"] * 1e6),
    ]
    np.testing.assert_allclose(shown, exact, rtol=5e-3)
    assert 0 < exact[0] < 0.01
    assert "experts 0.539 us" in plan_report.as_text(result)


def test_a_config_beside_a_model_is_refused(tmp_path):
    text = f"model='mixtral-8x7b' must be the only model, and config={str(tmp_path)!r} is another; leave out"
    with pytest.raises(ConfigError, match=re.escape(text)):
        planned("--model", "mixtral-8x7b", "--config", str(tmp_path))
    assert planned("--ranks", "8")["model"]["layers"] == models.MODELS["deepseek-v3"].layers
