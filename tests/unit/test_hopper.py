"""The Hopper kernels, interpreted: warpgroups, barriers and copies as Pallas simulates them on a CPU."""

import experts_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep.experts import ExpertSpec, ExpertWeights
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.experts.spec import Stack
from jax_moriep.plan import run_starts

if jax.__version_info__ < (0, 11):
    pytest.skip(
        "Pallas-Mosaic has these kernels, and interprets them, from jax 0.11 on", allow_module_level=True
    )

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas import rowwise, table, tiles
from jax_moriep.experts.pallas.hopper import act_grad, launch, passes, products, stream, tf32
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.hopper.weight_gradient import weight_gradient

BLOCK, H, INNER = 128, 256, 128
SIZES = {
    "uneven": (130, 5, 0, 128),
    "none": (0, 0, 0, 0),
    "all to one": (0, 300, 0, 0),
    "odd": (1, 63, 65, 127),
}
# One product, rounded to bf16.
TOLERANCE = 3e-3


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Few programs, so that each has several tiles; their table without a kernel of Triton's."""
    monkeypatch.setattr(launch, "PROGRAMS", 2)
    monkeypatch.setattr(tiles, "table_of", table.formula)
    params = mg.InterpretGPUParams(detect_races=True)  # pyright: ignore[reportAttributeAccessIssue]
    with mg.force_gpu_interpret_mode(params):  # pyright: ignore[reportAttributeAccessIssue]
        yield


