"""The schemes' numbers, and the experts under each scheme, against loops in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import schemes_oracle as oracle
from jax.sharding import AxisType

import jax_moriep as jm
from jax_moriep import quant, schemes
from jax_moriep.config import SCHEMES
from jax_moriep.experts import IMPLEMENTATIONS, ExpertSpec, ExpertWeights

FORMATS = ["e4m3fn", "e4m3fnuz"]
KINDS = [*itertools.product(("fp8_block", "fp8_token"), FORMATS), ("int8_token", "int8")]


def code_dtype(name):
    return jnp.dtype(jnp.int8) if name == "int8" else schemes.FORMATS[name]


def values(codes, scales):
    return np.asarray(codes).astype(np.float64) * np.asarray(scales, np.float64)


def wild(shape, dtype="float32", seed=0):
    """Values of very different sizes, with groups of zeros and of tiny numbers."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-12, 12, size=(*shape[:-1], 1))
    x[..., :1, :] = 0
    x[..., 1:2, :] *= 2.0**-120
    return np.asarray(jnp.asarray(x, dtype)).astype(np.float64)


# --- Numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "name"), KINDS)
@pytest.mark.parametrize("width", [128, 300, 40])
def test_rows(scheme, name, width):
    x = wild((9, width))
    got = jax.jit(lambda x: schemes.quantise_rows(x, scheme, code_dtype(name)))(jnp.asarray(x, jnp.float32))
    assert got.codes.dtype == code_dtype(name)
    assert got.scales.shape == (9, -(-width // 128) if scheme == "fp8_block" else 1)
    want = oracle.rows(x, scheme, name)
    np.testing.assert_allclose(schemes.dequantise_rows(got), want, rtol=2e-7 if name == "int8" else 0)


@pytest.mark.parametrize(("scheme", "name"), KINDS)
@pytest.mark.parametrize(("inner", "hidden"), [(128, 256), (130, 129), (7, 40)])
def test_weights(scheme, name, inner, hidden):
    for parts, tall, wide in ((2, 2 * inner, hidden), (1, hidden, inner)):
        w = wild((3, tall, wide), seed=parts)
        quantise = jax.jit(lambda w, p=parts: schemes.quantise_weights(w, scheme, code_dtype(name), parts=p))
        got = quantise(jnp.asarray(w, jnp.float32))
        want, scales = oracle.weights(w, scheme, name, parts)
        np.testing.assert_allclose(got.scales, scales, rtol=3e-7 if name == "int8" else 0)
        back = jax.jit(lambda *q, p=parts: schemes.dequantise_weights(*q, scheme, parts=p))(*got)
        np.testing.assert_allclose(back, want, rtol=4e-7 if name == "int8" else 0)
        assert got.scales.shape == schemes.scale_shapes(scheme, 3, hidden, inner)[0 if parts == 2 else 1]


@pytest.mark.parametrize(("scheme", "name"), KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_makes_its_group_nan(scheme, name, bad):
    x = np.ones((2, 256), np.float32)
    x[1, 5] = bad
    got = schemes.quantise_rows(jnp.asarray(x), scheme, code_dtype(name))
    assert not np.asarray(got.codes[1, :128]).astype(np.float32).any()
    want = np.ones((2, 256))
    want[1, : 128 if scheme == "fp8_block" else 256] = np.nan
    np.testing.assert_allclose(schemes.dequantise_rows(got), want, rtol=1e-6)


def test_rows_that_came_over_the_wire_keep_their_values():
    fp8 = schemes.FORMATS["e4m3fn"]
    x = jnp.asarray(wild((64, 384)), jnp.bfloat16)
    wire = quant.unpack(quant.pack(x, fp8), 384, jnp.bfloat16, fp8)
    again = schemes.dequantise_rows(schemes.quantise_rows(wire, "fp8_block", fp8))
    np.testing.assert_array_equal(again, wire.astype(jnp.float32))


@pytest.mark.parametrize(("to", "scheme"), [("e4m3fnuz", "fp8_token"), ("e4m3fnuz", "fp8_block")])
def test_all_codes_in_the_other_format(to, scheme):
    codes = np.arange(256, dtype=np.uint8).reshape(1, 2, 128)
    shape = (1, 1, 1) if scheme == "fp8_block" else (1, 2)
    scales = np.full(shape, 0.3, np.float32)
    codes = jnp.asarray(codes.view(schemes.FORMATS["e4m3fn"]))
    got = schemes.convert_weights(codes, jnp.asarray(scales), scheme, schemes.FORMATS[to], parts=1)
    want = np.array([oracle.value_of(c, "e4m3fn") for c in range(256)]) * np.float64(np.float32(0.3))
    bits = np.asarray(got.codes).view(np.uint8).reshape(-1)
    back = np.array([oracle.value_of(int(c), to) for c in bits]) * np.float64(got.scales.reshape(-1)[0])
    np.testing.assert_array_equal(back, want)


@pytest.mark.parametrize("scheme", ["fp8_token", "fp8_block"])
@pytest.mark.parametrize("with_240", [False, True])
def test_all_codes_on_the_way_back(scheme, with_240):
    bits = np.arange(256, dtype=np.uint8)
    if not with_240:
        bits[bits & 0x7F == 0x7F] = 0
    bits = np.concatenate([bits, np.zeros(256, np.uint8)]).reshape(1, 1, 512)
    if scheme == "fp8_block":
        bits = np.pad(bits, [(0, 0), (0, 127), (0, 0)])
    scales = np.full((1, 1, 4) if scheme == "fp8_block" else (1, 1), 0.3, np.float32)
    codes = jnp.asarray(bits.view(schemes.FORMATS["e4m3fnuz"]))
    got = schemes.convert_weights(codes, jnp.asarray(scales), scheme, schemes.FORMATS["e4m3fn"], parts=1)
    assert got.codes.dtype == schemes.FORMATS["e4m3fn"]
    back = np.asarray(schemes.dequantise_weights(*got, scheme, parts=1), np.float64)[0, 0]
    want = np.array([oracle.value_of(int(c), "e4m3fnuz") for c in bits[0, 0]])
    held = np.zeros(512, bool)
    if with_240:
        size = 128 if scheme == "fp8_block" else 512
        for first in range(0, 512, size):
            held[first : first + size] = (bits[0, 0, first : first + size] & 0x7F == 0x7F).any()
    odd = held & (np.abs(want) < 2.0**-6) & (np.abs(want) * 2**10 % 2 == 1)
    scale = np.float64(np.float32(0.3))
    np.testing.assert_allclose(back[~odd], want[~odd] * scale, rtol=1e-7)
    assert np.abs(back[odd] - want[odd] * scale).max(initial=0) <= 2.0**-10 * scale * (1 + 1e-6)
    assert odd.any() == with_240


# --- Experts ----------------------------------------------------------------------------------------------

H, INNER, BLOCK = 160, 136, 8
SIZES = np.array([13, 0, 5], np.int32)
STARTS = [0, 16, 16]
CAPACITY = 32


def silu(gate, up):
    s = 1 / (1 + np.exp(-gate))
    return gate * s * up, (s + gate * s * (1 - s)) * up, gate * s


@functools.cache
def operands(scheme, name, frozen):
    """rows, row weights, w1, w2, b1, b2, d_out in f64; NaN in padding; and the arrays that the layer gets."""
    rng = np.random.default_rng(3)
    real = np.zeros(CAPACITY, bool)
    for start, size in zip(STARTS, SIZES, strict=True):
        real[start : start + size] = True

    def rows(*shape):
        drawn = rng.normal(size=(CAPACITY, *shape)).astype(np.float32).astype(np.float64)
        return np.where(real.reshape(-1, *[1] * len(shape)), drawn, np.nan)

    x, q, d_out = rows(H), np.abs(rows()), rows(H)
    w1 = (rng.normal(size=(3, 2 * INNER, H)) * H**-0.5).astype(np.float32)
    w2 = (rng.normal(size=(3, H, INNER)) * INNER**-0.5).astype(np.float32)
    b1, b2 = (rng.normal(size=shape).astype(np.float32) / 4 for shape in ((3, 2 * INNER), (3, H)))
    if not frozen:
        return (x, q, d_out, w1.astype(np.float64), w2.astype(np.float64), b1, b2), ExpertWeights(
            w1, w2, b1, b2
        )
    q1, q2 = (
        schemes.quantise_weights(jnp.asarray(w), scheme, code_dtype(name), parts=parts)
        for w, parts in ((w1, 2), (w2, 1))
    )
    # Scales of a checkpoint are no powers of two.
    q1, q2 = (q._replace(scales=q.scales * np.float32(1.1)) for q in (q1, q2))
    v1, v2 = (
        np.asarray(schemes.dequantise_weights(*q, scheme, parts=parts), np.float64)
        for q, parts in ((q1, 2), (q2, 1))
    )
    given = ExpertWeights(q1.codes, q2.codes, b1, b2, q1.scales, q2.scales)
    return (x, q, d_out, v1, v2, b1, b2), given


@functools.cache
def wanted(scheme, name, frozen):
    """The oracle's answer: what comes out and the gradients of what goes in."""
    (x, q, d_out, w1, w2, b1, b2), _ = operands(scheme, name, frozen)
    x, q, d_out = (np.nan_to_num(a) for a in (x, q, d_out))
    return oracle.experts(silu, x, q, SIZES, STARTS, w1, w2, (b1, b2), d_out, scheme, name, frozen=frozen)


def near(got, want, what):
    """But for values that lie on the border of two codes, which a sum's order may decide: few and small."""
    got = np.asarray(got, np.float64)
    error = np.linalg.norm(got - want) / max(1e-30, np.linalg.norm(want))
    assert error < 2e-3, (what, error)


CASES = [
    *itertools.product(("reference", "blocked"), KINDS, (False, True)),
    # Interpreted, which is slow: each scheme and each format once at least, on the way back with either kind.
    ("triton", ("fp8_block", "e4m3fn"), False),
    ("triton", ("fp8_block", "e4m3fnuz"), True),
    ("triton", ("fp8_token", "e4m3fnuz"), False),
    ("triton", ("fp8_token", "e4m3fn"), True),
    ("triton", ("int8_token", "int8"), True),
]


@pytest.mark.parametrize(("implementation", "kind", "frozen"), CASES)
def test_experts(implementation, kind, frozen):
    scheme, name = kind
    (x, q, d_out, *_), given = operands(scheme, name, frozen)
    real = ~np.isnan(x[:, 0])
    spec = ExpertSpec("silu", 0.0, 0.0, False, BLOCK, None, scheme, name if name != "int8" else "e4m3fn")

    @jax.jit
    def passes(rows, weights, given, trained, d_out):
        def fn(rows, weights, trained):
            layer = IMPLEMENTATIONS[implementation].expert_mlp
            return layer(rows, weights, jnp.asarray(SIZES), given._replace(**trained), spec)

        out, pull = jax.vjp(fn, rows, weights, trained)
        return out, *pull(d_out)

    trained = {"b1": given.b1, "b2": given.b2} | ({} if frozen else {"w1": given.w1, "w2": given.w2})
    x, q, d_out = (a.astype(np.float32) for a in (x, q, d_out))
    out, d_rows, d_weights, d_trained = passes(x, q, given, trained, d_out)
    want = wanted(scheme, name, frozen)
    rows = {"out": out, "d_rows": d_rows, "d_weights": d_weights}
    for (what, got), expected in zip(rows.items(), want, strict=False):
        assert not np.asarray(got)[~real].any(), what
        near(got, expected, what)
    near(d_trained["b1"], want[5], "db1")
    near(d_trained["b2"], want[6], "db2")
    if not frozen:
        near(d_trained["w1"], want[3], "dw1")
        near(d_trained["w2"], want[4], "dw2")


@pytest.mark.parametrize("frozen", [False, True])
def test_a_weight_of_the_input_row(frozen):
    """What is quantised is the row times its weight, in both implementations."""
    (x, q, d_out, *_), given = operands("fp8_block", "e4m3fn", frozen)
    real = ~np.isnan(x[:, 0])
    x, q, d_out = (jnp.asarray(a, jnp.float32) for a in (x, q, d_out))
    spec = ExpertSpec("silu", 0.0, 0.0, True, BLOCK, None, "fp8_block")

    @functools.partial(jax.jit, static_argnums=0)
    def passes(implementation, x, q, d_out):
        layer = IMPLEMENTATIONS[implementation].expert_mlp
        out, pull = jax.vjp(lambda x, q: layer(x, q, jnp.asarray(SIZES), given, spec), x, q)
        return out, *pull(d_out)

    for got, want in zip(passes("triton", x, q, d_out), passes("blocked", x, q, d_out), strict=True):
        assert not np.asarray(got)[~real].any()
        near(got, np.asarray(want, np.float64), "triton")


def test_an_experts_output_is_linear_in_its_row_weight():
    """Finite differences of the routing weight, which rounding does not touch."""
    (x, q, d_out, *_), given = operands("fp8_block", "e4m3fn", frozen=True)
    x, q, d_out = (jnp.asarray(np.nan_to_num(a), jnp.float32) for a in (x, q, d_out))
    spec = ExpertSpec("silu", 0.0, 0.0, False, BLOCK, None, "fp8_block")

    @jax.jit
    def loss(q):
        return jnp.vdot(IMPLEMENTATIONS["blocked"].expert_mlp(x, q, jnp.asarray(SIZES), given, spec), d_out)

    step = jnp.asarray(np.random.default_rng(0).normal(size=q.shape), jnp.float32)
    slope = (loss(q + step) - loss(q - step)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(q), step), slope, rtol=1e-4)


# --- The layer's weights ----------------------------------------------------------------------------------

CFG = jm.MoEConfig(5, 2, 160, 136, expert_quant="fp8_block", capacity_factor=4.0)


@functools.cache
def params_of(cfg):
    return jm.init_params(jax.random.key(0), cfg, jnp.float32)


def mesh_of(ranks):
    return jax.sharding.Mesh(np.array(jax.devices()[:ranks]), "ep")


def run(params, cfg, ranks=2, **kwargs):
    x = jax.random.normal(jax.random.key(1), (24, cfg.hidden_size), jnp.float32)
    return jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh_of(ranks), **kwargs)[0])(x, params)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_prepared_weights_give_what_master_weights_give(scheme):
    cfg = dataclasses.replace(CFG, expert_quant=scheme)
    params = params_of(cfg)
    want = run(params, cfg)
    prepared = jm.prepare_params(params, cfg, mesh_of(2))
    assert prepared.w1.shape[0] == 6
    assert prepared.w1.sharding.spec[0] == "ep"  # pyright: ignore[reportAttributeAccessIssue]
    assert schemes.is_codes(prepared.w1.dtype)
    # Of a sum's order, a code that lies on a border may come out as its neighbour.
    close = {"rtol": 0, "atol": 2e-3 * float(jnp.abs(want).max())}
    np.testing.assert_allclose(run(prepared, cfg), want, **close)
    np.testing.assert_allclose(run(jm.quantize_params(params, cfg), cfg), want, **close)
    plain = run(params, dataclasses.replace(cfg, expert_quant=None))
    assert 1e-3 < float(jnp.linalg.norm(plain - want) / jnp.linalg.norm(plain)) < 0.08


