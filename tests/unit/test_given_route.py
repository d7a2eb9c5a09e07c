"""ep_moe with routes that are chosen elsewhere, against a product of every token with every expert."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_moriep as jm

EXPERTS, TOP_K, HIDDEN, INNER = 8, 3, 16, 8
CFG = jm.MoEConfig(EXPERTS, TOP_K, HIDDEN, INNER)


def mesh_of(*sizes, names=("ep",), kind=AxisType.Auto):
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(sizes))


def problem(*lead, seed=0):
    """x, dy, params, and a route with missing and with repeated experts that no router would choose."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, EXPERTS, (*lead, TOP_K)).astype(np.int32)
    ids.reshape(-1, TOP_K)[:2] = [[-1] * TOP_K, [5] * TOP_K]
    route = jm.Route(
        ids=jnp.asarray(ids),
        weights=jnp.asarray(rng.normal(size=ids.shape), jnp.float32),
        scores=jnp.asarray(rng.uniform(size=(*lead, EXPERTS)), jnp.float32),
        logits=jnp.asarray(rng.normal(size=(*lead, EXPERTS)), jnp.float32),
    )
    x, dy = (jnp.asarray(rng.normal(size=(*lead, HIDDEN)), jnp.float32) for _ in range(2))
    return x, dy, jm.init_params(jax.random.key(seed), CFG), route


def dense(x, w1, w2, ids, weights, *, on_input=False):
    """Every expert on every token, added by a one-hot matrix of the routes."""
    hot = (ids[..., None] == np.arange(EXPERTS)).astype(np.float32)  # [.., K, E]

    def experts(rows):  # [.., H] -> [.., E, H]
        pre = jnp.einsum("...h,eih->...ei", rows, w1)
        gate, up = pre[..., :INNER], pre[..., INNER:]
        return jnp.einsum("...ei,ehi->...eh", gate / (1 + jnp.exp(-gate)) * up, w2)

    if on_input:
        return sum(
            jnp.einsum("...e,...eh->...h", hot[..., k, :], experts(x * weights[..., k, None]))
            for k in range(TOP_K)
        )
    return jnp.einsum("...ke,...k,...eh->...h", hot, weights, experts(x))


def compare(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("ranks", "lead", "router"), [(3, (7,), "llama4"), (4, (4, 6), "softmax_topk")])
def test_routes_are_followed_and_their_weights_have_gradients(ranks, lead, router):
    x, dy, params, route = problem(*lead)
    cfg = dataclasses.replace(CFG, router=router)

    def loss(x, w1, w2, weights):
        given = dataclasses.replace(route, weights=weights)
        used = dataclasses.replace(params, w1=w1, w2=w2)
        y, stats = jm.ep_moe(x, used, cfg, mesh=mesh_of(ranks), route=given)
        return jnp.sum(y * dy), stats

    def by_dense(x, w1, w2, weights):
        y = dense(x, w1, w2, np.asarray(route.ids), weights, on_input=router == "llama4")
        return jnp.sum(y * dy)

    operands = (x, params.w1, params.w2, route.weights)
    every = tuple(range(4))
    (value, stats), grads = jax.jit(jax.value_and_grad(loss, every, has_aux=True))(*operands)
    with jax.default_matmul_precision("highest"):
        compare((value, grads), jax.jit(jax.value_and_grad(by_dense, every))(*operands))
    wanted = np.bincount(np.asarray(route.ids).reshape(-1) + 1, minlength=EXPERTS + 1)[1:]
    np.testing.assert_array_equal(stats.expert_counts, wanted)


def test_its_own_route_changes_nothing():
    """Values, statistics and gradients, on an Explicit mesh of two axes with a mask."""
    x, dy, params, _ = problem(4, 6)
    mesh = mesh_of(2, 2, names=("dp", "ep"), kind=AxisType.Explicit)
    params = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), params, jm.param_specs(CFG))
    split = NamedSharding(mesh, PartitionSpec(("dp", "ep")))
    mask = jax.device_put(np.arange(24).reshape(4, 6) % 5 != 0, split)

    def loss(x, params, given):
        route = jm.route(x, params, CFG) if given else None
        y, stats = jm.ep_moe(x, params, CFG, mesh=mesh, token_mask=mask, route=route)
        return jnp.sum(y * dy) + stats.load_balance_loss + stats.z_loss, (y, stats)

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    x = jax.device_put(x, split)
    compare(step(x, params, True), step(x, params, False))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda r: (r.ids, r.weights), "route='tuple' must be a jm.Route"),
        (lambda r: dataclasses.replace(r, ids=r.ids[:-1]), r"route.ids.shape=\(3, 3\) must be \(4, 3\)"),
        (lambda r: dataclasses.replace(r, ids=r.weights), "route.ids.dtype='float32' must be of kind int"),
        (lambda r: dataclasses.replace(r, scores=None), "route.scores='NoneType' must be an array"),
    ],
)
def test_what_is_no_route_for_x_is_refused(change, text):
    x, _, params, route = problem(4)
    with pytest.raises(jm.ConfigError, match=text):
        jm.ep_moe(x, params, CFG, mesh=mesh_of(2), route=change(route))


def test_ids_of_64_bits_are_no_others_than_they_say():
    """What is left of 2**32 + 1 in 32 bits is expert 1."""
    x, _, params, route = problem(8)
    mesh = mesh_of(2)
    nowhere = dataclasses.replace(route, ids=jnp.full_like(route.ids, -1))
    want, _ = jm.ep_moe(x, params, CFG, mesh=mesh, route=nowhere)
    with jax.enable_x64(True):
        for far in (2**32 + 1, 1 - 2**32):
            ids = jnp.full(route.ids.shape, far, jnp.int64)
            y, stats = jm.ep_moe(x, params, CFG, mesh=mesh, route=dataclasses.replace(route, ids=ids))
            np.testing.assert_array_equal(y, want)
            assert int(stats.expert_counts.sum()) == 0
        same = dataclasses.replace(route, ids=route.ids.astype(jnp.int64))
        y, _ = jm.ep_moe(x, params, CFG, mesh=mesh, route=same)
    np.testing.assert_array_equal(y, jm.ep_moe(x, params, CFG, mesh=mesh, route=route)[0])
