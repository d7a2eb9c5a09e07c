"""The Pallas experts beyond what every implementation must do: tiles, tuning, kernels, repeatable bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experts import SIZES, TOLERANCE, check, make_case, make_spec, with_gradients

from jax_moriep import experts, schemes
from jax_moriep.cli import main
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError
from jax_moriep.experts import ExpertWeights
from jax_moriep.experts.pallas import choice, mlp
from jax_moriep.experts.pallas import table as tile_table
from jax_moriep.experts.pallas.hopper import support
from jax_moriep.experts.pallas.launch import Tile
from jax_moriep.experts.pallas.tiles import position_in_grid, position_in_runs, real_rows, row_tiles
from jax_moriep.experts.pallas.triton import tuning
from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime import compat, settings
from jax_moriep.runtime.place import Place


# Either number of rows is rounded to the same tiles.
@pytest.mark.parametrize(("weight_input", "saved_rows"), [(False, 1), (True, 128)])
def test_rows_that_are_computed_again(weight_input, saved_rows):
    spec = make_spec("gelu", weight_input, saved_rows=saved_rows)
    case = make_case(SIZES["full"], spec, biases=True)
    assert mlp.saved_rows(spec, 168) == 128
    check("triton", case, TOLERANCE["float32"])


def test_bitwise_repeatable():
    case = make_case(SIZES["uneven"], make_spec(), biases=True)
    run = with_gradients("triton", case.spec)
    first, second = (run(case.sizes, case.operands, case.d_out) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("block", [1, 8, 24, 64])
@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("first_row", [0, 64, 1000])
def test_tiles(first_row, size, block):
    sizes = np.array([13, 0, 70, 1, 0, 200, 0], np.int32)
    aligned = -(-sizes // block) * block
    capacity = int(aligned.sum()) + 2 * block
    tiles = row_tiles(jnp.asarray(sizes), block, capacity, size, first_row, group=4)
    want, start = [], 0
    for expert, (real, rows) in enumerate(zip(sizes, aligned, strict=True)):
        for first in range(start, start + rows, size):
            want.append((expert, first, start + real, start + rows))
        start += rows
    want, groups = np.array(want), np.asarray(tiles.table)[4:, : len(want)].T
    table = np.asarray(tiles.table)
    assert len(want) <= tiles.max_tiles
    np.testing.assert_array_equal(table[:4, : len(want)].T, want)
    # Groups follow each other and hold one expert's tiles, at most four; a run's differ by one at most.
    for tile, (first, end) in enumerate(groups):
        assert first <= tile < end <= first + 4
        assert (groups[first:end] == (first, end)).all()
        assert len(set(want[first:end, 0])) == 1
    for expert in set(want[:, 0]):
        of_run = groups[want[:, 0] == expert]
        heights = {tuple(group): group[1] - group[0] for group in of_run}
        assert len(heights) == -(-len(of_run) // 4)
        assert max(heights.values()) - min(heights.values()) <= 1
    left_out = sum(first + size <= first_row for _, first, _, _ in want)
    np.testing.assert_array_equal(table[:3, -1], [len(want), start, left_out])
    # What kernels read by name is what the lines hold.
    for tile, line in enumerate(np.concatenate([want, groups], axis=1)):
        of = tiles.of_tile(tiles.table, tile)
        named = (of.expert, of.first, of.stop, of.end, of.group_first, of.group_end)
        np.testing.assert_array_equal(named, line)
    of_call = tiles.of_call(tiles.table)
    named = (of_call.num_tiles, of_call.used_rows, of_call.first_tile)
    np.testing.assert_array_equal(named, [len(want), start, left_out])
    got = np.asarray(real_rows(jnp.asarray(sizes), block, capacity))
    starts = np.cumsum(aligned) - aligned
    row = np.arange(capacity)
    np.testing.assert_array_equal(
        got, [any(s <= r < s + n for s, n in zip(starts, sizes, strict=True)) for r in row]
    )


@pytest.mark.parametrize(
    ("experts", "block", "size", "first_row"),
    [(7, 8, 16, 64), (128, 8, 32, 0), (200, 24, 64, 1000), (1, 1, 16, 0)],
)
def test_the_kernel_makes_the_same_table(experts, block, size, first_row):
    rng = np.random.default_rng(experts)
    sizes = jnp.asarray(rng.integers(0, 70, experts) * (rng.random(experts) < 0.7), jnp.int32)
    capacity = int(jnp.sum(-(-sizes // block) * block)) + 2 * block
    tiles = row_tiles(sizes, block, capacity, size, first_row, group=4)
    cut = tile_table.Cut(block, size, first_row, 4, tiles.max_tiles)
    got = np.asarray(tile_table.kernel(sizes, cut, interpret=True))
    used = int(tiles.of_call(tiles.table).num_tiles)
    np.testing.assert_array_equal(got[:, :used], tiles.table[:, :used])
    np.testing.assert_array_equal(got[:, -1], tiles.table[:, -1])


@pytest.mark.parametrize("col_tiles", [1, 3])
@pytest.mark.parametrize("first_row", [0, 100])
def test_every_tile_has_one_turn(first_row, col_tiles):
    sizes = jnp.array([13, 0, 70, 1, 0, 200, 0], jnp.int32)
    tiles = row_tiles(sizes, 8, 400, 16, first_row, group=4)
    of_call = tiles.of_call(tiles.table)
    used, first_tile = int(of_call.num_tiles), int(of_call.first_tile)
    turns = range((used - first_tile) * col_tiles)
    seen = [
        tuple(map(int, position_in_runs(tiles.table, jnp.int32(t), first_tile, col_tiles))) for t in turns
    ]
    assert set(seen) == {(row, col) for row in range(first_tile, used) for col in range(col_tiles)}
    assert len(seen) == len(turns)


@pytest.mark.parametrize("row_tiles", [1, 4, 7])
@pytest.mark.parametrize("col_tiles", [1, 3])
def test_every_tile_of_a_grid_has_one_turn(col_tiles, row_tiles):
    turns = range(row_tiles * col_tiles)
    turn_of = [tuple(map(int, position_in_grid(jnp.int32(t), row_tiles, col_tiles, 4))) for t in turns]
    assert set(turn_of) == {(row, col) for row in range(row_tiles) for col in range(col_tiles)}
    # Four tiles of rows, or as many as are left, take their turn at one tile of columns before the next.
    assert [row for row, _ in turn_of[: min(4, row_tiles)]] == list(range(min(4, row_tiles)))


# --- Tuning -------------------------------------------------------------------------------------------------


def test_the_shipped_table_is_whole():
    for kind, kernels in tuning.shipped().items():
        assert set(kernels) == set(tuning.KERNELS)
        for kernel, classes in kernels.items():
            coded = {"few_codes", "fewest_codes"} if kernel in tuning.FORWARD else set()
            in_tf32 = {"tf32"} if kind == tuning.HOPPER else set()
            assert set(classes) - {"dozens"} == {*tuning.CLASSES, *coded, *in_tf32}
            assert "dozens" not in classes or kernel in tuning.FORWARD
            for entry in classes.values():
                tile = Tile(**entry)
                assert tuning.as_entry(tile) == entry
                assert all(n >= 16 and n & (n - 1) == 0 for n in (tile.rows, tile.cols, tile.depth))


@pytest.mark.parametrize(
    ("block", "name"), [(8, "few"), (16, "some"), (32, "some"), (64, "many"), (128, "many")]
)
def test_class_of(block, name):
    assert tuning.class_of(block) == name


def test_lookup():
    table = tuning.shipped()
    kind = "NVIDIA H100 80GB HBM3"
    of_h100 = tuning.lookup(table, kind, "down", 128, 2)
    assert of_h100 == Tile(**table[kind]["down"]["many"])
    assert tuning.lookup(table, "NVIDIA H200", "down", 128, 2) == of_h100
    for other in ("", "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300A"):
        small = tuning.lookup(table, other, "down", 8, 2)
        assert small == Tile(**table["AMD Instinct MI300X"]["down"]["few"])
    assert tuning.lookup(table, kind, "down", 128, 4).rows == 64
    # TF32 has entries for Hopper GPUs, whose shared memory they need, and runs that are not short.
    in_tf32 = tuning.lookup(table, kind, "down", 128, 4, tf32=True)
    assert in_tf32 == Tile(**table[kind]["down"]["tf32"])
    own = {"NVIDIA H200": {"down": {"many": {}}}}
    assert tuning.lookup(own, "NVIDIA H200", "down", 128, 4, tf32=True) == in_tf32
    for other, block in ((kind, 8), ("NVIDIA A100-SXM4-80GB", 128), ("AMD Instinct MI300X", 128)):
        assert tuning.lookup(table, other, "down", block, 4, tf32=True).rows == 64


def test_runs_of_dozens_of_rows_fit_one_tile():
    table = tuning.shipped()
    kind = "NVIDIA H200"
    for kernel in tuning.KERNELS:
        few, more = (tuning.lookup(table, kind, kernel, 8, 2, mean) for mean in (8, 32))
        assert more.rows > few.rows if kernel in tuning.FORWARD else more == few
        assert tuning.lookup(table, kind, kernel, 128, 2, 32) == tuning.lookup(table, kind, kernel, 128, 2)
        small = "AMD Instinct MI300X"
        assert tuning.lookup(table, small, kernel, 8, 2, 32) == tuning.lookup(table, small, kernel, 8, 2)


def test_the_mean_run_of_a_call():
    assert make_spec(block=8).mean_run(39 * 32, 32) == 32
    # Of 128 tokens with 8 experts of 32, as ``experts.saved_rows`` counts them.
    assert make_spec(block=8, saved_rows=2 * 128 * 8 + 32 * 8).mean_run(10**6, 32) == 32


def test_the_smallest_tiles_fit_everywhere():
    """Both operands of a step in 16 bits, as often as there are stages; gate_up has twice the columns."""
    for kernel, classes in tuning.shipped()[tuning.SMALLEST].items():
        for entry in classes.values():
            tile = Tile(**entry)
            cols = tile.cols * (2 if kernel == "gate_up" else 1)
            assert (tile.rows + cols) * tile.depth * 2 * tile.stages <= 65536


def test_a_table_of_ones_own(tmp_path, monkeypatch):
    own = {"devices": {"mine": tuning.shipped()["AMD Instinct MI300X"]}}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own))
    monkeypatch.setenv(settings.TUNING.name, str(path))
    assert set(tuning.table()) == {"mine", *tuning.shipped()}


@pytest.mark.parametrize("text", ["", "{}", '{"devices": {"mine": {}}}', None])
def test_a_table_that_cannot_be_read(tmp_path, monkeypatch, text):
    path = tmp_path / f"broken{hash(text)}.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(settings.TUNING.name, str(path))
    with pytest.raises(
        ConfigError, match="JAX_MORIEP_TUNING=.* must name a file that `jax-moriep tune` wrote"
    ):
        tuning.table()


def test_tune_and_bench_say_that_they_need_a_gpu(tmp_path, capsys):
    assert main(["tune", "--out", str(tmp_path / "table.json")]) == 1
    assert main(["bench", "kernels"]) == 1
    assert capsys.readouterr().err.count("platform='cpu' must be a GPU") == 2
    assert main(["tune", "--out", str(tmp_path / "no" / "table.json")]) == 1
    assert "must lie in an existing folder" in capsys.readouterr().err


# --- Which kernels ------------------------------------------------------------------------------------------


def make_call(**changes):
    """A spec, and shapes of rows and weights, that the Hopper kernels suit, but for what is changed."""
    given = {"block": 128, "weight_input": False, "dtype": "bfloat16", "biases": False, "hidden": 256}
    given |= {"scheme": None, "frozen": False, "capacity": 256, "precision": None} | changes
    hidden, weights = given["hidden"], given.get("weights", given["dtype"])
    w1, w2 = (2, 256, hidden), (2, hidden, 128)
    spec = make_spec(**{name: given[name] for name in ("weight_input", "block", "scheme", "precision")})
    scales = (None, None)
    if given["frozen"]:
        weights = schemes.code_dtype(given["scheme"], schemes.FORMATS[given.get("format", "e4m3fn")])
        shapes = schemes.scale_shapes(given["scheme"], 2, hidden, 128)
        scales = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    biases = (None, None)
    if given["biases"]:
        biases = tuple(jax.ShapeDtypeStruct(w[:2], given["dtype"]) for w in (w1, w2))
    arrays = (jax.ShapeDtypeStruct(w, weights) for w in (w1, w2))
    rows = jax.ShapeDtypeStruct((given["capacity"], hidden), given["dtype"])
    return spec, rows, ExpertWeights(*arrays, *biases, *scales)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"block": 64}, None),
        ({"block": 32}, None),
        ({"block": 16}, "block=16 must be a multiple of 8 and at least 32"),
        ({"block": 36}, "block=36 must be a multiple of 8 and at least 32"),
        ({"weight_input": True}, "inputs are weighted"),
        ({"dtype": "float32"}, None),
        ({"dtype": "float32", "precision": "high", "block": 32, "hidden": 208, "biases": True}, None),
        ({"dtype": "float32", "block": 40}, "block=40 must be a multiple of 32 and at least 32"),
        ({"dtype": "float32", "precision": "highest"}, "default_matmul_precision is 'highest'"),
        ({"dtype": "float32", "weights": "bfloat16"}, None),
        ({"weights": "float32"}, None),
        ({"biases": True}, None),
        ({"biases": True, "scheme": "fp8_block"}, "the experts have biases beside quantised weights"),
        ({"hidden": 208}, None),
        ({"hidden": 200}, "H=200 and I=128 must be multiples of 16"),
        ({"hidden": 192, "scheme": "fp8_block"}, "H=192 and I=128 must be multiples of 128"),
        ({"scheme": "fp8_block"}, None),
        ({"scheme": "fp8_token", "weights": "float32"}, None),
        ({"scheme": "fp8_block", "frozen": True}, None),
        ({"scheme": "int8_token"}, "codes are int8, and must be float8_e4m3fn"),
        ({"scheme": "fp8_block", "frozen": True, "format": "e4m3fnuz"}, "codes are float8_e4m3fnuz"),
        ({"scheme": "fp8_block", "block": 32}, "block=32 is no multiple of 128"),
        ({"scheme": "fp8_block", "dtype": "float32"}, "rows are float32"),
    ],
)
def test_what_the_hopper_kernels_are_suited_for(change, why):
    got = support.unsuited(*make_call(**change))
    assert got is None if why is None else why in got
    chosen = choice.of(*make_call(**change), differentiated=True)
    assert (chosen.mosaic, chosen.few, chosen.reason) == (why is None, False, got)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"block": 8}, None),
        ({"block": 64}, None),
        ({"block": 128}, "block=128 is none of 8, 16, 32 and 64"),
        ({"block": 4}, "block=4 is none of"),
        ({"block": 8, "frozen": False}, "those for few rows have quantised weights only"),
        ({"block": 8, "hidden": 192}, "must be multiples of 128"),
    ],
)
def test_what_the_hopper_kernels_for_few_rows_are_suited_for(change, why):
    call = make_call(**({"scheme": "fp8_block", "frozen": True} | change))
    got = support.unsuited_few(*call)
    assert got is None if why is None else why in got
    assert choice.of(*call, differentiated=False).few == (why is None)
    assert not choice.of(*call, differentiated=True).few


H100 = Place("gpu", "sm_90", 4)


def told(monkeypatch, place=H100, num_tokens=4096, dtype="bfloat16", **changes):
    """What a layer of 8 experts is told on a GPU that this machine has not."""
    monkeypatch.setattr(compat, "has_hopper_kernels", lambda: True)
    cfg = MoEConfig(8, 2, 256, 128, **changes)
    shape = None if num_tokens is None else ExchangeShape.of(cfg, place.num_ranks, num_tokens)
    return experts.describe("triton", place, cfg, shape, dtype)


def test_explanations_of_kernels_on_hopper(monkeypatch):
    by_triton = "products by Pallas-Triton; not by Pallas-Mosaic's kernels: "
    assert told(monkeypatch) == "products by Pallas-Mosaic"
    assert told(monkeypatch, num_tokens=8) == by_triton + "block=8 must be a multiple of 8 and at least 32"
    assert told(monkeypatch, dtype="float32") == "products by Pallas-Mosaic"
    with jax.default_matmul_precision("highest"):
        exact = told(monkeypatch, dtype="float32")
    assert exact.startswith(by_triton + "jax.default_matmul_precision is 'highest'")
    assert told(monkeypatch, expert_bias=True) == "products by Pallas-Mosaic"
    quantised = told(monkeypatch, expert_bias=True, expert_quant="fp8_block")
    assert quantised == by_triton + "the experts have biases beside quantised weights"
    assert told(monkeypatch, router="llama4").startswith(by_triton + "the experts' inputs are weighted")
    assert told(monkeypatch, router="llama4", expert_quant="fp8_block") == "products by Pallas-Mosaic"
    unknown = told(monkeypatch, num_tokens=None)
    assert unknown.startswith("products by Pallas-Mosaic if block is at least 32, else")
    unknown = told(monkeypatch, num_tokens=None, expert_quant="fp8_block")
    assert unknown.startswith("products by Pallas-Mosaic if block is a multiple of 128, else")
    assert told(monkeypatch, num_tokens=None, block=128) == "products by Pallas-Mosaic"


def test_explanations_of_kernels_for_few_quantised_rows(monkeypatch):
    lines = told(monkeypatch, num_tokens=8, expert_quant="fp8_block").splitlines()
    few = "of quantised weights, not differentiated: products by Pallas-Mosaic, in tiles for few rows"
    assert few in lines
    others = [line for line in lines if line != few]
    assert len(others) == 3
    assert all("Pallas-Triton" in line and "block=8 is no multiple of 128" in line for line in others)


@pytest.mark.parametrize("architecture", ["gfx942", "sm_80", "sm_100", ""])
def test_explanations_of_kernels_elsewhere(monkeypatch, architecture):
    text = told(monkeypatch, Place("gpu", architecture, 4))
    assert text.startswith("products by Pallas-Triton; not by Pallas-Mosaic's kernels: they are for Hopper")
    assert architecture in text


def test_explanations_of_kernels_without_a_layer(monkeypatch):
    """As jax-moriep doctor asks; and where jax has none of these kernels."""
    assert "they need jax 0.11" in experts.describe("triton", H100, None)
    monkeypatch.setattr(compat, "has_hopper_kernels", lambda: True)
    assert experts.describe("triton", H100, None).startswith("products by Pallas-Mosaic where it has kernels")
    assert experts.describe("triton", Place("cpu"), None) is None
    assert experts.describe("blocked", H100, None) is None