def test_float8_weights_of_the_other_format_are_the_same_weights():
    params = params_of(CFG)
    fn = jm.quantize_params(params, CFG, "e4m3fn")
    fnuz = jm.quantize_params(fn, CFG, "e4m3fnuz")
    assert fnuz.w1.dtype == jnp.float8_e4m3fnuz
    again = jm.prepare_params(fnuz, CFG, mesh_of(1))
    assert again.w1.dtype == jnp.float8_e4m3fn
    for w, parts in (("w1", 2), ("w2", 1)):
        pairs = [(getattr(p, w), getattr(p, f"{w}_scale")) for p in (fn, fnuz)]
        values = [schemes.dequantise_weights(*pair, "fp8_block", parts=parts) for pair in pairs]
        np.testing.assert_array_equal(*values)


@pytest.mark.parametrize("kind", ["master", "frozen"])
def test_gradients_of_x_and_of_the_router(kind):
    params = params_of(CFG)
    if kind == "frozen":
        params = jm.prepare_params(params, CFG, mesh_of(2))
    x = jax.random.normal(jax.random.key(1), (24, CFG.hidden_size), jnp.float32)

    def loss(x, router, transport):
        cfg = dataclasses.replace(CFG, transport=transport)
        y, stats = jm.ep_moe(x, dataclasses.replace(params, router=router), cfg, mesh=mesh_of(2))
        return jnp.sum(y**2) + stats.load_balance_loss

    got, want = (
        jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(x, params.router, transport)
        for transport in ("native", "reference")
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", ["w1", "w2_scale"])
def test_a_gradient_of_quantised_weights_is_refused(name, remat):
    params = jm.prepare_params(params_of(CFG), CFG, mesh_of(2))
    x = jnp.ones((24, CFG.hidden_size))

    def loss(w):
        layer = lambda x, p: jm.ep_moe(x, p, CFG, mesh=mesh_of(2))[0]  # noqa: E731
        layer = jax.checkpoint(layer) if remat else layer
        return layer(x, dataclasses.replace(params, **{name: w})).sum()

    with pytest.raises(jm.ConfigError, match=f"params.{name} is quantised and must not be differ"):
        jax.jit(jax.grad(loss))(getattr(params, name))


def test_layers_of_quantised_weights_under_scan():
    layers = [jm.quantize_params(jm.init_params(jax.random.key(i), CFG), CFG) for i in range(2)]
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *layers)
    x = jax.random.normal(jax.random.key(1), (24, CFG.hidden_size), jnp.float32)

    def loss(x, params):
        def layer(x, p):
            return x + jm.ep_moe(x, p, CFG, mesh=mesh_of(2))[0], None

        return jnp.sum(jax.lax.scan(layer, x, params)[0] ** 2)

    got = jax.jit(jax.grad(loss))(x, stacked)
    loop = lambda x: jnp.sum(step(step(x, layers[0]), layers[1]) ** 2)  # noqa: E731
    step = lambda x, p: x + jm.ep_moe(x, p, CFG, mesh=mesh_of(2))[0]  # noqa: E731
    want = jax.jit(jax.grad(loop))(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensor_parallel(scheme):
    cfg = jm.MoEConfig(4, 2, 256, 256, expert_quant=scheme)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("ep", "tp"))
    params = jm.quantize_params(params_of(cfg), cfg)
    x = jax.random.normal(jax.random.key(1), (16, 256), jnp.float32)
    specs = jm.param_specs(cfg, "ep", "tp", params=params)
    placed = jax.device_put(params, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs))
    got = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh, tp_axis="tp")[0])(x, placed)
    want = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh_of(2))[0])(x, params)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * float(jnp.abs(want).max()))


