"""The Flax modules against ``ep_moe`` called by hand: values, gradients, shardings, the selection bias."""

import dataclasses
import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.config import WEIGHT_NAMES
from jax_moriep.flax import EpMoE, FrozenWeight, LinenEpMoE, ScoreBias, shared

HIDDEN = 16
FULL = jm.MoEConfig(
    10,
    2,
    HIDDEN,
    8,
    router="sigmoid_topk",
    score_bias=True,
    router_bias=True,
    expert_bias=True,
    shared_intermediate_size=4,
    shared_gate=True,
)
PLAIN = jm.MoEConfig(8, 2, HIDDEN, 8)


def mesh_of(sizes=(4,), names=("ep",), kind=AxisType.Auto):
    return jax.make_mesh(
        sizes, names, axis_types=(kind,) * len(sizes), devices=jax.devices()[: np.prod(sizes)]
    )


def tokens(mesh, seed=0, axes=("ep",)):
    x = np.random.default_rng(seed).normal(size=(8, 3, HIDDEN)).astype(np.float32)
    return jax.device_put(x, NamedSharding(mesh, P(axes)))


def without_none(params):
    """Name to value of what a MoEParams holds."""
    held = {name: getattr(params, name) for name in WEIGHT_NAMES}
    return {name: value for name, value in held.items() if value is not None}


