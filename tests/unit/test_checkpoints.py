"""A run saved by orbax at one expert-parallel size goes on at another as if nothing had been in between."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.config import WEIGHT_NAMES
from jax_moriep.flax import EpMoE, LinenEpMoE

# 10 experts are stored as 12 on 4 ranks and as 16 on 8.
CFG = jm.MoEConfig(10, 2, 16, 8, router="sigmoid_topk", score_bias=True, expert_bias=True)
TX = optax.adamw(1e-2)
RATE = 0.05


def mesh_of(size, kind=AxisType.Auto):
    return jax.make_mesh((size,), ("ep",), axis_types=(kind,), devices=jax.devices()[:size])


def cost(y, stats, x):
    return jnp.mean((y - jnp.roll(x, 1, -1)) ** 2) + 0.01 * stats.load_balance_loss


class Plain:
    """A training run on MoEParams; ``state`` holds the weights and adam's moments."""

    def __init__(self, mesh):
        self.mesh = mesh
        params = jm.pad_params(jm.init_params(jax.random.key(0), CFG), mesh.size)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), jm.param_specs(CFG))
        params = jax.device_put(params, shardings)
        with jax.set_mesh(mesh):
            self.state: Any = (params, TX.init(params))

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, state, x):
        params, moments = state

        def loss(params):
            y, stats = jm.ep_moe(x, params, CFG, mesh=self.mesh)
            return cost(y, stats, x), stats

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = TX.update(grads, moments, params)
        params: Any = optax.apply_updates(params, updates)
        bias = jm.update_score_bias(params.score_bias, stats.expert_counts, RATE)
        return (dataclasses.replace(params, score_bias=bias), moments), value


class Nnx:
    """The same with an nnx module and its optimizer."""

    def __init__(self, mesh):
        self.mesh = mesh

        @nnx.jit
        def make():
            moe = EpMoE(CFG, mesh=mesh, rngs=nnx.Rngs(0))
            return moe, nnx.Optimizer(moe, TX, wrt=nnx.Param)

        with jax.set_mesh(mesh):
            self.graph, self.state = nnx.split(make())

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, state, x):
        moe, optimizer = nnx.merge(self.graph, state)

        def loss(moe):
            y, stats = moe(x)
            return cost(y, stats, x), stats

        (value, stats), grads = nnx.value_and_grad(loss, has_aux=True)(moe)
        optimizer.update(moe, grads)
        moe.update_score_bias(stats.expert_counts, RATE)
        return nnx.state((moe, optimizer)), value


class Linen:
    """The same with a linen module's variables, boxed as ``init`` gives them."""

    def __init__(self, mesh):
        self.mesh = mesh
        self.moe = LinenEpMoE(CFG, mesh=mesh, score_bias_rate=RATE)
        x = jnp.zeros((mesh.size, CFG.hidden_size))
        shardings = nn.get_sharding(jax.eval_shape(self.moe.init, jax.random.key(0), x), mesh)
        with jax.set_mesh(mesh):
            variables = jax.jit(self.moe.init, out_shardings=shardings)(jax.random.key(0), x)
            self.state: Any = (variables, TX.init(variables["params"]))

    @functools.partial(jax.jit, static_argnums=0)
    def step(self, state, x):
        variables, moments = state

        def loss(weights):
            (y, stats), moved = self.moe.apply(variables | {"params": weights}, x, mutable=["score_bias"])
            return cost(y, stats, x), moved

        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        updates, moments = TX.update(grads, moments, variables["params"])
        weights = optax.apply_updates(variables["params"], updates)
        return ({"params": weights} | moved, moments), value


def train(run, steps):
    """The losses of some steps, each with tokens of its own."""
    losses = []
    for i in steps:
        x = np.random.default_rng(i).normal(size=(40, CFG.hidden_size)).astype(np.float32)
        with jax.set_mesh(run.mesh):
            x = jax.device_put(x, NamedSharding(run.mesh, P("ep")))
            run.state, value = run.step(run.state, x)
        losses.append(float(value))
    return losses


def abstract(state):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, state)