class Case:
    """Rows of four experts; what lies in no run is NaN."""

    def __init__(self, name, block=BLOCK):
        self.block = block
        self.sizes = np.array(SIZES[name], np.int32)
        aligned = -(-self.sizes // block) * block
        self.capacity = int(aligned.sum()) + block
        self.starts = np.asarray(run_starts(jnp.asarray(self.sizes), block))
        self.real = np.asarray(real_rows(jnp.asarray(self.sizes), block, self.capacity))
        self.tiles = row_tiles(jnp.asarray(self.sizes), block, self.capacity, ROWS)
        self.rng = np.random.default_rng(0)

    def rows(self, width, padding=np.nan, dtype=jnp.bfloat16):
        values = self.rng.normal(size=(self.capacity, width))
        if padding == "zeros in blocks":
            behind = np.arange(self.capacity)[:, None] >= self.experts_end()
            values = np.where(behind, np.nan, np.where(self.real[:, None], values, 0))
        else:
            values = np.where(self.real[:, None], values, padding)
        return jnp.asarray(values, dtype)

    def weights(self, *shape, dtype=jnp.bfloat16):
        return jnp.asarray(self.rng.normal(size=shape) * shape[-1] ** -0.5, dtype)

    def factors(self):
        return np.where(self.real, self.rng.uniform(0.5, 1, self.capacity), 0).astype(np.float32)

    def experts(self):
        """Number, rows and padding of each."""
        for expert, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            end = start + -(-size // self.block) * self.block
            yield expert, slice(start, start + size), slice(start + size, end)

    def experts_end(self):
        """The end of the last run's blocks."""
        return max(padding.stop for _, _, padding in self.experts())


def assert_close(got, want):
    error = np.linalg.norm(np.asarray(got, np.float64) - want)
    assert error <= TOLERANCE * np.linalg.norm(want)


def f64(array):
    return np.asarray(array, np.float64)


def no_races():
    return not gpu_callbacks.get_races().races_found


# Sizes that no tile divides; by 32 and by 16 alone, that the matrix unit reads in narrower rows.
@pytest.mark.parametrize(
    ("sizes", "by_column", "block", "depth", "cols"),
    [
        ("uneven", False, 128, H, INNER),
        ("uneven", True, 128, H, INNER),
        ("none", False, 128, H, INNER),
        ("odd", False, 128, H, 192),
        ("odd", True, 64, 192, 320),
        ("odd", False, 32, 208, 272),
        ("odd", True, 16, 160, 144),
    ],
)
def test_product(sizes, by_column, block, depth, cols):
    case = Case(sizes, block)
    rows, weights = case.rows(depth), case.weights(4, *((depth, cols) if by_column else (cols, depth)))
    out = products.product(rows, weights, case.tiles, by_column=by_column)
    for expert, at, _ in case.experts():
        w = f64(weights[expert])
        assert_close(out[at], f64(rows[at]) @ (w if by_column else w.T))
    assert no_races()


@pytest.mark.parametrize(("block", "cols"), [(128, 128), (64, 320), (16, 208)])
def test_product_with_a_bias(block, cols):
    """Padding of runs is zeros: it has factors of 0, and rows that are zeros."""
    case = Case("odd", block)
    rows, weights, bias = (
        case.rows(INNER, "zeros in blocks"),
        case.weights(4, cols, INNER),
        case.weights(4, cols),
    )
    factors = case.factors()
    out = products.product(rows, weights, case.tiles, by_column=False, bias=(jnp.asarray(factors), bias))
    for expert, at, padding in case.experts():
        assert_close(out[at], f64(rows[at]) @ f64(weights[expert]).T + factors[at, None] * f64(bias[expert]))
        assert not f64(out[padding]).any()
    assert no_races()


@pytest.mark.parametrize(
    ("sizes", "saved_rows", "block", "hidden", "inner", "biased"),
    [
        ("uneven", 0, 128, H, INNER, False),
        ("uneven", 128, 128, H, INNER, False),
        ("odd", None, 64, 192, 192, True),
        ("odd", 128, 32, 208, 176, False),
        ("odd", None, 16, 64, 320, True),
    ],
)
def test_gate_up(sizes, saved_rows, block, hidden, inner, biased):
    case = Case(sizes, block)
    rows, w1, factors = case.rows(hidden), case.weights(4, 2 * inner, hidden), case.factors()
    bias = case.weights(4, 2 * inner) if biased else None
    saved_rows = case.capacity if saved_rows is None else saved_rows
    spec = ExpertSpec("silu", 7.0, 1.702, False, block)
    act, *saved = products.gate_up(
        rows, w1, jnp.asarray(factors), case.tiles, spec, saved_rows=saved_rows, act=True, bias=bias
    )
    assert len(saved) == (saved_rows > 0)
    for expert, at, _ in case.experts():
        pre = f64(rows[at]) @ f64(w1[expert]).T + (f64(bias[expert]) if biased else 0)
        gate, up = np.split(pre, 2, axis=1)
        assert_close(act[at], gate / (1 + np.exp(-gate)) * up * factors[at, None])
        if saved:
            last = min(at.stop, saved_rows)
            assert_close(saved[0][at.start : last], pre[: max(0, last - at.start)])
    assert no_races()


@pytest.mark.parametrize(
    ("sizes", "unclean", "block", "tall", "cols", "dtype"),
    [
        ("uneven", "left", 128, H, INNER, "bfloat16"),
        ("uneven", "right", 128, H, INNER, "float32"),
        ("none", "right", 128, H, INNER, "bfloat16"),
        ("all to one", "left", 128, H, INNER, "float32"),
        ("odd", "left", 64, 192, 192, "bfloat16"),
        ("odd", "right", 64, 208, 192, "bfloat16"),
        ("odd", "right", 16, 208, 272, "bfloat16"),
        ("odd", "left", 32, 160, 320, "float32"),
    ],
)
def test_weight_gradient(sizes, unclean, block, tall, cols, dtype):
    case = Case(sizes, block)
    clean = "zeros in blocks"
    left = case.rows(tall, np.nan if unclean == "left" else clean)
    right = case.rows(cols, np.nan if unclean == "right" else clean)
    starts, group_sizes = jnp.asarray(case.starts), jnp.asarray(case.sizes)
    out = weight_gradient(left, right, starts, group_sizes, block, dtype, unclean=unclean)
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
    case, spec = Case("uneven"), ExpertSpec("silu", 7.0, 1.702, False, BLOCK)
    d_out, w2, pre = case.rows(H), case.weights(4, H, inner), case.rows(2 * inner)
    factors = case.factors()
    pres, saved_rows = (pre,), case.capacity
    if kept == "some":
        # Each row is in one of them.
        saved_rows = ROWS
        behind = jnp.where(jnp.arange(case.capacity)[:, None] < saved_rows, jnp.nan, pre)
        pres = (pre[:saved_rows], behind)
    act, d_pre, shares = act_grad.activation_gradient(
        d_out, w2, pres, jnp.asarray(factors), case.tiles, spec, saved_rows=saved_rows
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


def by_xla(monkeypatch, module, name):
    """Interprets a Triton kernel as such, and not as one of Mosaic's."""
    real = getattr(module, name)

    def run(*args, interpret, **kwargs):
        with mg.force_gpu_interpret_mode(None):  # pyright: ignore[reportAttributeAccessIssue]
            return real(*args, interpret=not interpret, **kwargs)

    monkeypatch.setattr(module, name, run)


@pytest.mark.parametrize(
    ("dtype", "trained", "block", "sizes", "width", "layer", "tolerance"),
    [
        # Activations, and what is derived from them, are rounded to bf16 on the way.
        ("bfloat16", "bfloat16", 128, "odd", 48, None, 1e-2),
        ("bfloat16", "float32", 32, "odd", 48, 1, 1e-2),
        # The derivative of the activation is in the product before it, and the weights are cast.
        ("bfloat16", "float32", 128, "odd", 128, 1, 1e-2),
        # The interpreter multiplies f32 exactly.
        ("float32", "float32", 128, "uneven", 48, None, 1e-5),
        ("float32", "float32", 32, "odd", 48, 1, 1e-5),
        ("float32", "float32", 96, "odd", 48, None, 1e-5),
        ("float32", "float32", 128, "none", 48, None, 1e-5),
    ],
)
def test_both_passes(dtype, trained, block, sizes, width, layer, tolerance, monkeypatch):
    """Values and all gradients of experts with biases; pre-activations of some rows are computed again."""
    for name in ("activation_gradient", "zeroed_behind"):
        by_xla(monkeypatch, rowwise, name)
    for name in ("row_sums", "rows_times_bias"):
        by_xla(monkeypatch, passes, name)
    case, hidden, inner = Case(sizes, block), max(64, width), width
    dtype, trained = jnp.dtype(dtype), jnp.dtype(trained)
    spec = ExpertSpec("silu", 7.0, 1.702, False, block)
    rows, d_out = (case.rows(hidden, dtype=dtype) for _ in range(2))
    weights = jnp.asarray(np.where(case.real, case.factors(), np.nan), jnp.float32)
    shapes = ((2 * inner, hidden), (hidden, inner), (2 * inner,), (hidden,))
    params = [case.weights(4, *shape, dtype=trained) for shape in shapes]
    experts = ExpertWeights(*params)
    if layer is not None:
        stack = jax.tree.map(lambda w: jnp.full((layer + 2, *w.shape), np.nan).at[layer].set(w), experts)
        experts = Stack(stack, jnp.int32(layer)).joined()
    operands = (rows, weights, jnp.asarray(case.sizes), experts)
    saved_rows = min(ROWS, case.capacity)
    out, saved = passes.forward(spec, saved_rows, operands)
    gradients = passes.backward(spec, saved_rows, d_out, saved, operands)
    real = [np.where(case.real.reshape(-1, *[1] * (a.ndim - 1)), f64(a), 0) for a in (rows, weights, d_out)]
    wanted = experts_oracle.experts(
        *real[:2], case.sizes, params, real[2],
        activation=spec.activation, weight_input=False, block=block,
    )  # fmt: skip
    for got, want in zip((out, *gradients), wanted, strict=True):
        assert np.linalg.norm(f64(got) - want) <= tolerance * np.linalg.norm(want)
    assert out.dtype == dtype
    assert all(g.dtype == trained for g in gradients[2:])
    assert no_races()


@pytest.mark.parametrize(("sizes", "tall", "cols"), [("odd", 208, 272), ("all to one", 128, 320)])
def test_weight_gradient_of_f32(sizes, tall, cols):
    """Of operands that lie along the sums, which the caller makes of rows with anything in padding."""
    case = Case(sizes, 32)
    left, right = (case.rows(width, dtype=jnp.float32) for width in (tall, cols))
    turned = (tf32.along_sums(case.real, x) for x in (left, right))
    out = tf32.weight_gradient(*turned, jnp.asarray(case.starts), jnp.asarray(case.sizes))
    for expert, at, _ in case.experts():
        assert_close(out[expert], f64(left[at]).T @ f64(right[at]))
    assert no_races()


def test_any_number_of_places(monkeypatch):
    """The stream goes on from tile to tile, though a tile's four steps are no multiple of the places."""
    monkeypatch.setattr(stream, "PLACES", 3)
    test_product("uneven", False, BLOCK, H, INNER)


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
