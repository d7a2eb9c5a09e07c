"""ep_moe on every transport against the loop oracle: values and all gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_moriep as jm
from jax_moriep.plan import ExchangeShape
from tests.contract import meshes, oracle

HIDDEN, INNER = 16, 8


def params_of(layer):
    return jm.MoEParams(
        **{
            name: jnp.asarray(getattr(layer, name), jnp.float32)
            for name in ("router", "w1", "w2", "shared_w1", "shared_w2")
            if getattr(layer, name) is not None
        }
    )


@functools.cache
def step(cfg, mesh, **options):
    """Jitted value and gradients of sum(y * dy), with the statistics."""

    def loss(x, params, dy, mask):
        y, stats = jm.ep_moe(x, params, cfg, mesh=mesh, token_mask=mask, **options)
        return jnp.sum(y * dy), (y, stats)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def compare(cfg, mesh, layer, x, dy, mask=None, tol=3e-5, **options):
    """Runs one step and compares y and every gradient with the oracle; returns the statistics."""
    (_, (y, stats)), (d_x, d_params) = step(cfg, mesh, **options)(x, params_of(layer), dy, mask)
    flat_mask = None if mask is None else np.asarray(mask).reshape(-1)
    want_y, want = layer.forward_backward(
        np.asarray(x, np.float64).reshape(-1, HIDDEN),
        np.asarray(dy, np.float64).reshape(-1, HIDDEN),
        flat_mask,
    )
    np.testing.assert_allclose(np.asarray(y).reshape(-1, HIDDEN), want_y, atol=tol, rtol=tol)
    np.testing.assert_allclose(np.asarray(d_x).reshape(-1, HIDDEN), want.pop("x"), atol=tol, rtol=tol)
    for name, grad in want.items():
        np.testing.assert_allclose(
            np.asarray(getattr(d_params, name)), grad, atol=10 * tol, rtol=tol, err_msg=name
        )
    return stats


def tokens(rng, *lead):
    return tuple(rng.normal(size=(*lead, HIDDEN)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize(("num_ranks", "num_experts"), [(1, 10), (2, 8), (3, 8), (4, 10), (8, 10)])
def test_values_and_all_gradients(transport, num_ranks, num_experts):
    rng = np.random.default_rng(num_ranks * num_experts)
    layer = oracle.random_layer(rng, num_experts, 3, HIDDEN, INNER)
    cfg = jm.MoEConfig(num_experts, 3, HIDDEN, INNER, transport=transport)
    stats = compare(cfg, meshes.of(num_ranks), layer, *tokens(rng, num_ranks, 5))
    assert int(stats.expert_counts.sum()) == num_ranks * 5 * 3
    assert int(stats.recv_rows.sum()) == num_ranks * 5 * 3
    assert not bool(stats.overflow)


@pytest.mark.token_major
def test_masked_tokens_are_as_if_absent(transport):
    rng = np.random.default_rng(20)
    layer = oracle.random_layer(rng, 10, 2, HIDDEN, INNER, shared=8)
    cfg = jm.MoEConfig(10, 2, HIDDEN, INNER, transport=transport, shared_intermediate_size=8)
    x, dy = tokens(rng, 4, 6)
    mask = rng.uniform(size=(4, 6)) < 0.6
    mask[2] = False  # a rank without a token
    x[~mask] = np.nan  # what a masked token holds must not matter
    stats = compare(cfg, meshes.up_to(4), layer, x, dy, mask)
    assert int(stats.expert_counts.sum()) == 2 * mask.sum()
    _, (y, _) = step(cfg, meshes.up_to(4))(x, params_of(layer), dy, mask)[0]
    np.testing.assert_array_equal(np.asarray(y)[~mask], 0)


@pytest.mark.parametrize("count", [1, 7])
def test_any_number_of_tokens(transport, count):
    """A count that the ranks do not divide is padded with tokens that nothing sees."""
    rng = np.random.default_rng(count)
    layer = oracle.random_layer(rng, 8, 2, HIDDEN, INNER)
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport=transport)
    stats = compare(cfg, meshes.up_to(4), layer, *tokens(rng, count))
    assert int(stats.expert_counts.sum()) == 2 * count


def test_no_tokens_at_all(transport):
    rng = np.random.default_rng(21)
    layer = oracle.random_layer(rng, 8, 2, HIDDEN, INNER)
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport=transport)
    x, dy = tokens(rng, 0)
    (_, (y, stats)), (_, d_params) = step(cfg, meshes.up_to(4))(x, params_of(layer), dy, None)
    assert y.shape == (0, HIDDEN)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((stats, d_params)))


def test_shared_expert_and_unnormalised_weights(transport):
    rng = np.random.default_rng(22)
    layer = oracle.random_layer(rng, 8, 3, HIDDEN, INNER, shared=8, norm=False)
    cfg = jm.MoEConfig(8, 3, HIDDEN, INNER, transport=transport, shared_intermediate_size=8, norm_topk=False)
    compare(cfg, meshes.up_to(4), layer, *tokens(rng, 4, 5))


@pytest.mark.parametrize(
    ("sizes", "names", "options"),
    [
        ((4, 2), ("ep", "dp"), {}),
        ((2, 2, 2), ("dp", "ep", "tp"), {"tp_axis": "tp"}),
        ((2, 4), ("tp", "ep"), {"tp_axis": "tp"}),
        ((3, 2), ("ep", "tp"), {"tp_axis": "tp"}),
    ],
)
def test_meshes(transport, sizes, names, options):
    rng = np.random.default_rng(23)
    layer = oracle.random_layer(rng, 10, 3, HIDDEN, INNER, shared=4)
    cfg = jm.MoEConfig(10, 3, HIDDEN, INNER, transport=transport, shared_intermediate_size=4)
    mesh = meshes.up_to(*sizes, names=names)
    stats = compare(cfg, mesh, layer, *tokens(rng, 8, 6), **options)
    assert int(stats.expert_counts.sum()) == 8 * 6 * 3


def test_quantised_experts(transport):
    """Codes by prepare_params on any transport, beside master weights in the plainest program; 10 experts are
    padded where the ranks do not divide them."""
    hidden, inner = 136, 24
    cfg = jm.MoEConfig(10, 3, hidden, inner, transport=transport, expert_quant="fp8_block")
    plain = dataclasses.replace(cfg, transport="reference", experts="reference")
    params, mesh = jm.init_params(jax.random.key(0), cfg), meshes.up_to(4)
    x, dy = (np.random.default_rng(26).normal(size=(2, 20, hidden)) / 8).astype(np.float32)

    def values(cfg, params):
        def loss(x, router, params):
            y, _ = jm.ep_moe(x, dataclasses.replace(params, router=router), cfg, mesh=mesh)
            return jnp.sum(y * dy), y

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, y), gradients = run(x, params.router, params)
        return y, *gradients

    # Cotangents of master weights are quantised as well, so the ways back differ.
    want = values(plain, jm.prepare_params(params, plain, mesh))
    got = values(cfg, jm.prepare_params(params, cfg, mesh))
    np.testing.assert_allclose(want[0], values(plain, params)[0], rtol=0, atol=1e-5)
    for name, a, b in zip(("y", "d_x", "d_router"), got, want, strict=True):
        # A code that lies on a border of rounding may be its neighbour in another program.
        error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)
        assert error < 3e-3, (name, error)


def test_biases_and_gates_under_tensor_parallelism(transport):
    """Each bias is added once and each gate scales once, however many devices share an expert."""
    cfg = jm.MoEConfig(
        10,
        3,
        HIDDEN,
        INNER,
        router="gpt_oss",
        router_bias=True,
        activation="swiglu_clamped",
        expert_bias=True,
        shared_intermediate_size=4,
        shared_gate=True,
        transport=transport,
    )
    rng = np.random.default_rng(25)
    filled = {
        name: jnp.asarray(rng.normal(size=value.shape), jnp.float32)
        for name, value in vars(jm.init_params(jax.random.key(0), cfg)).items()
        if hasattr(value, "shape")
    }
    params, (x, dy) = jm.MoEParams(**filled), tokens(rng, 8, 6)
    (_, (want_y, _)), want = step(cfg, meshes.up_to(4))(x, params, dy, None)
    mesh = meshes.up_to(2, 2, 2, names=("dp", "ep", "tp"))
    (_, (y, _)), got = step(cfg, mesh, tp_axis="tp")(x, params, dy, None)
    np.testing.assert_allclose(np.asarray(y), np.asarray(want_y), atol=1e-3, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-2, rtol=1e-3)


def test_nan_in_one_token_reaches_no_other(transport):
    """Neither the values nor the gradients of other tokens; its own are NaN, and none is hidden."""
    rng = np.random.default_rng(26)
    layer = oracle.random_layer(rng, 8, 2, HIDDEN, INNER)
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport=transport)
    x, dy = tokens(rng, 4, 5)
    (_, (want_y, _)), (want_d_x, _) = step(cfg, meshes.up_to(4))(x, params_of(layer), dy, None)
    bad = x.copy()
    bad[2, 3] = np.nan
    (_, (y, _)), (d_x, _) = step(cfg, meshes.up_to(4))(bad, params_of(layer), dy, None)
    others = np.ones((4, 5), bool)
    others[2, 3] = False
    for got, want in ((y, want_y), (d_x, want_d_x)):
        assert np.isnan(np.asarray(got)[2, 3]).any()
        np.testing.assert_allclose(np.asarray(got)[others], np.asarray(want)[others], atol=1e-5)


def test_tokens_replicated_over_an_axis(transport):
    """An axis that token_axes leaves out holds copies; each copy runs its own exchange."""
    rng = np.random.default_rng(24)
    layer = oracle.random_layer(rng, 8, 2, HIDDEN, INNER)
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport=transport)
    compare(cfg, meshes.up_to(2, 4, names=("pp", "ep")), layer, *tokens(rng, 8, 3), token_axes="ep")


def test_finite_differences(transport):
    """The gradient of a small layer against central differences, without any oracle.

    Only tokens whose choice of experts is clear take part, for a step that changes it meets a jump.
    """
    rng = np.random.default_rng(25)
    layer = oracle.random_layer(rng, 6, 2, HIDDEN, INNER)
    cfg = jm.MoEConfig(6, 2, HIDDEN, INNER, transport=transport)
    mesh = meshes.up_to(3)
    many, dy = tokens(rng, 100)[0], tokens(rng, 3, 2)[1]
    logits = np.sort(many @ layer.router, axis=1)
    x = many[np.argsort(logits[:, -3] - logits[:, -2])[:6]].reshape(3, 2, HIDDEN)
    params = params_of(layer)
    run = step(cfg, mesh)
    _, (d_x, d_params) = run(x, params, dy, None)
    for seed in range(3):
        direction = jax.tree.map(
            lambda leaf, seed=seed: np.random.default_rng(seed).normal(size=leaf.shape).astype(np.float32),
            (x, params),
        )
        eps = 1e-2
        values = []
        for by in (eps, -eps):
            moved = jax.tree.map(lambda leaf, d, by=by: leaf + by * d, (x, params), direction)
            values.append(float(run(*moved, dy, None)[0][0]))
        slope = (values[0] - values[1]) / (2 * eps)
        want = sum(
            float(np.sum(g * d))
            for g, d in zip(jax.tree.leaves((d_x, d_params)), jax.tree.leaves(direction), strict=True)
        )
        assert slope == pytest.approx(want, rel=3e-2, abs=3e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(transport, dtype):
    if (transport, dtype) == ("mori", "float16"):
        pytest.skip("MORI has no kernels for float16; test_exchange.py holds its refusal")
    rng = np.random.default_rng(26)
    layer = oracle.random_layer(rng, 8, 2, HIDDEN, INNER)
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport=transport)
    x, dy = (jnp.asarray(a, dtype) for a in tokens(rng, 4, 5))
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params_of(layer))
    exact = oracle.Layer(
        *(np.asarray(getattr(params, n).astype(jnp.float32), np.float64) for n in ("router", "w1", "w2")),
        top_k=2,
    )
    (_, (y, _)), (d_x, d_params) = step(cfg, meshes.up_to(4))(x, params, dy, None)
    assert y.dtype == d_x.dtype == jnp.dtype(dtype)
    want_y, want = exact.forward_backward(
        *(np.asarray(a.astype(jnp.float32), np.float64).reshape(-1, HIDDEN) for a in (x, dy))
    )
    tol = {"bfloat16": 4e-2, "float16": 6e-3}[dtype]
    np.testing.assert_allclose(
        np.asarray(y.astype(jnp.float32)).reshape(-1, HIDDEN), want_y, atol=tol, rtol=tol
    )
    np.testing.assert_allclose(
        np.asarray(d_x.astype(jnp.float32)).reshape(-1, HIDDEN), want["x"], atol=2 * tol, rtol=2 * tol
    )
    np.testing.assert_allclose(
        np.asarray(d_params.w2.astype(jnp.float32)), want["w2"], atol=3 * tol, rtol=3 * tol
    )


@pytest.mark.token_major
def test_overflow_is_counted_and_raised_when_asked(transport):
    rng = np.random.default_rng(27)
    layer = oracle.random_layer(rng, 8, 2, HIDDEN, INNER)
    layer.router[:, 3] = 40 * np.sign(layer.router[:, 3])
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport=transport, capacity_factor=0.5, block=4)
    x = np.abs(rng.normal(size=(4, 16, HIDDEN))).astype(np.float32) * np.sign(layer.router[:, 3])
    mesh = meshes.up_to(4)
    (_, (y, stats)), _ = step(cfg, mesh)(x.astype(np.float32), params_of(layer), np.ones_like(x), None)
    wanted = np.asarray(stats.recv_rows)
    shape = ExchangeShape.of(cfg, mesh.size, 64 // mesh.size)
    assert int(stats.dropped) > 0
    assert bool(stats.overflow)
    assert int(stats.dropped) >= int((wanted - shape.capacity).clip(0).sum())
    assert np.isfinite(np.asarray(y)).all()
    with pytest.raises(
        jm.CapacityOverflow, match=rf"dropped={int(stats.dropped)} of 128 routes.*capacity_factor"
    ):
        jm.check_stats(stats)


def test_llama4_weighs_the_expert_input(transport):
    rng = np.random.default_rng(28)
    layer = oracle.random_layer(rng, 8, 1, HIDDEN, INNER)
    cfg = jm.MoEConfig(8, 1, HIDDEN, INNER, router="llama4", transport=transport)
    x, dy = tokens(rng, 4, 5)
    (_, (y, _)), _ = step(cfg, meshes.up_to(4))(x, params_of(layer), dy, None)
    for n, token in enumerate(x.reshape(-1, HIDDEN).astype(np.float64)):
        logits = token @ layer.router
        expert = int(np.argmax(logits))
        scaled = token / (1 + np.exp(-logits[expert]))
        want = layer._mlp(scaled, layer.w1[expert], layer.w2[expert], dy[0, 0])[0]
        np.testing.assert_allclose(np.asarray(y).reshape(-1, HIDDEN)[n], want, atol=3e-5)


def test_statistics_keep_their_dtypes_under_x64(transport):
    """Loop carries rely on them."""
    cfg = jm.MoEConfig(4, 2, HIDDEN, INNER, transport=transport, block=4)
    layer = oracle.random_layer(np.random.default_rng(3), 4, 2, HIDDEN, INNER)
    with jax.enable_x64(True):
        x = jnp.ones((8, HIDDEN), jnp.float32)
        measure = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=meshes.up_to(2))[1])
        stats = jax.eval_shape(measure, x, params_of(layer))
    want = {"expert_counts": "int32", "recv_rows": "int32", "dropped": "int32", "overflow": "bool"}
    for field in dataclasses.fields(stats):
        assert getattr(stats, field.name).dtype == want.get(field.name, "float32"), field.name
