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

from jax_moriep.experts.pallas.hopper import launch, products, stream
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
    ("sizes", "unclean"), [("uneven", "left"), ("uneven", "right"), ("none", "right"), ("all to one", "left")]
)
def test_weight_gradient(sizes, unclean):
    case = Case(sizes)
    left = case.rows(H, np.nan if unclean == "left" else 0)
    right = case.rows(INNER, np.nan if unclean == "right" else 0)
    starts, group_sizes = jnp.asarray(case.starts), jnp.asarray(case.sizes)
    out = products.weight_gradient(left, right, starts, group_sizes, unclean=unclean)
    for expert, at, _ in case.experts():
        assert_close(out[expert], f64(left[at]).T @ f64(right[at]))
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