QUANTISED = jm.quantize_params(params_of(CFG), CFG)


@pytest.mark.parametrize(
    ("changes", "cfg", "text"),
    [
        (
            {},
            {"expert_quant": None},
            "params.w1.dtype='float8_e4m3fn' must be .* with expert_quant=None",
        ),
        (
            {},
            {"expert_quant": "int8_token"},
            r"expert_quant='int8_token' must be 'fp8_block', the scheme of these codes \(w1 float8_e4m3fn, "
            r"w1_scale \[5, 4, 2\]\); set it so, or quantise",
        ),
        ({}, {"expert_quant": "fp8_token"}, "expert_quant='fp8_token' must be 'fp8_block', the scheme of"),
        (
            {"w1_scale": jnp.ones((5, 272)), "w2_scale": jnp.ones((5, 160))},
            {},
            "expert_quant='fp8_block' must be 'fp8_token', the scheme of these codes",
        ),
        (
            {name: getattr(QUANTISED, name).astype(jnp.int8) for name in ("w1", "w2")},
            {"expert_quant": "int8_token"},
            "which must be int8|params.w1_scale.shape",
        ),
        ({"w1_scale": None}, {}, "which must be float8_e4m3fn or float8_e4m3fnuz in both, with w1_scale and"),
        ({"w1": jnp.zeros((5, 272, 160))}, {}, "params have .*float32.* which must be float8_e4m3fn or"),
        (
            {"w2_scale": QUANTISED.w2_scale[:, :1]},
            {},
            r"params.w2_scale.shape=\(5, 1, 2\) must be",
        ),
        (
            {"w2_scale": QUANTISED.w2_scale.astype(jnp.bfloat16)},
            {},
            "params.w2_scale.dtype='bfloat16'",
        ),
        ({"layout": "aiter"}, {}, "params.layout='aiter' must be 'plain' for experts='blocked'; pass the"),
        ({"layout": "other"}, {}, r"params.layout='other' must be one of \('plain', 'aiter'\); take what"),
        (
            {"w1": jnp.zeros((5, 272, 160)), "w2": jnp.zeros((5, 160, 136))},
            {},
            "params.w1_scale='an array' must be None beside floating weights",
        ),
    ],
)
def test_weights_that_do_not_fit(changes, cfg, text):
    with pytest.raises(jm.ConfigError, match=text):
        run(dataclasses.replace(QUANTISED, **changes), dataclasses.replace(CFG, **cfg))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: jm.MoEConfig(4, 2, 8, 8, expert_quant="fp4"), "expert_quant='fp4' must be one of"),
        (
            lambda: jm.quantize_params(params_of(CFG), dataclasses.replace(CFG, expert_quant=None)),
            "cfg.expert_quant=None must name the scheme; set it",
        ),
        (lambda: jm.quantize_params(params_of(CFG), CFG, "e5m2"), r"format='e5m2' must be one of \('e4m3fn'"),
        (lambda: jm.quantize_params(CFG, params_of(CFG)), "params='MoEConfig' must be a jm.MoEParams"),
        (
            lambda: jm.quantize_params(dataclasses.replace(QUANTISED, layout="aiter"), CFG),
            "params.layout='aiter' must be 'plain'; pass the weights from before prepare_params",
        ),
        (
            lambda: jm.prepare_params(dataclasses.replace(QUANTISED, layout="aiter"), CFG, mesh_of(1)),
            "params.layout='aiter' must be 'plain' here; prepare the plain weights",
        ),
        (lambda: jm.prepare_params(QUANTISED, CFG, "mesh"), "mesh='str' must be a jax.sharding.Mesh"),
    ],
)
def test_calls_that_are_refused(call, text):
    with pytest.raises(jm.MoriepError, match=text):
        call()


