"""Every implementation of the experts through one suite, against loops in NumPy."""

import dataclasses
import functools
import re

import experts_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jax_moriep import experts
from jax_moriep.config import ACTIVATIONS, EXPERTS, MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, TransportError
from jax_moriep.experts import IMPLEMENTATIONS, ExpertSpec, ExpertWeights, blocked
from jax_moriep.experts.activation import gated
from jax_moriep.plan import Dispatched, ExchangeShape, Link, Plan
from jax_moriep.runtime.place import Place

H, INNER, L, BLOCK, C = 12, 10, 3, 8, 168

SIZES = {
    "uneven": (13, 70, 5),
    "an empty expert": (21, 0, 40),
    "all rows to one": (0, 139, 0),
    "no rows": (0, 0, 0),
    "whole blocks": (8, 16, 32),
    "one row each": (1, 1, 1),
    "full": (40, 64, 64),
    "full, one expert": (0, 0, 168),
}
# AITER's kernels have sizes and weights of their own: tests/rocm/test_aiter_experts.py.
NAMES = [name for name in IMPLEMENTATIONS if name != "aiter"]
ON_CPU = [name for name in NAMES if IMPLEMENTATIONS[name].unavailable_reason(Place("cpu"), None) is None]
# Every pair of values of two settings meets in one of these.
COMBINATIONS = [
    ("silu", False, False),
    ("gelu", True, False),
    ("swiglu_clamped", True, True),
    ("silu", True, True),
    ("gelu", False, True),
    ("swiglu_clamped", False, False),
]
TOLERANCE = {"float32": 4e-6, "bfloat16": 2e-2, "float16": 3e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands of one call. ``operands`` are rows, row_weights, w1, w2, b1, b2."""

    sizes: np.ndarray
    real: np.ndarray
    operands: tuple
    d_out: np.ndarray
    spec: ExpertSpec

    def want(self):
        rows, weights, *others = self.operands
        rows, d_out = (np.where(self.real[:, None], a, 0) for a in (rows, self.d_out))
        return oracle.experts(
            rows,
            np.where(self.real, weights, 0),
            self.sizes,
            others,
            d_out,
            activation=self.spec.activation,
            weight_input=self.spec.weight_input,
            block=self.spec.block,
        )


def make_spec(activation="silu", weight_input=False, **changes):
    # On GPUs too these tests want f32 as exact as the oracle's.
    given = {"block": BLOCK, "saved_rows": None, "precision": "highest"} | changes
    return ExpertSpec(activation, oracle.LIMIT, oracle.ALPHA, weight_input, **given)


def make_case(sizes, spec, biases=False, dtype="float32", seed=0, capacity=C):
    """Random operands, NaN in every row that is no expert's."""
    rng = np.random.default_rng(seed)
    real = np.zeros(capacity, bool)
    for start, size in zip(oracle.starts_of(sizes, spec.block), sizes, strict=True):
        real[start : start + size] = True

    def normal(*shape, scale=1.0):
        return np.asarray(jnp.asarray(rng.normal(size=shape) * scale, dtype))

    def poisoned(values):
        return np.where(real.reshape(-1, *[1] * (values.ndim - 1)), values, np.asarray(np.nan, values.dtype))

    num = len(sizes)
    operands = (
        poisoned(normal(capacity, H)),
        poisoned(rng.uniform(0.1, 1.0, capacity).astype(np.float32)),
        normal(num, 2 * INNER, H, scale=H**-0.5),
        normal(num, H, INNER, scale=INNER**-0.5),
        normal(num, 2 * INNER, scale=0.5) if biases else None,
        normal(num, H, scale=0.5) if biases else None,
    )
    return Case(np.asarray(sizes, np.int32), real, operands, poisoned(normal(capacity, H)), spec)


@functools.cache
def with_gradients(name, spec):
    """One compiled program for all group sizes: (sizes, operands, d_out) -> (out, the gradients)."""

    def run(sizes, operands, d_out):
        def fn(rows, weights, w1, w2, b1, b2):
            return IMPLEMENTATIONS[name].expert_mlp(rows, weights, sizes, ExpertWeights(w1, w2, b1, b2), spec)

        out, pull = jax.vjp(fn, *operands)
        return out, *pull(d_out)

    return jax.jit(run)


def assert_close(got, want, tolerance, what=""):
    assert (got is None) == (want is None), what
    if want is not None:
        got = np.asarray(got, np.float64)
        limit = tolerance * max(1.0, float(np.max(np.abs(want), initial=0.0)))
        np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=what)