def specs_of(tree):
    """PartitionSpecs by name, without the trailing Nones, which say nothing."""

    def trimmed(spec):
        parts = list(spec)
        while parts and parts[-1] is None:
            parts.pop()
        return P(*parts)

    return jax.tree.map(trimmed, tree, is_leaf=lambda leaf: isinstance(leaf, P))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def assert_same_gradients(a, b):
    """What is taken for an argument is another program to XLA, which may round a product before its sum."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


@functools.cache
def program(mesh):
    """Value, statistics and gradients of sum(y**2) + the losses of FULL, by ``ep_moe``."""

    @jax.jit
    def run(x, params):
        def loss(x, params):
            y, stats = jm.ep_moe(x, params, FULL, mesh=mesh)
            return jnp.sum(y**2) + stats.load_balance_loss + stats.z_loss, (y, stats)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)

    return run


def by_hand(mesh, x, params):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), jm.param_specs(FULL))
    # The mesh in context is a part of what a program is compiled for.
    with jax.set_mesh(mesh):
        return program(mesh)(x, jax.device_put(params, shardings))


def test_nnx_is_ep_moe():
    mesh = mesh_of()
    x = tokens(mesh)
    moe = EpMoE(FULL, mesh=mesh, rngs=nnx.Rngs(0))
    assert moe.score_bias is not None
    moe.score_bias[...] = jnp.linspace(-0.2, 0.2, FULL.num_experts)
    want = by_hand(mesh, x, moe.weights())

    @nnx.jit
    def run(moe, x):
        def loss(x, moe):
            y, stats = moe(x)
            return jnp.sum(y**2) + stats.load_balance_loss + stats.z_loss, (y, stats)

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, moe)

    (value, aux), (d_x, d_moe) = run(moe, x)
    assert_same((value, aux), want[0])
    want_x, want_params = want[1]
    assert_same_gradients(d_x, want_x)
    trained = {name: grad for name, grad in without_none(want_params).items() if name != "score_bias"}
    assert_same_gradients(nnx.to_pure_dict(d_moe), trained)
    assert all(np.abs(grad).max() > 0 for grad in trained.values())


def test_nnx_takes_a_mask_and_the_mesh_in_context():
    mesh = mesh_of()
    x = tokens(mesh)
    mask = jnp.arange(24).reshape(8, 3) % 5 > 0
    with jax.set_mesh(mesh):
        moe = EpMoE(PLAIN, rngs=nnx.Rngs(0))
        y, stats = nnx.jit(lambda moe, x, mask: moe(x, mask))(moe, x, mask)
    assert_same(
        (y, stats), jax.jit(lambda x: jm.ep_moe(x, moe.weights(), PLAIN, mesh=mesh, token_mask=mask))(x)
    )
    assert int(stats.expert_counts.sum()) == 2 * int(mask.sum())


def test_nnx_dtypes():
    mesh = mesh_of()
    x = tokens(mesh)
    moe = EpMoE(PLAIN, mesh=mesh, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {var.dtype for var in jax.tree.leaves(nnx.state(moe))} == {jnp.dtype(jnp.float32)}
    apply = nnx.jit(lambda moe, x: moe(x)[0])
    y = apply(moe, x)
    assert y.dtype == jnp.bfloat16
    exact = apply(EpMoE(PLAIN, mesh=mesh, rngs=nnx.Rngs(0)), x)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)
    assert EpMoE(PLAIN, mesh=mesh, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).w1.dtype == jnp.bfloat16


def test_nnx_takes_meshes_of_more_axes():
    mesh = mesh_of((2, 2, 2), ("dp", "ep", "tp"))
    x = tokens(mesh, axes=("dp", "ep"))
    options = {"tp_axis": "tp", "token_axes": ["dp", "ep"]}
    moe = EpMoE(PLAIN, mesh=mesh, rngs=nnx.Rngs(0), **options)
    y, stats = nnx.jit(lambda moe, x: moe(x))(moe, x)
    assert_same((y, stats), jax.jit(lambda x: jm.ep_moe(x, moe.weights(), PLAIN, mesh=mesh, **options))(x))
    assert moe.w1.sharding.spec == P("ep", None, "tp")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_nnx_shardings_are_those_of_param_specs(kind):
    mesh = mesh_of(kind=kind)
    specs = specs_of(without_none(jm.param_specs(FULL)))
    with jax.set_mesh(mesh):
        moe = nnx.jit(lambda: EpMoE(FULL, mesh=mesh, rngs=nnx.Rngs(0)))()
    assert specs_of(nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(moe)))) == specs
    for name, spec in specs.items():
        array = getattr(moe, name)[...]
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), name
    # 10 experts on 4 ranks: 3 on each, the last two of which nobody routes to.
    assert moe.w1.shape == (12, 16, HIDDEN)
    assert not np.asarray(moe.w1[...])[10:].any()
    assert moe.router.shape == (HIDDEN, 10)


def test_nnx_score_bias_is_no_parameter_and_moves_against_the_load():
    mesh = mesh_of()
    moe = EpMoE(FULL, mesh=mesh, rngs=nnx.Rngs(0))
    assert isinstance(moe.score_bias, ScoreBias)
    assert "score_bias" not in nnx.to_pure_dict(nnx.state(moe, nnx.Param))
    assert list(nnx.to_pure_dict(nnx.state(moe, ScoreBias))) == ["score_bias"]
    optimizer = nnx.Optimizer(moe, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(moe, optimizer, x):
        def loss(moe):
            y, stats = moe(x)
            return jnp.sum(y**2), stats

        grads, stats = nnx.grad(loss, has_aux=True)(moe)
        optimizer.update(moe, grads)
        moe.update_score_bias(stats.expert_counts, 0.25)
        return stats.expert_counts

    counts = np.asarray(step(moe, optimizer, tokens(mesh)))
    np.testing.assert_allclose(moe.score_bias[...], 0.25 * np.sign(counts.mean() - counts), atol=1e-7)
    with pytest.raises(jm.ConfigError, match=r"score_bias=False must be True"):
        EpMoE(PLAIN, mesh=mesh, rngs=nnx.Rngs(0)).update_score_bias(jnp.asarray(counts), 0.25)


@pytest.mark.parametrize("reads_stack", [False, True])
def test_nnx_layers_scan_and_remat(reads_stack):
    """Three layers as one scanned, rematerialised block, against the same layers in a Python loop."""
    mesh = mesh_of()
    x = tokens(mesh)

    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def stack(key):
        return EpMoE(PLAIN, mesh=mesh, rngs=nnx.Rngs(key))

    layers = nnx.jit(stack)(jax.random.split(jax.random.key(3), 3))
    assert layers.w1.shape == (3, 8, 16, HIDDEN)
    assert nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(layers)))["w1"] == P(None, "ep", None, None)

    def scanned(layers):
        of_all = layers.weights(x.dtype) if reads_stack else None

        @nnx.scan(
            in_axes=(nnx.Carry, 0, 0), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: None}
        )
        @nnx.remat
        def body(x, moe, i):
            return x + moe(x, layer=i if reads_stack else None, stack=of_all)[0]

        return jnp.sum(body(x, layers, jnp.arange(3)) ** 2)

    def looped(layers):
        graph, state = nnx.split(layers)
        carry = x
        for i in range(3):
            carry = carry + nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], state))(carry)[0]
        return jnp.sum(carry**2)

    got, want = (nnx.jit(nnx.value_and_grad(f))(layers) for f in (scanned, looped))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name, grad in nnx.to_pure_dict(want[1]).items():
        assert np.abs(grad).max() > 0
        np.testing.assert_allclose(got[1][name][...], grad, rtol=1e-4, atol=1e-4)


def test_linen_is_ep_moe():
    mesh = mesh_of()
    x = tokens(mesh)
    moe = LinenEpMoE(FULL, mesh=mesh, score_bias_rate=0.25)
    apply: Any = moe.apply
    with jax.set_mesh(mesh):
        variables = jax.jit(moe.init)(jax.random.key(0), x)
        specs = specs_of(without_none(jm.param_specs(FULL)))
        bias_spec = specs.pop("score_bias")
        assert specs_of(nn.get_partition_spec(variables)) == {
            "params": specs,
            "score_bias": {"score_bias": bias_spec},
        }
        held = nn.meta.unbox(variables)
        assert held["params"]["w1"].shape == (12, 16, HIDDEN)
        assert not np.asarray(held["score_bias"]["score_bias"]).any()
        params = jm.MoEParams(**held["params"], **held["score_bias"])
        want = by_hand(mesh, x, params)

        @jax.jit
        def run(x, weights):
            def loss(x, weights):
                y, stats = apply(variables | {"params": weights}, x)
                return jnp.sum(y**2) + stats.load_balance_loss + stats.z_loss, (y, stats)

            return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, weights)

        (value, aux), (d_x, grads) = run(x, variables["params"])
        grads = nn.meta.unbox(grads)
        (_, stats), updated = jax.jit(lambda v, x: apply(v, x, mutable=["score_bias"]))(variables, x)
    assert_same((value, aux), want[0])
    assert_same_gradients(d_x, want[1][0])
    trained = {name: grad for name, grad in without_none(want[1][1]).items() if name != "score_bias"}
    assert_same_gradients(grads, trained)
    counts = np.asarray(stats.expert_counts)
    np.testing.assert_allclose(
        updated["score_bias"]["score_bias"], 0.25 * np.sign(counts.mean() - counts), atol=1e-7
    )


def test_linen_on_an_explicit_mesh():
    mesh = mesh_of(kind=AxisType.Explicit)
    x = tokens(mesh)
    moe = LinenEpMoE(PLAIN, mesh=mesh)
    apply: Any = moe.apply
    with jax.set_mesh(mesh):
        variables = jax.jit(moe.init)(jax.random.key(0), x)
        held = nn.meta.unbox(variables)["params"]
        specs = without_none(jm.param_specs(PLAIN))
        assert {name: w.sharding.spec for name, w in held.items()} == {
            name: P(*spec, *[None] * (held[name].ndim - len(spec))) for name, spec in specs.items()
        }
        params = jm.MoEParams(**held)
        assert_same(
            jax.jit(apply)(variables, x), jax.jit(lambda x: jm.ep_moe(x, params, PLAIN, mesh=mesh))(x)
        )


def test_linen_dtypes():
    mesh = mesh_of()
    x = tokens(mesh)
    moe = LinenEpMoE(PLAIN, mesh=mesh, dtype=jnp.bfloat16)
    variables = jax.jit(moe.init)(jax.random.key(0), x)
    assert list(variables) == ["params"]
    assert {w.dtype for w in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(moe.apply, variables, x)[0].dtype == jnp.bfloat16


QUANTISED = dataclasses.replace(FULL, hidden_size=32, intermediate_size=16, expert_quant="fp8_token")


@functools.cache
def quantised(kind=AxisType.Auto):
    """A mesh, weights for serving on it, the expected y and statistics, and x."""
    mesh = mesh_of(kind=kind)
    x = np.random.default_rng(1).normal(size=(8, 3, QUANTISED.hidden_size)).astype(np.float32)
    x = jax.device_put(x, NamedSharding(mesh, P("ep")))
    with jax.set_mesh(mesh):
        master = jm.init_params(jax.random.key(0), QUANTISED)
        frozen = jm.prepare_params(dataclasses.replace(master, b1=master.b1 + 0.5), QUANTISED, mesh)
        return mesh, frozen, jax.jit(lambda x, p: jm.ep_moe(x, p, QUANTISED, mesh=mesh))(x, frozen), x


def test_nnx_serves_quantised_experts():
    mesh, frozen, want, x = quantised()
    moe = EpMoE(QUANTISED, mesh=mesh, params=frozen)
    assert_same(nnx.jit(lambda moe, x: moe(x))(moe, x), want)
    assert_same(moe.weights(), frozen)
    for name in ("w1", "w2", "w1_scale", "w2_scale"):
        assert isinstance(getattr(moe, name), FrozenWeight)
        assert specs_of(getattr(moe, name)[...].sharding.spec) == P("ep")
    trained = {"router", "router_bias", "b1", "b2", "shared_w1", "shared_w2", "shared_gate"}
    assert nnx.to_pure_dict(nnx.state(moe, nnx.Param)).keys() == trained


def test_codes_and_scales_are_not_cast():
    codes = jax.eval_shape(
        lambda: jm.quantize_params(jm.init_params(jax.random.key(0), QUANTISED), QUANTISED)
    )
    cast = jax.eval_shape(lambda params: shared.cast_experts(params, jnp.bfloat16), codes)
    for name, value in without_none(cast).items():
        casts = name in ("b1", "b2", "shared_w1", "shared_w2")
        assert value.dtype == (jnp.bfloat16 if casts else getattr(codes, name).dtype), name


def test_nnx_trains_around_quantised_experts():
    mesh, frozen, _, x = quantised()
    # As from a checkpoint: unpadded, on the host.
    host = jax.tree.map(np.asarray, jm.unpad_params(frozen, QUANTISED))
    moe = EpMoE(QUANTISED, mesh=mesh, params=host)
    optimizer = nnx.Optimizer(moe, optax.adamw(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(moe, optimizer, x):
        grads = nnx.grad(lambda moe: jnp.sum(moe(x)[0] ** 2))(moe)
        optimizer.update(moe, grads)
        return nnx.to_pure_dict(grads)

    grads = step(moe, optimizer, x)
    after = moe.weights()
    for name in ("w1", "w2", "w1_scale", "w2_scale"):
        assert name not in grads
        np.testing.assert_array_equal(getattr(after, name), getattr(frozen, name))
    assert np.abs(after.b1 - frozen.b1).max() > 0.01
    of_codes = nnx.grad(lambda moe: jnp.sum(moe(x)[0]), argnums=nnx.DiffState(0, FrozenWeight))
    with pytest.raises(jm.ConfigError, match="gradient"):
        nnx.eval_shape(of_codes, moe)


def test_linen_serves_quantised_experts():
    mesh, frozen, want, x = quantised(AxisType.Explicit)
    moe = LinenEpMoE(QUANTISED, mesh=mesh)
    apply: Any = jax.jit(moe.apply)
    with jax.set_mesh(mesh):
        variables = moe.variables_of(frozen)
        assert variables["quantised"].keys() == {"w1", "w2", "w1_scale", "w2_scale"}
        assert not variables["params"].keys() & {"w1", "w2", "score_bias"}
        assert_same(apply(variables, x), want)
        held = nn.meta.unbox(variables)
        assert_same(jm.MoEParams(**held["params"], **held["score_bias"], **held["quantised"]), frozen)
        specs = nn.get_partition_spec(variables)["quantised"]
        assert (specs["w1"], specs["w2_scale"]) == (P("ep", None, None), P("ep", None))

        def loss(trained, fixed, x):
            return jnp.sum(moe.apply(variables | {"params": trained, "quantised": fixed}, x)[0] ** 2)

        with pytest.raises(jm.ConfigError, match="gradient"):
            jax.eval_shape(jax.grad(loss, 1), variables["params"], variables["quantised"], x)
        twice = jax.eval_shape(moe.init, jax.random.key(0), x) | {"quantised": variables["quantised"]}
        with pytest.raises(jm.ConfigError, match=r"w1=\['quantised', 'params'\] must be in one collection"):
            jax.eval_shape(moe.apply, twice, x)


def test_modules_hold_given_floating_weights():
    """As what is trained, in the places of random ones."""
    mesh = mesh_of()
    params = jm.init_params(jax.random.key(3), FULL)
    moe = EpMoE(FULL, mesh=mesh, params=params)
    random = nnx.eval_shape(lambda: EpMoE(FULL, mesh=mesh, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(nnx.state(moe)) == jax.tree.structure(nnx.state(random))
    assert_same(jm.unpad_params(moe.weights(), FULL), params)
    linen = LinenEpMoE(FULL, mesh=mesh)
    variables = linen.variables_of(params)
    held = nn.meta.unbox(variables)
    assert_same(jm.unpad_params(jm.MoEParams(**held["params"], **held["score_bias"]), FULL), params)
    made = jax.eval_shape(linen.init, jax.random.key(0), tokens(mesh))
    assert jax.tree.structure(variables) == jax.tree.structure(made)


def test_modules_keep_the_layout_of_codes():
    """Codes that lie in another way have the same shapes, so a lost layout would be wrong numbers."""
    mesh = mesh_of()
    cfg = dataclasses.replace(PLAIN, expert_quant="int8_token", experts="blocked")
    codes = jm.quantize_params(jm.init_params(jax.random.key(0), cfg), cfg)
    laid_out = dataclasses.replace(codes, layout="aiter")
    x = tokens(mesh)
    moe = EpMoE(cfg, mesh=mesh, params=laid_out)
    assert moe.weights().layout == "aiter"
    linen = LinenEpMoE(cfg, mesh=mesh)
    variables = linen.variables_of(laid_out)
    assert variables.keys() == {"params", "quantised_aiter"}
    for call in (lambda: moe(x), lambda: linen.apply(variables, x)):
        with pytest.raises(
            jm.ConfigError, match="params.layout='aiter' must be 'plain' for experts='blocked'"
        ):
            call()


def test_weights_that_a_module_cannot_hold():
    params = jm.init_params(jax.random.key(0), PLAIN)
    with pytest.raises(jm.ConfigError, match="rngs=None must be given without params; pass rngs="):
        EpMoE(PLAIN, mesh=mesh_of())
    for hold in (
        lambda params: EpMoE(PLAIN, mesh=mesh_of(), params=params),
        LinenEpMoE(PLAIN, mesh=mesh_of()).variables_of,
    ):
        with pytest.raises(jm.ConfigError, match=r"params.w1.shape=\(4, 16, 16\) must be \(8, 16, 16\)"):
            hold(dataclasses.replace(params, w1=params.w1[:4]))
        with pytest.raises(jm.ConfigError, match="params='dict' must be a jm.MoEParams"):
            hold(vars(params))


@pytest.mark.parametrize("module", [EpMoE, LinenEpMoE])
def test_without_a_mesh_or_its_axis_the_error_says_what_to_do(module):
    def make(**options):
        if module is EpMoE:
            return EpMoE(PLAIN, rngs=nnx.Rngs(0), **options)
        return LinenEpMoE(PLAIN, **options).init(jax.random.key(0), jnp.ones((8, HIDDEN)))

    with pytest.raises(jm.ShardingError, match=r"mesh=None must find a mesh in context; pass mesh="):
        make()
    with pytest.raises(jm.ShardingError, match=r"ep_axis='experts' must be an axis of the mesh"):
        make(mesh=mesh_of(), ep_axis="experts")
    with pytest.raises(jm.ShardingError, match=r"tp_axis='tp' must be an axis of the mesh"):
        make(mesh=mesh_of(), tp_axis="tp")


def test_flax_is_imported_only_when_asked_for():
    code = (
        "import sys\n"
        "import jax_moriep\n"
        "assert 'flax' not in sys.modules\n"
        "sys.modules['flax'] = None\n"
        "try: import jax_moriep.flax\n"
        "except ImportError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("jax_moriep.flax needs flax")
    assert "pip install 'jax-moriep[flax]'" in done.stdout
