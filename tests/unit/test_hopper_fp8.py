"""The quantised Hopper kernels and both passes by them, interpreted: see ``test_hopper``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import schemes_oracle as oracle
from jax.sharding import PartitionSpec as P

from jax_moriep import experts, schemes
from jax_moriep.config import MoEConfig
from jax_moriep.experts import ExpertSpec, ExpertWeights, pallas
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.plan import run_starts
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place
from jax_moriep.schemes import Quantised

if jax.__version_info__ < (0, 11):
    pytest.skip(
        "Pallas-Mosaic has these kernels, and interprets them, from jax 0.11 on", allow_module_level=True
    )

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as mg

from jax_moriep.experts.pallas import quantise
from jax_moriep.experts.pallas.hopper import few, fp8, launch, quantised
from jax_moriep.experts.pallas.hopper.support import FEW_ROWS, ROWS, unsuited, unsuited_few

BLOCK, H, INNER, L = 128, 256, 128, 4
F8 = jnp.float8_e4m3fn
SIZES = np.array([130, 5, 0, 128], np.int32)
STARTS = np.asarray(run_starts(jnp.asarray(SIZES), BLOCK))
CAPACITY = 640
REAL = np.asarray(real_rows(jnp.asarray(SIZES), BLOCK, CAPACITY))
TILES = row_tiles(jnp.asarray(SIZES), BLOCK, CAPACITY, ROWS)
SPEC = ExpertSpec("silu", 7.0, 1.702, False, BLOCK)
# One product of exact codes, rounded to bf16.
TOLERANCE = 3e-3


@pytest.fixture
def races(monkeypatch):
    """Few programs, so that each has several tiles. The Triton passes beside them are interpreted as ever."""
    params = mg.InterpretGPUParams(detect_races=True)  # pyright: ignore[reportAttributeAccessIssue]
    call = launch.call

    def interpreted(*args):
        with mg.force_gpu_interpret_mode(params):  # pyright: ignore[reportAttributeAccessIssue]
            return call(*args)

    monkeypatch.setattr(launch, "PROGRAMS", 2)
    monkeypatch.setattr(launch, "call", interpreted)
    yield
    assert not gpu_callbacks.get_races().races_found


def drawn(seed):
    return np.random.default_rng(seed)


def codes(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), F8)


def scales(rng, *shape):
    return jnp.asarray(2.0 ** rng.integers(-3, 3, size=shape), jnp.float32)


def f64(array):
    return np.asarray(array).astype(np.float64)


def of_rows(coded, scale):
    """[n, D] of codes and scales [D/128, n]."""
    return f64(coded) * np.repeat(f64(scale).T, 128, 1)


def of_weights(coded, scale, rows=True):
    if scale.ndim == 1:
        return f64(coded) * f64(scale)[:, None]
    return f64(coded) * np.repeat(np.repeat(f64(scale), 128, 0), 128, 1)


def assert_close(got, want, tolerance=TOLERANCE):
    assert np.linalg.norm(f64(got) - want) <= tolerance * np.linalg.norm(want)


def runs():
    for expert, (start, size) in enumerate(zip(STARTS, SIZES, strict=True)):
        if size:
            yield expert, slice(start, start + size), slice(start + size, start + -(-size // BLOCK) * BLOCK)


@pytest.mark.parametrize("by_block", [True, False])
def test_product(races, by_block):
    rng = drawn(0)
    rows, of = codes(rng, CAPACITY, INNER), scales(rng, INNER // 128, CAPACITY)
    w = codes(rng, L, H, INNER)
    w_scale = scales(rng, L, *((H // 128, INNER // 128) if by_block else (H,)))
    out = fp8.product(Quantised(rows, of), Quantised(w, w_scale), TILES, jnp.bfloat16)
    for expert, at, _ in runs():
        assert_close(out[at], of_rows(rows[at], of[:, at]) @ of_weights(w[expert], w_scale[expert]).T)


@pytest.mark.parametrize(("by_block", "saved_rows"), [(True, 0), (True, 128), (False, CAPACITY)])
def test_gate_up(races, by_block, saved_rows):
    rng = drawn(1)
    rows = codes(rng, CAPACITY, H)
    of = scales(rng, H // 128 if by_block else 1, CAPACITY)
    w = codes(rng, L, 2 * INNER, H)
    w_scale = scales(rng, L, *((2 * INNER // 128, H // 128) if by_block else (2 * INNER,))) / 16
    factors = jnp.asarray(np.where(REAL, rng.uniform(0.5, 1, CAPACITY), 0), jnp.float32)
    operands = (Quantised(rows, of), Quantised(w, w_scale), factors, TILES, SPEC)
    act, act_scales, *kept = fp8.gate_up(*operands, saved_rows=saved_rows, dtype=jnp.bfloat16)
    assert len(kept) == (saved_rows > 0)
    spread = of if by_block else jnp.repeat(of, H // 128, 0)
    for expert, at, padding in runs():
        pre = of_rows(rows[at], spread[:, at]) @ of_weights(w[expert], w_scale[expert]).T
        gate, up = np.split(pre, 2, axis=1)
        h = gate / (1 + np.exp(-gate)) * up
        want = oracle.rounded_columns(h, 128, "e4m3fn") * f64(factors)[at, None]
        assert_close(of_rows(act[at], act_scales[:, at]), want)
        assert not f64(act[padding]).any()
        assert not f64(act_scales[:, padding]).any()
        if kept:
            last = min(at.stop, saved_rows)
            assert_close(kept[0][at.start : last], pre[: max(0, last - at.start)])


FEW_BLOCK = 8
FEW_SIZES = np.array([70, 5, 0, 33], np.int32)
FEW_STARTS = np.asarray(run_starts(jnp.asarray(FEW_SIZES), FEW_BLOCK))
FEW_CAPACITY = 120


def few_tiles():
    return row_tiles(jnp.asarray(FEW_SIZES), FEW_BLOCK, FEW_CAPACITY, FEW_ROWS)


def in_tiles(values):
    """Of each tile its rows' values: [n, C] to [n, tiles * ROWS]; what lies behind row C is NaN."""
    tiles = few_tiles()
    first = np.asarray(tiles.table)[1, : tiles.max_tiles]
    padded = np.pad(np.asarray(values), ((0, 0), (0, FEW_CAPACITY)), constant_values=np.nan)
    return np.concatenate([padded[:, start : start + FEW_ROWS] for start in first], axis=1)