@pytest.mark.parametrize(("kind", "sizes"), [(Plain, (2, 8, 1, 5)), (Nnx, (8, 5)), (Linen, (8, 5))])
def test_resuming_at_another_size_is_the_unbroken_run(kind, sizes, tmp_path):
    run = kind(mesh_of(4))
    train(run, range(2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", jm.unpad_params(run.state, CFG))
    assert {12} == {leaf.shape[0] for leaf in jax.tree.leaves(run.state) if leaf.ndim == 3}
    losses = train(run, range(2, 4))
    assert losses[1] < losses[0]

    for size in sizes:
        fresh = kind(mesh_of(size))
        with ocp.StandardCheckpointer() as checkpointer:
            target = jm.unpad_params(abstract(fresh.state), CFG)
            restored = checkpointer.restore(tmp_path / "state", target)
        assert {10} == {leaf.shape[0] for leaf in jax.tree.leaves(restored) if leaf.ndim == 3}
        state = jm.pad_like(restored, fresh.state, CFG)
        assert jax.tree.structure(state) == jax.tree.structure(fresh.state)
        for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(fresh.state), strict=True):
            assert (got.shape, got.dtype, got.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
        fresh.state = state
        np.testing.assert_allclose(train(fresh, range(2, 4)), losses, rtol=2e-6, err_msg=f"{size} ranks")


# ----- trees that are only made, not trained

STACKED = jm.MoEConfig(10, 2, 128, 64, router_bias=True, expert_bias=True, expert_quant="fp8_block")


@functools.cache
def unpadded(quantised):
    params = jm.init_params(jax.random.key(0), STACKED)
    return jax.tree.map(np.asarray, jm.quantize_params(params, STACKED) if quantised else params)


def weights(num_experts, quantised=False, layers=None):
    """The layer's weights on the host with zeros behind its 10 experts, of stacked layers or of one."""
    params = unpadded(quantised)
    padded = {}
    for name in ("w1", "w2", "b1", "b2", "w1_scale", "w2_scale"):
        w = getattr(params, name)
        if w is not None:
            padded[name] = np.concatenate([w, np.zeros((num_experts - 10, *w.shape[1:]), w.dtype)])
    params = dataclasses.replace(params, **padded)
    return params if layers is None else jax.tree.map(lambda w: np.stack([w] * layers), params)


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("quantised", [False, True], ids=["floats", "codes"])
def test_a_tree_without_padding_and_back(quantised, layers):
    # What is named or shaped as weights, but not both, belongs to others.
    dense = {"w1": np.ones((12, 7)), "w2": np.ones((12, 128, 64)), "b1": np.ones((12, 128))}

    def tree(num_experts):
        made = weights(num_experts, quantised, layers)
        return {
            "decoder": {"moe": {n: getattr(made, n) for n in WEIGHT_NAMES}, "mlp": dense},
            "moments": [made, (made,)],
        }

    for num_experts in (12, 16):
        cut = jm.unpad_params(tree(num_experts), STACKED)
        assert_same(cut, tree(10))
        assert cut["decoder"]["mlp"]["w2"] is dense["w2"]
        assert_same(jm.pad_like(cut, tree(num_experts), STACKED), tree(num_experts))
        # Nothing to do, and the way without a stop at 10.
        assert_same(jm.unpad_params(cut, STACKED), tree(10))
        assert_same(jm.pad_like(tree(num_experts), tree(14), STACKED), tree(14))


def test_a_padded_checkpoint_restored_by_orbax_alone(tmp_path):
    """``strict=False`` cuts and fills every array whose shape differs: docs/checkpoints.md tells users."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "padded", weights(12))
    everywhere = NamedSharding(mesh_of(2), P())
    for num_experts in (10, 16):
        target = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=everywhere), weights(num_experts)
        )
        with ocp.StandardCheckpointer() as checkpointer:
            assert_same(checkpointer.restore(tmp_path / "padded", target, strict=False), weights(num_experts))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shardings_stay_even(kind):
    """On 8 ranks with tp; concrete, abstract, and traced by jit."""
    mesh = jax.make_mesh((4, 2), ("ep", "tp"), axis_types=(kind,) * 2)
    specs = jm.param_specs(STACKED, "ep", "tp")
    padded = weights(12)
    placed = jax.device_put(padded, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    wanted = dataclasses.replace(
        specs, w1=P(None, "ep", "tp"), w2=P(None, "ep", "tp"), b1=P(None, "ep"), b2=P(None, "ep")
    )

    def assert_even(params):
        for name in ("router", "router_bias", "w1", "w2", "b1", "b2"):
            w = getattr(params, name)
            assert w.sharding.is_equivalent_to(NamedSharding(mesh, getattr(wanted, name)), w.ndim), name

    with jax.set_mesh(mesh):
        cut = jm.unpad_params(placed, STACKED)
        assert_even(cut)
        assert_even(jm.unpad_params(abstract(placed), STACKED))
        assert_same(cut, weights(10))
        back = jm.pad_like(cut, abstract(placed), STACKED)
        assert_same(back, padded)
        assert back.w1.sharding == placed.w1.sharding
        from_host = jm.pad_like(weights(10), placed, STACKED)
        assert_same(from_host, padded)
        assert from_host.w1.sharding == placed.w1.sharding

        there_and_back = jax.jit(
            lambda params: (made := jm.unpad_params(params, STACKED), jm.pad_like(made, params, STACKED))
        )
        made, again = there_and_back(placed)
        assert_same(made, weights(10))
        assert_same(again, padded)
        if kind == AxisType.Explicit:
            assert_even(made)
            assert again.w1.sharding.spec == placed.w1.sharding.spec


def test_moments_of_masked_weights_and_factored_ones():
    params = weights(12)
    mask = dataclasses.replace(jax.tree.map(lambda _: True, params), router=False, b1=False)
    tx = optax.chain(
        optax.masked(optax.scale_by_adam(), mask), optax.scale_by_factored_rms(min_dim_size_to_factor=64)
    )
    state = (params, tx.init(params))
    whole = jm.unpad_params(params, STACKED)
    cut = jm.unpad_params(state, STACKED)
    assert_same(cut, (whole, tx.init(whole)))
    assert cut[1][1].v_row.w1.shape == (10, 128)
    back = jm.pad_like(cut, state, STACKED)
    assert [w.shape for w in jax.tree.leaves(back)] == [w.shape for w in jax.tree.leaves(state)]


def test_layers_of_two_configs_take_two_calls():
    small = dataclasses.replace(STACKED, num_experts=6, router_bias=False, expert_bias=False)
    w = weights(10)
    of_small = jm.MoEParams(router=w.router[:, :6], w1=w.w1[:8], w2=w.w2[:8])
    tree = {"a": weights(12), "b": of_small}
    cut = jm.unpad_params(jm.unpad_params(tree, STACKED), small)
    assert_same(cut["a"], w)
    assert (cut["b"].w1.shape[0], cut["b"].w2.shape[0]) == (6, 6)
    back = jm.pad_like(jm.pad_like(cut, tree, small), tree, STACKED)
    assert_same(back["a"], tree["a"])
    assert not back["b"].w1[6:].any()
    np.testing.assert_array_equal(back["b"].w1[:6], w.w1[:6])


def test_a_layer_with_as_many_experts_as_another_is_padded_to_is_left_alone():
    w = weights(12)
    of_twelve = jm.MoEParams(router=jnp.ones((w.router.shape[0], 12)), w1=w.w1 + 1, w2=w.w2 + 1)
    for tree in ({"a": w, "b": of_twelve}, {"a": of_twelve, "b": w}):
        cut = jm.unpad_params(tree, STACKED)
        assert sorted(part.w1.shape[0] for part in cut.values()) == [10, 12]
        assert_same(jm.pad_like(cut, tree, STACKED), tree)


CODES = ("w1", "w2", "w1_scale", "w2_scale")


def in_collections(params):
    """As ``LinenEpMoE.variables_of`` has quantised weights."""
    held = {name: getattr(params, name) for name in WEIGHT_NAMES if getattr(params, name) is not None}
    codes = {name: held.pop(name) for name in CODES}
    return {"params": held, "quantised": codes}


def with_experts(num_experts):
    """Another layer's codes, none of them padding, with its router."""
    params = weights(num_experts, quantised=True)
    return dataclasses.replace(params, router=np.ones((128, num_experts), np.float32), router_bias=None)


@pytest.mark.parametrize("of", [lambda tree: tree, abstract], ids=["arrays", "abstract"])
def test_codes_apart_from_their_router_are_cut_by_it(of):
    """To 10 where the router has 10 columns, and not where it has 12; biases stay beside the router."""
    padded, other = weights(12, quantised=True), with_experts(12)
    for make in (
        lambda ours, theirs: {"enc": in_collections(ours), "dec": in_collections(theirs)},
        lambda ours, theirs: {
            name: {"enc": in_collections(ours)[name], "dec": in_collections(theirs)[name]}
            for name in ("params", "quantised")
        },
    ):
        tree = of(jax.tree.map(jnp.asarray, make(padded, other)))
        cut = jm.unpad_params(tree, STACKED)
        wanted = make(weights(10, quantised=True), other)
        assert jax.tree.map(lambda w: w.shape, cut) == jax.tree.map(lambda w: w.shape, wanted)
        back = jm.pad_like(cut, tree, STACKED)
        assert jax.tree.map(lambda w: w.shape, back) == jax.tree.map(lambda w: w.shape, tree)


def test_codes_that_are_put_back_come_with_the_same_router():
    like = in_collections(weights(12, quantised=True))
    codes = in_collections(with_experts(12))
    for name in ("b1", "b2", "router_bias"):
        codes["params"].pop(name, None)
        del like["params"][name]
    with pytest.raises(jm.ConfigError, match=r"params\['params'\]\['router'\].shape=\(128, 12\) must be"):
        jm.pad_like(codes, like, STACKED)


def test_moments_of_biases_without_experts_beside_them_are_cut():
    """As an nnx optimizer has them, which does not see codes."""
    held = in_collections(weights(12, quantised=True))["params"]
    state = (weights(12, quantised=True), optax.adam(0.1).init(jax.tree.map(jnp.asarray, held)))
    moments = jm.unpad_params(state, STACKED)[1][0]
    assert {name: w.shape[0] for name, w in moments.mu.items()} == {
        "router": 128,
        "router_bias": 10,
        "b1": 10,
        "b2": 10,
    }


def test_moments_of_another_layer_without_its_router_are_left_alone():
    ours = weights(12)
    other = dataclasses.replace(weights(12), router=np.ones((128, 12), np.float32), router_bias=None)
    params = {"a": ours, "b": other}
    mask = jax.tree_util.tree_map_with_path(lambda path, _: "router" not in str(path), params)
    state = (params, optax.masked(optax.scale_by_adam(), mask).init(params))
    moments = jm.unpad_params(state, STACKED)[1].inner_state.mu
    assert (moments["a"].w1.shape[0], moments["b"].w1.shape[0]) == (10, 12)


def test_what_was_saved_with_padding_goes_on_without_by_two_calls():
    """The one call is refused, for with its arguments swapped it would give the fresh state back."""
    like = (weights(10), optax.adafactor(0.1, min_dim_size_to_factor=64).init(weights(10)))
    padded = (weights(12), optax.adafactor(0.1, min_dim_size_to_factor=64).init(weights(12)))
    with pytest.raises(jm.ConfigError, match=r"params\[0\].w1.shape=.* for like has no padding; swap params"):
        jm.pad_like(padded, like, STACKED)
    assert_same(jm.pad_like(jm.unpad_params(padded, STACKED), like, STACKED), like)


def test_arrays_that_jax_may_move_stay_so():
    w = jax.tree.map(jnp.asarray, weights(12))
    cut = jm.unpad_params(w, STACKED)
    assert not any(a.committed for a in jax.tree.leaves([cut, jm.pad_like(cut, w, STACKED)]))


def test_a_donated_array_is_refused():
    w = jax.tree.map(jnp.array, weights(12))
    like = weights(12)
    w.w2.delete()
    for call in (lambda: jm.unpad_params(w, STACKED), lambda: jm.pad_like(w, like, STACKED)):
        with pytest.raises(
            jm.ConfigError, match=r"params.w2 was donated .* is deleted; pass the state that it"
        ):
            call()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda p: jm.pad_like(dataclasses.replace(p, router=p.router[:, :3]), p, STACKED),
            r"params.router.shape=\(128, 3\) must be \(128, 10\), as in like; pass the state",
        ),
        (lambda p: jm.unpad_params(p, "cfg"), "cfg='str' must be a jm.MoEConfig"),
        (
            lambda p: jm.unpad_params(p, dataclasses.replace(STACKED, num_experts=11)),
            r"params must hold weights of a layer of this cfg: .* shape \[..., 11 or more, 128, 128\]; pass",
        ),
        (lambda p: jm.unpad_params([p.w1], STACKED), "params must hold weights of a layer of this cfg"),
        (lambda p: jm.pad_like(p, [p.w1], STACKED), "like must hold weights of a layer of this cfg"),
        (
            lambda p: jm.unpad_params({"moe": dataclasses.replace(p, w2=p.w2[:10])}, STACKED),
            r"params\['moe'\].w2.shape=\(10, 128, 64\) must have 12 experts along axis 0.*pad them alike",
        ),
        (
            lambda p: jm.pad_like(dataclasses.replace(p, w1=p.w1[:9]), p, STACKED),
            r"params.w1.shape=\(9, 128, 128\) must be \(12, 128, 128\), with 10 or more along axis 0; pass",
        ),
        (
            lambda p: jm.pad_like(p, weights(10), STACKED),
            r"params.w1.shape=\(12, .*\) must be \(10, 128, 128\), for like has no padding; swap .* else",
        ),
        (
            lambda p: jm.unpad_params({"codes": in_collections(weights(12, True))["quantised"]}, STACKED),
            r"params\['codes'\]\['w1'\].shape=\(12, .*\) must not leave open how many of its 12 experts are "
            "padding.*; pass the whole state",
        ),
        (
            lambda p: jm.pad_like(p, {"moe": dataclasses.replace(p, w2=p.w2[:10])}, STACKED),
            r"like\['moe'\].w2.shape=\(10, 128, 64\) must have 12 experts",
        ),
        (
            lambda p: jm.pad_like({"moe": p}, {"moe": p, "step": 3}, STACKED),
            r"params has nothing more where like has \['step'\], and must have the same structure",
        ),
    ],
)
def test_what_cannot_be_unpadded_or_padded_is_said(call, text):
    with pytest.raises(jm.ConfigError, match=text):
        call(weights(12))
