"""The Hopper kernels, interpreted: warpgroups, barriers and copies as Pallas simulates them on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep.experts import ExpertSpec
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.plan import run_starts

if jax.__version_info__ < (0, 11):
    pytest.skip(
        "Pallas-Mosaic has these kernels, and interprets them, from jax 0.11 on", allow_module_level=True
    )

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas.hopper import act_grad, launch, products, stream
from jax_moriep.experts.pallas.hopper.support import ROWS

BLOCK, H, INNER = 128, 256, 128
SPEC = ExpertSpec("silu", 7.0, 1.702, False, BLOCK)
SIZES = {"uneven": (130, 5, 0, 128), "none": (0, 0, 0, 0), "all to one": (0, 300, 0, 0)}
# One product, rounded to bf16.
TOLERANCE = 3e-3


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Few programs, so that each has several tiles."""
    monkeypatch.setattr(launch, "PROGRAMS", 2)
    params = mg.InterpretGPUParams(detect_races=True)  # pyright: ignore[reportAttributeAccessIssue]
    with mg.force_gpu_interpret_mode(params):  # pyright: ignore[reportAttributeAccessIssue]
        yield


class Case:
    """Rows of four experts; what lies in no run is NaN."""

    def __init__(self, name):
        self.sizes = np.array(SIZES[name], np.int32)
        aligned = -(-self.sizes // BLOCK) * BLOCK
        self.capacity = int(aligned.sum()) + BLOCK
        self.starts = np.asarray(run_starts(jnp.asarray(self.sizes), BLOCK))
        self.real = np.asarray(real_rows(jnp.asarray(self.sizes), BLOCK, self.capacity))
        self.tiles = row_tiles(jnp.asarray(self.sizes), BLOCK, self.capacity, ROWS)
        self.rng = np.random.default_rng(0)

    def rows(self, width, padding=np.nan):
        values = self.rng.normal(size=(self.capacity, width))
        return jnp.asarray(np.where(self.real[:, None], values, padding), jnp.bfloat16)

    def weights(self, *shape):
        return jnp.asarray(self.rng.normal(size=shape) * shape[-1] ** -0.5, jnp.bfloat16)

    def experts(self):
        """Number, rows and padding of each."""
        for expert, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            yield expert, slice(start, start + size), slice(start + size, start + -(-size // BLOCK) * BLOCK)


def assert_close(got, want):
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    assert error <= TOLERANCE * np.linalg.norm(want)


def f64(array):
    return np.asarray(array, np.float64)


def no_races():
    return not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(("sizes", "by_column"), [("uneven", False), ("uneven", True), ("none", False)])
def test_product(sizes, by_column):
    case = Case(sizes)
    rows, weights = case.rows(H), case.weights(4, *((H, INNER) if by_column else (INNER, H)))
    out = products.product(rows, weights, case.tiles, by_column=by_column)
    for expert, at, _ in case.experts():
        w = f64(weights[expert])
        assert_close(out[at], f64(rows[at]) @ (w if by_column else w.T))
    assert no_races()


@pytest.mark.parametrize("saved_rows", [0, 128])
def test_gate_up(saved_rows):
    case = Case("uneven")
    rows, w1 = case.rows(H), case.weights(4, 2 * INNER, H)
    factors = np.where(case.real, case.rng.uniform(0.5, 1, case.capacity), 0).astype(np.float32)
    act, *saved = products.gate_up(
        rows, w1, jnp.asarray(factors), case.tiles, SPEC, saved_rows=saved_rows, act=True
    )
    assert len(saved) == (saved_rows > 0)
    for expert, at, padding in case.experts():
        pre = f64(rows[at]) @ f64(w1[expert]).T
        gate, up = np.split(pre, 2, axis=1)
        assert_close(act[at], gate / (1 + np.exp(-gate)) * up * factors[at, None])
        assert not f64(act[padding]).any()
        if saved:
            last = min(at.stop, saved_rows)
            assert_close(saved[0][at.start : last], pre[: max(0, last - at.start)])
    assert no_races()


@pytest.mark.parametrize(
    ("sizes", "unclean", "dtype"),
    [
        ("uneven", "left", "bfloat16"),
        ("uneven", "right", "float32"),
        ("none", "right", "bfloat16"),
        ("all to one", "left", "float32"),
    ],
)
def test_weight_gradient(sizes, unclean, dtype):
    case = Case(sizes)
    left = case.rows(H, np.nan if unclean == "left" else 0)
    right = case.rows(INNER, np.nan if unclean == "right" else 0)
    starts, group_sizes = jnp.asarray(case.starts), jnp.asarray(case.sizes)
    out = products.weight_gradient(left, right, starts, group_sizes, dtype, unclean=unclean)
    assert out.dtype == dtype
    for expert, at, _ in case.experts():
        want = f64(left[at]).T @ f64(right[at])
        assert_close(out[expert], want)
        if dtype == "float32":
            assert np.linalg.norm(f64(out[expert]) - want) <= 1e-6 * np.linalg.norm(want)
    assert no_races()


@pytest.mark.parametrize("kept", ["all", "some"])
@pytest.mark.parametrize("inner", [128, 256])
def test_activation_gradient(inner, kept):
    case = Case("uneven")
    d_out, w2, pre = case.rows(H), case.weights(4, H, inner), case.rows(2 * inner)
    factors = np.where(case.real, case.rng.uniform(0.5, 1, case.capacity), 0).astype(np.float32)
    pres, saved_rows = (pre,), case.capacity
    if kept == "some":
        # Each row is in one of them.
        saved_rows = ROWS
        behind = jnp.where(jnp.arange(case.capacity)[:, None] < saved_rows, jnp.nan, pre)
        pres = (pre[:saved_rows], behind)
    act, d_pre, shares = act_grad.activation_gradient(
        d_out, w2, pres, jnp.asarray(factors), case.tiles, SPEC, saved_rows=saved_rows
    )
    shares = f64(shares).sum(axis=0)
    for expert, at, padding in case.experts():
        d = f64(d_out[at]) @ f64(w2[expert])
        gate, up = np.split(f64(pre[at]), 2, axis=1)
        sigmoid, factor = 1 / (1 + np.exp(-gate)), f64(factors)[at, None]
        value = gate * sigmoid * up
        assert_close(act[at], value * factor)
        by_gate = sigmoid * (1 + gate * (1 - sigmoid)) * up
        assert_close(d_pre[at], np.concatenate([d * by_gate, d * gate * sigmoid], axis=1) * factor)
        assert_close(shares[at], (d * value).sum(axis=1))
        assert not f64(act[padding]).any()
        assert not f64(d_pre[padding]).any()
        assert not shares[padding].any()
    assert no_races()


def test_any_number_of_places(monkeypatch):
    """The stream goes on from tile to tile, though a tile's four steps are no multiple of the places."""
    monkeypatch.setattr(stream, "PLACES", 3)
    test_product("uneven", False)


def test_a_missing_wait_is_an_error(monkeypatch):
    """The interpreter sees when the copier does not wait until a block has been read."""
    case = Case("uneven")
    real, seen = mg.barrier_wait, []

    def second_on(barrier, *args, **kwargs):
        seen.append(barrier)
        if len(seen) > 1:
            real(barrier, *args, **kwargs)

    monkeypatch.setattr(stream, "PLACES", 2)
    monkeypatch.setattr(mg, "barrier_wait", second_on)
    with pytest.raises(jax.errors.JaxRuntimeError, match="barrier|RACE DETECTED"):
        products.product(case.rows(H), case.weights(4, INNER, H), case.tiles, by_column=False)
    gpu_callbacks.reset_gpu_interpret_mode_state()