def few_runs():
    for expert, (start, size) in enumerate(zip(FEW_STARTS, FEW_SIZES, strict=True)):
        yield expert, slice(start, start + size)


def test_product_of_few_rows(races):
    """An odd number of groups of columns. Tiles reach into the next run, and behind the last row."""
    rng = drawn(5)
    rows, of = codes(rng, FEW_CAPACITY, INNER), scales(rng, INNER // 128, FEW_CAPACITY)
    w, w_scale = codes(rng, L, 128, INNER), scales(rng, L, 1, INNER // 128)
    in_place = Quantised(rows, jnp.asarray(in_tiles(of)))
    out = few.product(in_place, Quantised(w, w_scale), few_tiles(), jnp.bfloat16)
    for expert, at in few_runs():
        assert_close(out[at], of_rows(rows[at], of[:, at]) @ of_weights(w[expert], w_scale[expert]).T)


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_token"])
def test_forward_of_few_rows(races, scheme):
    """Both kernels, the product with an even number of groups, and NaN in padding."""
    rng = drawn(7)
    real = np.zeros(FEW_CAPACITY, bool)
    for _, at in few_runs():
        real[at] = True
    x = f64(jnp.asarray(rng.normal(size=(FEW_CAPACITY, H)), jnp.bfloat16))
    q = np.abs(f64(jnp.asarray(rng.normal(size=FEW_CAPACITY), jnp.float32)))
    q1, q2 = (
        schemes.quantise_weights(
            jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, jnp.float32),
            scheme,
            jnp.dtype(F8),
            parts=p,
        )
        for shape, p in (((L, 2 * INNER, H), 2), ((L, H, INNER), 1))
    )
    given = ExpertWeights(q1.codes, q2.codes, None, None, q1.scales, q2.scales)
    v1, v2 = (f64(schemes.dequantise_weights(*w, scheme, parts=p)) for w, p in ((q1, 2), (q2, 1)))
    spec = ExpertSpec("silu", 7.0, 1.702, False, FEW_BLOCK, None, scheme)
    rows = jnp.asarray(np.where(real[:, None], x, np.nan), jnp.bfloat16)
    factors = jnp.asarray(np.where(real, q, np.nan), jnp.float32)
    assert unsuited_few(spec, rows, given) is None
    (out,) = quantised.few_rows(spec, True, (rows, factors, jnp.asarray(FEW_SIZES), given))
    none = (np.zeros((L, 2 * INNER)), np.zeros((L, H)))
    nothing = np.zeros((FEW_CAPACITY, H))
    want = oracle.experts(
        silu, x, q, FEW_SIZES, FEW_STARTS, v1, v2, none, nothing, scheme, "e4m3fn", frozen=True
    )[0]
    assert not f64(out)[~real].any()
    assert_close(out, want)


@pytest.mark.parametrize("transposed", [False, True])
def test_quantised_weights(transposed):
    w = drawn(2).normal(size=(2, 256, 384)).astype(np.float32)
    w[0, :128, :128] = 0
    w[1, 200, 300] = np.inf
    got, scale, *turned = quantise.weights(jnp.asarray(w), F8, transposed=transposed, interpret=True)
    want, want_scale = oracle.weights(w.astype(np.float64), "fp8_block", "e4m3fn", 1)
    assert len(turned) == transposed
    for codes_of_transposed in turned:
        np.testing.assert_array_equal(f64(codes_of_transposed), f64(jnp.swapaxes(got, 1, 2)))
    np.testing.assert_array_equal(f64(scale), want_scale)
    for expert in range(2):
        np.testing.assert_array_equal(of_weights(got[expert], scale[expert]), want[expert])


@pytest.mark.parametrize("dtype", ["e4m3fn", "e4m3fnuz", "int8"])
def test_what_codes_leave_in_a_kernel(dtype):
    """Also of ties, of subnormal codes and of groups that have none."""
    x = drawn(3).normal(size=(64, 128)) * 2.0 ** drawn(4).integers(-14, 14, size=(64, 128))
    x[0], x[1, 5], x[2] = 0, np.nan, x[2] * 2.0**-120
    x[3] = np.arange(128) / 64
    x = x.astype(np.float32)
    code = {"e4m3fn": F8, "e4m3fnuz": jnp.float8_e4m3fnuz, "int8": jnp.int8}[dtype]
    got, scale = quantise.coded_groups(jnp.asarray(x), code)
    want = oracle.rounded_columns(x.astype(np.float64), 128, dtype)
    np.testing.assert_allclose(f64(got) * f64(scale), want, rtol=3e-7 if dtype == "int8" else 0)


def silu(gate, up):
    s = 1 / (1 + np.exp(-gate))
    return gate * s * up, (s + gate * s * (1 - s)) * up, gate * s


@pytest.mark.parametrize(
    ("scheme", "frozen", "saved_rows"),
    [("fp8_block", False, CAPACITY), ("fp8_block", True, 128), ("fp8_token", False, CAPACITY)],
)
def test_both_passes(races, scheme, frozen, saved_rows):
    rng = drawn(5)

    def rows(*shape):
        values = np.asarray(jnp.asarray(rng.normal(size=(CAPACITY, *shape)), jnp.bfloat16))
        return np.where(REAL.reshape(-1, *[1] * len(shape)), values.astype(np.float64), np.nan)

    x, q, d_out = rows(H), np.abs(rows()), rows(H)
    w1, w2 = (
        jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, jnp.bfloat16)
        for shape in ((L, 2 * INNER, H), (L, H, INNER))
    )
    given = ExpertWeights(w1, w2)
    v1, v2 = f64(w1), f64(w2)
    if frozen:
        q1, q2 = (schemes.quantise_weights(w, scheme, jnp.dtype(F8), parts=p) for w, p in ((w1, 2), (w2, 1)))
        given = ExpertWeights(q1.codes, q2.codes, None, None, q1.scales, q2.scales)
        v1, v2 = (f64(schemes.dequantise_weights(*q, scheme, parts=p)) for q, p in ((q1, 2), (q2, 1)))
    spec = ExpertSpec("silu", 7.0, 1.702, False, BLOCK, saved_rows, scheme)
    low = [jnp.asarray(a, jnp.bfloat16) for a in (x, d_out)]
    operands = (low[0], jnp.asarray(q, jnp.float32), jnp.asarray(SIZES), given)
    assert unsuited(spec, low[0], given) is None
    out, saved, *kept = quantised.forward(spec, saved_rows, True, operands)
    assert tuple((x.shape, x.dtype) for x in kept) == quantised.kept(spec, given, L)
    assert bool(kept) == (scheme == "fp8_block" and not frozen)
    got = (out, *quantised.backward(spec, saved_rows, True, low[1], saved, operands, *kept))
    clean = [np.nan_to_num(a) for a in (x, q, d_out)]
    none = (np.zeros((L, 2 * INNER)), np.zeros((L, H)))
    want = oracle.experts(
        silu, clean[0], clean[1], SIZES, STARTS, v1, v2, none, clean[2], scheme, "e4m3fn", frozen=frozen
    )
    for i, (a, b) in enumerate(zip(got, want, strict=False)):
        if i < 3:
            assert not f64(a)[~REAL].any()
        # Of bf16 on the way, a code that lies near a border may come out as its neighbour; so the gradient of
        # a row's weight, a sum of 128 products with such codes, is the least exact.
        assert_close(a, b, 4e-2 if i == 2 else 2.5e-2)


