"""Layers of a stack under a scan, on every transport: values and all gradients, against the loop oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

import jax_moriep as jm
from tests.contract import meshes, oracle

HIDDEN, INNER = 16, 8
NAMES = ("router", "w1", "w2", "shared_w1", "shared_w2")


def stacked(layers):
    weights = {
        name: jnp.asarray(np.stack([getattr(layer, name) for layer in layers]), jnp.float32)
        for name in NAMES
        if getattr(layers[0], name) is not None
    }
    return jm.MoEParams(**weights)


def scanned(cfg, mesh, form, **options):
    """Jitted (y, gradients) of sum(y * dy) for x behind all layers of a stack."""

    def loss(x, stack, dy):
        def by_slices(x, of_layer):
            params, i = of_layer
            return jm.ep_moe(x, params, cfg, mesh=mesh, stack=stack, layer=i, **options)[0], None

        def by_number(x, i):
            return jm.ep_moe(x, stack, cfg, mesh=mesh, layer=i, **options)[0], None

        number = jnp.arange(stack.router.shape[0])
        if form == "number":
            y = lax.scan(by_number, x, number)[0]
        else:
            body = jax.checkpoint(by_slices) if form == "checkpoint" else by_slices
            y = lax.scan(body, x, (stack, number))[0]
        return jnp.sum(y * dy), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def unrolled(cfg, mesh, **options):
    def loss(x, stack, dy):
        y = x
        for i in range(stack.router.shape[0]):
            y = jm.ep_moe(y, jax.tree.map(lambda w, i=i: w[i], stack), cfg, mesh=mesh, **options)[0]
        return jnp.sum(y * dy), y

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def close(got, want, tol=2e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tol, rtol=tol)


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "form"), [(1, 10, "slices"), (3, 6, "checkpoint"), (4, 10, "number")]
)
def test_values_and_all_gradients(transport, num_ranks, num_experts, form):
    rng = np.random.default_rng(num_ranks)
    first, second = (oracle.random_layer(rng, num_experts, 3, HIDDEN, INNER, shared=8) for _ in range(2))
    cfg = jm.MoEConfig(num_experts, 3, HIDDEN, INNER, transport=transport, shared_intermediate_size=8)
    x, dy = (rng.normal(size=(num_ranks * 5, HIDDEN)).astype(np.float32) for _ in range(2))
    step = scanned(cfg, meshes.of(num_ranks), form)
    (_, y), (d_x, d_stack) = step(x, stacked([first, second]), dy)
    between, _ = first.forward_backward(np.asarray(x, np.float64), np.zeros_like(dy, np.float64))
    want_y, behind = second.forward_backward(between, np.asarray(dy, np.float64))
    _, before = first.forward_backward(np.asarray(x, np.float64), behind["x"])
    close((y, d_x), (want_y, before["x"]))
    for name in NAMES:
        got = np.asarray(getattr(d_stack, name))
        np.testing.assert_allclose(got, np.stack([before[name], behind[name]]), atol=1e-3, err_msg=name)


@pytest.mark.parametrize("kind", ["biases", "tensor parallel", "explicit", "padded ahead"])
def test_as_the_unrolled_layers(kind):
    count = 10 if kind == "padded ahead" else 8
    extra = {"expert_bias": True, "router_bias": True, "shared_intermediate_size": 8, "shared_gate": True}
    cfg = jm.MoEConfig(count, 2, HIDDEN, INNER, transport="native", **extra)
    rng = np.random.default_rng(1)
    stack = jax.vmap(lambda key: jm.init_params(key, cfg))(jax.random.split(jax.random.key(0), 3))
    stack = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) / 4, jnp.float32), stack)
    x, dy = (jnp.asarray(rng.normal(size=(8, HIDDEN)), jnp.float32) for _ in range(2))
    want = unrolled(cfg, meshes.up_to(4))(x, stack, dy)
    mesh, options = meshes.up_to(4), {}
    if kind == "tensor parallel":
        mesh, options = meshes.up_to(2, 2, names=("ep", "tp")), {"tp_axis": "tp"}
    if kind == "explicit":
        mesh = meshes.up_to(4, kind=AxisType.Explicit)
        x, dy = (jax.device_put(a, NamedSharding(mesh, jax.sharding.PartitionSpec("ep"))) for a in (x, dy))
        specs = jm.param_specs(cfg, params=stack)
        stack = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), stack, specs)
    if kind == "padded ahead":
        stack = jm.pad_params(stack, mesh.shape["ep"])
    got = scanned(cfg, mesh, "slices", **options)(x, stack, dy)
    if kind == "padded ahead":
        (value, (d_x, d_stack)) = got
        got = value, (d_x, jm.unpad_params(d_stack, cfg))
    close(got, want)


@pytest.mark.parametrize("scheme", ["fp8_block", "int8_token"])
def test_quantised_experts(scheme):
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport="native", expert_quant=scheme)
    mesh = meshes.up_to(4)
    layers = [jm.prepare_params(jm.init_params(jax.random.key(i), cfg), cfg, mesh) for i in range(2)]
    stack = jax.tree.map(lambda *w: jnp.stack(w), *layers)
    x, dy = jax.random.normal(jax.random.key(3), (2, 8, HIDDEN))

    def loss(x, run):
        y = run(x)
        return jnp.sum(y * dy), y

    def by_scan(x):
        number = jnp.arange(2)
        return lax.scan(lambda x, i: (jm.ep_moe(x, stack, cfg, mesh=mesh, layer=i)[0], None), x, number)[0]

    def by_loop(x):
        for params in layers:
            x = jm.ep_moe(x, params, cfg, mesh=mesh)[0]
        return x

    got, want = (
        jax.jit(jax.value_and_grad(lambda x, run=run: loss(x, run), has_aux=True))(x)
        for run in (by_scan, by_loop)
    )
    close(got, want, tol=1e-5)


def test_numbers_of_layers():
    """An int and a traced number give the same; a traced one that is out of range is clamped."""
    cfg = jm.MoEConfig(8, 2, HIDDEN, INNER, transport="native")
    mesh = meshes.up_to(2)
    stack = jax.vmap(lambda key: jm.init_params(key, cfg))(jax.random.split(jax.random.key(0), 3))
    x = jax.random.normal(jax.random.key(1), (4, HIDDEN))
    run = jax.jit(lambda x, i: jm.ep_moe(x, stack, cfg, mesh=mesh, layer=i)[0])
    last = jax.jit(lambda x: jm.ep_moe(x, stack, cfg, mesh=mesh, layer=np.int64(2))[0])(x)
    for number in (2, 7):
        np.testing.assert_array_equal(run(x, number), last)
    np.testing.assert_array_equal(run(x, -1), run(x, 0))
    np.testing.assert_array_equal(run(x, jnp.uint8(2)), last)
    assert np.abs(np.asarray(last) - np.asarray(run(x, 0))).max() > 1e-3