def test_blocks_that_a_tensor_parallel_axis_would_part():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("ep", "tp"))
    with pytest.raises(jm.ShardingError, match="hidden_size=160 must be divisible by .* times 128, the side"):
        jm.ep_moe(jnp.ones((4, 160)), QUANTISED, CFG, mesh=mesh, tp_axis="tp")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_for_an_explicit_mesh(scheme):
    """jax cannot reshape what an Explicit mesh has sharded, and blocks are made by reshaping."""
    cfg = jm.MoEConfig(4, 2, 256, 136, expert_quant=scheme)
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
    params = params_of(cfg)
    want = jm.prepare_params(params, cfg, mesh_of(2))
    with jax.set_mesh(mesh):
        got = jm.prepare_params(params, cfg, mesh)
    assert got.w1.sharding.mesh == mesh  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(got.w1, want.w1)
    np.testing.assert_array_equal(got.w2_scale, want.w2_scale)
    if scheme == "fp8_block":
        other = jm.quantize_params(params, cfg, "e4m3fnuz")
        assert jm.prepare_params(other, cfg, mesh).w1.dtype == jnp.float8_e4m3fn


def test_other_float8_is_no_master_weight():
    w1, w2 = (jnp.zeros(shape, jnp.float8_e5m2) for shape in ((5, 272, 160), (5, 160, 136)))
    with pytest.raises(jm.ConfigError, match="float8_e5m2.* must be float8_e4m3fn or float8_e4m3fnuz in"):
        run(dataclasses.replace(params_of(CFG), w1=w1, w2=w2), CFG)
    with pytest.raises(jm.ConfigError, match="params.w1=None must"):
        jm.quantize_params(dataclasses.replace(params_of(CFG), w1=None), CFG)