def test_a_program_for_another_platform(monkeypatch):
    """It takes and gives what the Hopper pass keeps for itself, of the same varying axes."""
    rng = drawn(6)
    spec = ExpertSpec("silu", 7.0, 1.702, False, BLOCK, None, "fp8_block")
    rows = jnp.asarray(np.where(REAL[:, None], rng.normal(size=(CAPACITY, H)), 0), jnp.bfloat16)
    weights = ExpertWeights(
        *(
            jnp.asarray(rng.normal(size=s) * s[-1] ** -0.5, jnp.bfloat16)
            for s in ((L, 2 * INNER, H), (L, H, INNER))
        )
    )

    def gradients(rows, sizes, weights):
        def loss(rows, weights):
            factors = jnp.ones(CAPACITY, jnp.float32)
            return jnp.sum(pallas.expert_mlp(rows, factors, sizes, weights, spec).astype(jnp.float32))

        return jax.grad(loss, (0, 1))(rows, weights)

    operands = (rows, jnp.asarray(SIZES), weights)
    want = jax.jit(gradients)(*operands)
    monkeypatch.setattr(compat, "has_hopper_kernels", lambda: True)
    jax.clear_caches()
    for got, other in zip(*map(jax.tree.leaves, (jax.jit(gradients)(*operands), want)), strict=True):
        np.testing.assert_array_equal(f64(got), f64(other))
    mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    assert "moriep_quantise_weights" in str(jax.jit(sharded).trace(*operands).jaxpr)


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("block", [8, 128])
@pytest.mark.parametrize("scheme", [None, "fp8_block"])
def test_what_is_told_is_what_is_traced(monkeypatch, scheme, block, differentiated):
    """A program traced as on a Hopper GPU has the kernels that explain names."""
    monkeypatch.setattr(compat, "has_hopper_kernels", lambda: True)
    cfg = MoEConfig(L, 2, H, INNER, block=block, expert_quant=scheme)
    text = experts.describe("triton", Place("gpu", "sm_90"), cfg)
    S = jax.ShapeDtypeStruct
    weights = ExpertWeights(S((L, 2 * INNER, H), jnp.bfloat16), S((L, H, INNER), jnp.bfloat16))
    if scheme is not None:
        scaled = zip(("w1_scale", "w2_scale"), schemes.scale_shapes(scheme, L, H, INNER), strict=True)
        codes = (S(w.shape, F8) for w in weights[:2])
        weights = ExpertWeights(*codes, **{name: S(shape, jnp.float32) for name, shape in scaled})
        if "\n" in text:
            whose = f"of quantised weights, {'' if differentiated else 'not '}differentiated: "
            (text,) = (s.removeprefix(whose) for s in text.splitlines() if s.startswith(whose))
    spec = ExpertSpec.of(cfg, block=block, architecture="sm_90")
    rows, factors, sizes = S((CAPACITY, H), jnp.bfloat16), S((CAPACITY,), jnp.float32), S((L,), jnp.int32)

    def run(rows, factors, sizes, weights):
        return jnp.sum(pallas.expert_mlp(rows, factors, sizes, weights, spec).astype(jnp.float32))

    traced = jax.make_jaxpr(jax.grad(run) if differentiated else run)(rows, factors, sizes, weights)
    by_mosaic = "wgmma" in str(traced)
    assert by_mosaic == (block == 128 or (scheme is not None and not differentiated))
    assert by_mosaic == text.startswith("products by Pallas-Mosaic")