def check(name, case, tolerance):
    got = with_gradients(name, case.spec)(case.sizes, case.operands, case.d_out)
    labels = ("out", "d_rows", "d_row_weights", "dw1", "dw2", "db1", "db2")
    for label, a, b in zip(labels, got, case.want(), strict=True):
        assert_close(a, b, tolerance, label)
    for a in got[:3]:
        assert not np.any(np.asarray(a)[~case.real]), "a row outside every run must be zero"
    assert got[0].dtype == got[1].dtype == case.operands[0].dtype
    for gradient, weight in zip(got[3:], case.operands[2:], strict=True):
        assert weight is None or gradient.dtype == weight.dtype


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("activation", "biases", "weight_input"), COMBINATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name, activation, biases, weight_input, sizes):
    spec = make_spec(activation, weight_input)
    check(name, make_case(SIZES[sizes], spec, biases), TOLERANCE["float32"])


@pytest.mark.parametrize(("dtype", "weight_input"), [("bfloat16", False), ("float16", True)])
@pytest.mark.parametrize("name", NAMES)
def test_low_precision(name, dtype, weight_input):
    spec = make_spec("silu", weight_input)
    check(name, make_case(SIZES["uneven"], spec, biases=True, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_another_dtype_keep_theirs(name):
    case = make_case(SIZES["uneven"], make_spec("gelu"), biases=True, dtype="bfloat16")
    rows, weights, *others = case.operands
    wide = [a.astype(np.float32) for a in others]
    check(name, dataclasses.replace(case, operands=(rows, weights, *wide)), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("saved_rows", [0, 60])
def test_recomputed_pre_activations(saved_rows, sizes):
    spec = make_spec("swiglu_clamped", saved_rows=saved_rows, block=4)
    check("blocked", make_case(SIZES[sizes], spec, biases=True), TOLERANCE["float32"])


@pytest.mark.parametrize("block", [1, 7, 192])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_any_size(name, block):
    sizes = (13, 2, 40)
    capacity = sum(-(-size // block) * block for size in sizes)
    check(name, make_case(sizes, make_spec(block=block), capacity=capacity), TOLERANCE["float32"])


@pytest.mark.parametrize("name", NAMES)
def test_runs_longer_than_the_largest_tile(name):
    spec = make_spec(block=128)
    check(name, make_case((1200, 0, 300), spec, capacity=1664), 4 * TOLERANCE["float32"])


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_row(name):
    case = make_case(SIZES["uneven"], make_spec())
    row = int(np.flatnonzero(case.real)[3])
    case.operands[0][row] = np.nan
    out = with_gradients(name, case.spec)(case.sizes, case.operands, case.d_out)[0]
    assert np.all(np.isnan(np.asarray(out)[row]))
    assert not np.any(np.isnan(np.delete(np.asarray(out), row, 0)))


# The same programs as in COMBINATIONS.
@pytest.mark.parametrize(("activation", "weight_input"), [("gelu", False), ("silu", True)])
@pytest.mark.parametrize("sizes", ["an empty expert", "all rows to one", "no rows"])
@pytest.mark.parametrize("name", NAMES)
def test_weights_of_an_expert_without_rows_may_be_nan(name, sizes, activation, weight_input):
    clean = make_case(SIZES[sizes], make_spec(activation, weight_input), biases=True)
    unused = clean.sizes == 0
    rows, weights, *others = clean.operands
    poisoned = [np.where(unused.reshape(-1, *[1] * (w.ndim - 1)), np.nan, w).astype(w.dtype) for w in others]
    got = with_gradients(name, clean.spec)(clean.sizes, (rows, weights, *poisoned), clean.d_out)
    for a, b in zip(got, clean.want(), strict=True):
        assert_close(a, b, TOLERANCE["float32"])
    for gradient in got[3:]:
        assert not np.any(np.asarray(gradient)[unused])


def test_blocked_is_bitwise_repeatable():
    case = make_case(SIZES["uneven"], make_spec(), biases=True)
    run = with_gradients("blocked", case.spec)
    first, second = (run(case.sizes, case.operands, case.d_out) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("weight_input", [False, True])
def test_finite_differences_of_blocked(weight_input):
    case = make_case((5, 0, 11), make_spec("gelu", weight_input), biases=True, capacity=24)
    rows, weights, *others = case.operands
    operands = (np.where(case.real[:, None], rows, 0), np.where(case.real, weights, 0), *others)

    def fn(rows, weights, w1, w2, b1, b2):
        return blocked.expert_mlp(
            rows, weights, jnp.asarray(case.sizes), ExpertWeights(w1, w2, b1, b2), case.spec
        )

    check_grads(jax.jit(fn), operands, order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


# --- Under the transformations of a training step ---------------------------------------------------------


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scan_over_layers(name, remat):
    spec = make_spec("silu")
    cases = [make_case((13, 0, 33), spec, biases=True, seed=seed, capacity=56) for seed in range(2)]
    real, weights, sizes = cases[0].real, cases[0].operands[1], jnp.asarray(cases[0].sizes)
    inputs = [np.where(real[:, None], cases[0].operands[0], 0)]
    layers = jax.tree.map(lambda *a: jnp.stack(a), *[case.operands[2:] for case in cases])

    def layer(rows, layer_weights):
        w1, w2, b1, b2 = layer_weights
        return rows + IMPLEMENTATIONS[name].expert_mlp(
            rows, weights, sizes, ExpertWeights(w1, w2, b1, b2), spec
        ), None

    def loss(rows, layers):
        return jnp.sum(lax.scan(jax.checkpoint(layer) if remat else layer, rows, layers)[0])

    d_rows, got = jax.jit(jax.grad(loss, (0, 1)))(inputs[0], layers)

    def at(i, d_out):
        operands = (inputs[i], weights, *cases[i].operands[2:])
        return dataclasses.replace(cases[i], operands=operands, d_out=d_out).want()

    d_out = np.ones((56, H))
    inputs.append(inputs[0] + at(0, d_out)[0])
    for i in (1, 0):
        _, d_in, _, *want = at(i, d_out)
        for a, b in zip(got, want, strict=True):
            assert_close(a[i], b, 1e-5)
        d_out = d_out + d_in
    assert_close(d_rows, d_out, 1e-5)


# Not triton: jax does not interpret a Pallas kernel under check_vma. tests/lowering has it for GPUs.
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "triton"])
def test_sharded_with_check_vma(name, kind):
    """Rows that do not vary over tp, weights that do not vary over dp: the gradients must be the sums."""
    dp, ep, tp = 2, 2, 2
    mesh = jax.make_mesh((dp, ep, tp), ("dp", "ep", "tp"), axis_types=(kind,) * 3)
    spec = make_spec("gelu", saved_rows=24)
    sizes = [[SIZES["uneven"], SIZES["no rows"]], [SIZES["an empty expert"], SIZES["all rows to one"]]]
    cases = [[make_case(sizes[d][e], spec, True, seed=2 * d + e) for e in range(ep)] for d in range(dp)]
    shared = [cases[0][e].operands[2:] for e in range(ep)]
    cases = [
        [dataclasses.replace(c, operands=(*c.operands[:2], *w)) for c, w in zip(row, shared, strict=True)]
        for row in cases
    ]

    def over_dp_and_ep(pick):
        return np.stack([np.stack([pick(case) for case in row]) for row in cases])

    rows, weights = (over_dp_and_ep(lambda c, i=i: c.operands[i]) for i in range(2))
    w1, w2, b1, b2 = (np.stack(arrays) for arrays in zip(*shared, strict=True))
    # [ep, L, 2, I, H]: a split of I must not part a gate from its up.
    w1, b1 = w1.reshape(ep, L, 2, INNER, H), b1.reshape(ep, L, 2, INNER)
    operands = (rows, weights, over_dp_and_ep(lambda c: c.sizes), w1, w2, b1, b2)
    specs = (
        P("dp", "ep"),
        P("dp", "ep"),
        P("dp", "ep"),
        P("ep", None, None, "tp"),
        P("ep", None, None, "tp"),
        P("ep", None, None, "tp"),
        P("ep"),
    )

    def body(rows, weights, sizes, w1, w2, b1, b2):
        w1, b1 = w1.reshape(L, -1, H), b1.reshape(L, -1)
        b2 = jnp.where(lax.axis_index("tp") == 0, b2[0], 0)
        out = IMPLEMENTATIONS[name].expert_mlp(
            rows[0, 0], weights[0, 0], sizes[0, 0], ExpertWeights(w1, w2[0], b1, b2), spec
        )
        return lax.psum(out, "tp")[None, None]

    def run(operands, d_out):
        rows, weights, sizes, *others = operands
        sharded = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P("dp", "ep"))
        out, pull = jax.vjp(
            lambda rows, weights, *others: sharded(rows, weights, sizes, *others), rows, weights, *others
        )
        return out, *pull(d_out)

    def put(array, spec):
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    d_out = put(over_dp_and_ep(lambda c: c.d_out), P("dp", "ep"))
    got = jax.jit(run)(tuple(map(put, operands, specs)), d_out)
    want = [[case.want() for case in row] for row in cases]
    for i in range(3):
        assert_close(got[i], np.stack([np.stack([w[i] for w in row]) for row in want]), TOLERANCE["float32"])
    for i in range(3, 7):
        summed = np.stack([sum(want[d][e][i] for d in range(dp)) for e in range(ep)])
        assert_close(got[i], summed.reshape(got[i].shape), TOLERANCE["float32"])


# --- blocked: cost ----------------------------------------------------------------------------------------


def _dots(capacity):
    """The operand types of every product in blocked's forward and backward pass."""
    case = make_case(SIZES["uneven"], make_spec(saved_rows=64), capacity=capacity)
    text = with_gradients("blocked", case.spec).lower(case.sizes, case.operands, case.d_out).as_text()
    return sorted(re.findall(r"stablehlo\.dot_general.*: (\(.*)", text))


def test_no_product_depends_on_the_capacity():
    small, large = _dots(1000), _dots(8000)
    assert len(small) > 0
    assert small == large
    rows = {int(n) for dot in large for n in re.findall(r"tensor<(\d+)x", dot)}
    assert max(rows) <= 512


def test_tiles_cover_the_real_rows_and_no_block_more():
    sizes = blocked.tile_sizes(BLOCK, 4096)

    def visit(tile, visits):
        return visits.at[tile.first + jnp.arange(tile.size)].add(1)

    @jax.jit
    def visits_of(start, count):
        return blocked._for_tiles(sizes, start, count, visit, jnp.zeros(2048, jnp.int32))

    for count in (0, 1, 8, 9, 63, 200, 512, 1337):
        want = np.zeros(2048)
        want[16 : 16 + -(-count // BLOCK) * BLOCK] = 1
        np.testing.assert_array_equal(visits_of(16, count), want, err_msg=f"{count=}")


@pytest.mark.parametrize("capacity", [8, 100, 5000])
@pytest.mark.parametrize("block", [1, 5, 8, 24, 128, 250, 1000])
def test_tile_sizes(block, capacity):
    capacity = -(-capacity // block) * block
    sizes = blocked.tile_sizes(block, capacity)
    assert block % sizes[-1] == 0
    assert sizes[0] <= capacity
    assert len(sizes) <= 5
    assert all(large % small == 0 and large > small for large, small in zip(sizes, sizes[1:], strict=False))


# --- The front door ---------------------------------------------------------------------------------------


def make_dispatched(case, **changes):
    shape = ExchangeShape(1, 16, 2, H, L, L, BLOCK, C)
    plan = Plan(None, None, Link(shape, "none", "ep", jax.default_backend()))
    rows, weights = case.operands[:2]
    given = {"rows": rows, "row_weights": weights, "group_sizes": case.sizes, "plan": plan, "block": BLOCK}
    return Dispatched(**(given | changes))


def make_cfg(**changes):
    return MoEConfig(L, 2, H, INNER, **({"activation_limit": oracle.LIMIT, "block": BLOCK} | changes))


def make_params(case, **changes):
    return MoEParams(
        **({"router": None} | dict(zip(("w1", "w2", "b1", "b2"), case.operands[2:], strict=True)) | changes)
    )


@pytest.mark.parametrize("name", ["auto", *ON_CPU])
@pytest.mark.parametrize(("router", "weight_input"), [("softmax_topk", False), ("llama4", True)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_config_decides(activation, router, weight_input, name):
    biases = activation == "swiglu_clamped"
    case = make_case(SIZES["uneven"], make_spec(activation, weight_input), biases)
    cfg = make_cfg(router=router, activation=activation, expert_bias=biases, experts=name)
    out = experts.expert_mlp(make_dispatched(case), make_params(case), cfg)
    assert_close(out, case.want()[0], TOLERANCE["float32"])


def test_rows_need_no_exchange():
    """A place and the rows are enough; how many pre-activations are kept changes no result."""
    case = make_case(SIZES["uneven"], make_spec())
    dispatched, params, cfg = make_dispatched(case), make_params(case), make_cfg()
    rows = experts.Rows(dispatched.rows, dispatched.row_weights, dispatched.group_sizes, BLOCK)
    want = experts.expert_mlp(dispatched, params, cfg)
    assert experts.saved_rows(dispatched.plan.link.shape) == 2 * 16 * 2 + L * BLOCK
    for saved_rows in (None, 1):
        got = experts.mlp_at(Place("cpu"), rows, params, cfg, saved_rows=saved_rows)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def choose(name, platform):
    return experts.choose(make_cfg(experts=name), Place(platform))


def test_auto_takes_the_first_that_can_run():
    assert choose("auto", "cpu") == "blocked"
    assert list(experts.reasons(Place("cpu"))) == list(EXPERTS)
    assert choose("auto", "tpu") == "blocked"
    assert {name for name, why in experts.reasons(Place(None)).items() if why is None} == set(EXPERTS)


@pytest.mark.parametrize("platform", ["gpu", "cuda", "rocm"])
def test_auto_takes_triton_on_gpus(platform):
    assert choose("auto", platform) == choose("triton", platform) == "triton"


def test_auto_takes_what_runs_everywhere_where_there_is_no_device():
    assert choose("auto", None) == "blocked"
    assert choose("triton", None) == "triton"


def test_triton_by_name_on_a_cpu():
    with pytest.raises(TransportError, match="experts='triton' cannot run on platform 'cpu': it needs a GPU"):
        choose("triton", "cpu")


@pytest.mark.parametrize("name", ["blocked", "triton"])
@pytest.mark.parametrize("precision", ["highest", "high", "BF16_BF16_F32_X6"])
def test_both_passes_have_the_precision_of_the_call(name, precision):
    """Also where the derivative is traced outside of the context, and with another default."""
    case = make_case(SIZES["uneven"], make_spec())
    cfg = MoEConfig(L, 1, H, INNER, experts=name, block=BLOCK)

    @jax.jit
    def layer(rows, weights, w1, w2):
        with jax.default_matmul_precision(precision):
            spec = ExpertSpec.of(cfg, block=BLOCK, architecture="")
            return IMPLEMENTATIONS[name].expert_mlp(rows, weights, case.sizes, ExpertWeights(w1, w2), spec)

    def loss(*operands):
        return jnp.sum(layer(*operands))

    with jax.default_matmul_precision("default"):
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2, 3)))(*case.operands[:4])
    found = precisions_of(jaxpr.jaxpr)
    wanted = jax.lax.DotAlgorithmPreset.__members__.get(precision)
    wanted = wanted or (jax.lax.Precision(precision),) * 2
    assert len(found) >= 6
    assert set(found) == {wanted}


def precisions_of(jaxpr):
    """Of all products in a program and in the kernels and branches inside."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is jax.lax.dot_general_p:
            found.append(eqn.params["precision"])
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += precisions_of(inner)
    return found


def test_16_bit_values_have_exact_products_whatever_the_precision():
    case = make_case(SIZES["uneven"], make_spec(precision="TF32_TF32_F32"), dtype="bfloat16")
    check("triton", case, TOLERANCE["bfloat16"])


CASE = make_case(SIZES["uneven"], make_spec(), biases=True)
ROWS, WEIGHTS, W1, W2, B1, B2 = CASE.operands


@pytest.mark.parametrize(
    ("dispatched", "params", "cfg", "text"),
    [
        ({"rows": ROWS[:, :-1]}, {}, {}, r"rows.shape=\(168, 11\) must be \[C, H=12\]"),
        (
            {"rows": np.ones((C, H), np.int32)},
            {},
            {},
            "rows.dtype='int32' must be float32, bfloat16 or float16",
        ),
        ({"block": 5}, {}, {}, "block=5 must divide the capacity C=168"),
        ({"group_sizes": CASE.sizes[:2]}, {}, {}, r"group_sizes.shape=\(2,\) must be \(3,\)"),
        ({"group_sizes": CASE.sizes.astype(np.float32)}, {}, {}, "group_sizes.dtype=float32"),
        ({"row_weights": WEIGHTS[1:]}, {}, {}, r"row_weights.shape=\(167,\) must be \(168,\)"),
        ({"row_weights": WEIGHTS.astype(np.float16)}, {}, {}, "row_weights.dtype=float16 must be"),
        ({}, {"w1": W1.swapaxes(1, 2)}, {}, r"w1.shape=\(3, 12, 20\) must be \[L, 2\*I, H=12\]"),
        ({}, {"w1": W1[:, 1:]}, {}, r"w1.shape=\(3, 19, 12\) must be"),
        ({}, {"w1": W1[:, :6]}, {}, r"w1.shape=\(3, 6, 12\) must have 2\*I rows, I=10 or"),
        ({}, {"w1": None}, {}, "w1.shape=None must be"),
        ({}, {"w2": W2.swapaxes(1, 2)}, {}, r"w2.shape=\(3, 10, 12\) must be \(3, 12, 10\) beside"),
        (
            {},
            {"w2": W2.astype(np.int8)},
            {},
            "params.w2.dtype='int8' must be bfloat16, .* with expert_quant=None; set expert_quant",
        ),
        ({}, {"b1": None}, {}, r"b1.shape=None must be \(3, 20\)"),
        ({}, {"b2": B2[:, 1:]}, {}, r"b2.shape=\(3, 11\) must be \(3, 12\)"),
        ({}, {}, {"expert_bias": False}, "b1='an array' must be None with expert_bias=False"),
    ],
)
def test_operands_that_do_not_fit(dispatched, params, cfg, text):
    with pytest.raises(ConfigError, match=text):
        experts.expert_mlp(
            make_dispatched(CASE, **dispatched),
            make_params(CASE, **params),
            make_cfg(**({"expert_bias": True} | cfg)),
        )


# --- Activations and the shared expert --------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation(activation):
    pre = np.random.default_rng(0).normal(size=(5, 2 * INNER)).astype(np.float32)
    # On the clamp's limit the gradient is that inside it.
    pre[0, [0, INNER]] = np.float32(oracle.LIMIT)
    limit = float(np.float32(oracle.LIMIT))
    value, pull = jax.vjp(lambda p: gated(p, activation, limit, oracle.ALPHA), pre)
    gradient = pull(np.ones((5, INNER), np.float32))[0]
    for row, got, got_gradient in zip(pre.astype(np.float64), value, gradient, strict=True):
        row = np.where(row == limit, oracle.LIMIT, row)
        want, by_gate, by_up = oracle.ACTIVATIONS[activation](row[:INNER], row[INNER:])
        assert_close(got, want, 1e-6)
        assert_close(got_gradient, np.concatenate([by_gate, by_up]), 1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_mlp(dtype, gate, activation):
    rng, inner = np.random.default_rng(0), 6
    x, w1, w2, w = (
        np.asarray(jnp.asarray(rng.normal(size=shape) / 2, dtype))
        for shape in ((7, H), (2 * inner, H), (H, inner), (H, 1))
    )
    cfg = make_cfg(activation=activation, shared_intermediate_size=inner, shared_gate=gate)
    params = MoEParams(None, None, None, shared_w1=w1, shared_w2=w2, shared_gate=w if gate else None)
    got = experts.shared_mlp(jnp.asarray(x), params, cfg)
    x, w1, w2, w = (a.astype(np.float64) for a in (x, w1, w2, w))
    want = np.zeros(x.shape)
    for t in range(len(x)):
        pre = w1 @ x[t]
        want[t] = w2 @ oracle.ACTIVATIONS[activation](pre[:inner], pre[inner:])[0]
        if gate:
            want[t] /= 1 + np.exp(-x[t] @ w[:, 0])
    assert got.dtype == dtype
    assert_close(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"shared_w1": None}, "needs params.shared_w1 and"),
        ({"shared_w2": np.ones((6, H))}, r"shared_w2.shape=\(6, 12\) must be"),
        ({"shared_gate": None}, r"shared_gate.shape=None must be \(12, 1\)"),
    ],
)
def test_shared_weights_that_do_not_fit(params, text):
    good = {"shared_w1": np.ones((12, H)), "shared_w2": np.ones((H, 6)), "shared_gate": np.ones((H, 1))}
    cfg = make_cfg(shared_intermediate_size=6, shared_gate=True)
    with pytest.raises(ConfigError, match=text):
        experts.shared_mlp(jnp.ones((4, H)), MoEParams(None, None, None, **(good | params)), cfg)
