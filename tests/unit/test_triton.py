"""The Triton experts beyond what every implementation must do: tiles, tuning, repeatable bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experts import SIZES, TOLERANCE, check, make_case, make_spec, with_gradients

from jax_moriep.cli import main
from jax_moriep.errors import ConfigError
from jax_moriep.experts.triton import hopper, mlp, tuning
from jax_moriep.experts.triton.launch import Tile
from jax_moriep.experts.triton.tiles import position, real_rows, row_tiles
from jax_moriep.runtime import settings


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
    got = np.asarray(real_rows(jnp.asarray(sizes), block, capacity))
    starts = np.cumsum(aligned) - aligned
    row = np.arange(capacity)
    np.testing.assert_array_equal(
        got, [any(s <= r < s + n for s, n in zip(starts, sizes, strict=True)) for r in row]
    )


@pytest.mark.parametrize("col_tiles", [1, 3])
@pytest.mark.parametrize("first_row", [0, 100])
def test_every_tile_has_one_turn(first_row, col_tiles):
    sizes = jnp.array([13, 0, 70, 1, 0, 200, 0], jnp.int32)
    tiles = row_tiles(sizes, 8, 400, 16, first_row, group=4)
    used, _, first_tile = (int(n) for n in tiles.table[:3, -1])
    turns = range((used - first_tile) * col_tiles)
    seen = [tuple(map(int, position(tiles.table, jnp.int32(t), first_tile, col_tiles))) for t in turns]
    assert set(seen) == {(row, col) for row in range(first_tile, used) for col in range(col_tiles)}
    assert len(seen) == len(turns)


# --- Tuning -------------------------------------------------------------------------------------------------


def test_the_shipped_table_is_whole():
    for kernels in tuning.shipped().values():
        assert set(kernels) == set(tuning.KERNELS)
        for kernel, classes in kernels.items():
            coded = {"few_codes", "fewest_codes"} if kernel in tuning.FORWARD else set()
            assert set(classes) == {*tuning.CLASSES, *coded}
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


@pytest.mark.parametrize(
    ("change", "covered"),
    [
        ({}, True),
        ({"block": 64}, False),
        ({"weight_input": True}, False),
        ({"dtype": "float32"}, False),
        ({"weights": "float32"}, False),
        ({"biases": True}, False),
        ({"hidden": 192}, False),
    ],
)
def test_what_the_hopper_kernels_cover(change, covered):
    given = {
        "block": 128,
        "weight_input": False,
        "dtype": "bfloat16",
        "biases": False,
        "hidden": 256,
    } | change
    weights = given.get("weights", given["dtype"])
    rows = jax.ShapeDtypeStruct((256, given["hidden"]), given["dtype"])
    w1 = jax.ShapeDtypeStruct((2, 256, given["hidden"]), weights)
    w2 = jax.ShapeDtypeStruct((2, given["hidden"], 128), weights)
    spec = make_spec(weight_input=given["weight_input"], block=given["block"])
    assert hopper.covers(spec, rows, w1, w2, given["biases"]) == covered
