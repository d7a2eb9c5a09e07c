"""ep_moe under JAX's transformations and mesh kinds gives what the plain call gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from tests.contract import meshes

HIDDEN = 16


def config(transport="native", **options):
    return jm.MoEConfig(8, 2, HIDDEN, 8, transport=transport, **options)


def tokens(*lead, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*lead, HIDDEN)), jnp.float32)


def plain(x, params, cfg, mesh):
    return jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh)[0])(x, params)


def close(a, b):
    jax.tree.map(
        lambda u, v: np.testing.assert_allclose(np.asarray(u), np.asarray(v), atol=2e-5, rtol=2e-4), a, b
    )


@pytest.fixture
def case():
    cfg = config()
    return cfg, jm.init_params(jax.random.key(0), cfg), meshes.up_to(4), tokens(4, 6)


def test_without_jit(case):
    cfg, params, mesh, x = case
    close(jm.ep_moe(x, params, cfg, mesh=mesh)[0], plain(x, params, cfg, mesh))


def test_mesh_from_context(case):
    cfg, params, mesh, x = case
    with jax.set_mesh(mesh):
        got = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg)[0])(x, params)
    close(got, plain(x, params, cfg, mesh))


def test_leading_dimensions_and_token_axes(case):
    cfg, params, _, _ = case
    mesh = meshes.up_to(2, 4, names=("dp", "ep"))
    x = tokens(2, 4, 3)
    want = plain(x, params, cfg, meshes.up_to(4))
    close(plain(x, params, cfg, mesh), want)
    spread = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg, mesh=mesh, token_axes=P("dp", "ep"))[0])(x, params)
    close(spread, want)
    one = x[0, 0, 0]
    close(plain(one, params, cfg, mesh), want[0, 0, 0])


def test_explicit_mesh():
    cfg = config(shared_intermediate_size=8, expert_bias=True, router_bias=True)
    params = jm.init_params(jax.random.key(1), cfg)
    x = tokens(8, 6)
    want_grad = jax.jit(
        jax.grad(lambda x, p: jm.ep_moe(x, p, cfg, mesh=meshes.up_to(4))[0].sum(), argnums=(0, 1))
    )(x, params)
    mesh = meshes.up_to(2, 4, names=("dp", "ep"), kind=AxisType.Explicit)
    placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, jm.param_specs(cfg))
    x_placed = jax.device_put(x, NamedSharding(mesh, P(("dp", "ep"))))
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(lambda x, p: jm.ep_moe(x, p, cfg)[0].sum(), argnums=(0, 1)))(x_placed, placed)
    close(grad, want_grad)


@pytest.mark.parametrize("num_experts", [8, 10])
def test_explicit_mesh_that_is_only_passed(num_experts):
    """Nothing is in context; the mask, and experts that must be padded, may lie elsewhere than the tokens."""
    cfg = jm.MoEConfig(num_experts, 2, HIDDEN, 8, transport="native")
    params = jm.init_params(jax.random.key(1), cfg)
    mesh, x = meshes.up_to(4, kind=AxisType.Explicit), tokens(8, 6)
    mask = jnp.arange(48).reshape(8, 6) % 5 != 0

    def on(mesh):
        return jax.jit(lambda x, p, m: jm.ep_moe(x, p, cfg, mesh=mesh, token_mask=m)[0])

    padded = num_experts % mesh.size != 0
    specs = jax.tree.map(lambda _: P(), params) if padded else jm.param_specs(cfg)
    placed = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs)
    x_placed = jax.device_put(x, NamedSharding(mesh, P("ep")))
    close(
        on(mesh)(x_placed, placed, jax.device_put(mask, NamedSharding(mesh, P()))),
        on(meshes.up_to(4))(x, params, mask),
    )


def test_explicit_mesh_pads_replicated_experts():
    cfg = jm.MoEConfig(10, 2, HIDDEN, 8, transport="native")
    params = jm.init_params(jax.random.key(1), cfg)
    mesh = meshes.of(4, kind=AxisType.Explicit)
    placed = jax.tree.map(lambda p: jax.device_put(p, NamedSharding(mesh, P())), params)
    x = tokens(4, 6)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x, p: jm.ep_moe(x, p, cfg)[0])(
            jax.device_put(x, NamedSharding(mesh, P("ep"))), placed
        )
    close(y, plain(x, params, cfg, meshes.of(4)))


def test_padded_params_are_the_same_layer(case):
    cfg = jm.MoEConfig(10, 2, HIDDEN, 8, transport="native")
    params = jm.init_params(jax.random.key(2), cfg)
    mesh, x = meshes.up_to(4), tokens(4, 6)
    padded = jm.pad_params(params, mesh.size)
    assert padded.w1.shape[0] == -(-10 // mesh.size) * mesh.size
    close(plain(x, padded, cfg, mesh), plain(x, params, cfg, mesh))


def stacked(cfg, count):
    layers = [jm.init_params(jax.random.key(i), cfg) for i in range(count)]
    return layers, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@pytest.mark.parametrize("remat", [False, True])
def test_scan_over_layers(remat):
    """A scanned stack gives the values and gradients of the unrolled one, also when each layer is remat."""
    cfg, mesh, x = config(), meshes.up_to(4), tokens(4, 6)
    layers, stack = stacked(cfg, 3)

    def layer(x, p):
        y, stats = jm.ep_moe(x, p, cfg, mesh=mesh)
        return x + y, stats.load_balance_loss

    def scanned(x, stack):
        fn = jax.checkpoint(layer, policy=jm.checkpoint_policy()) if remat else layer
        y, losses = lax.scan(fn, x, stack)
        return jnp.sum(jnp.sin(y)) + losses.sum()

    def unrolled(x, stack):
        total = 0.0
        for i in range(3):
            x, loss = layer(x, jax.tree.map(lambda leaf, i=i: leaf[i], stack))
            total += loss
        return jnp.sum(jnp.sin(x)) + total

    del layers
    close(
        jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)))(x, stack),
        jax.jit(jax.value_and_grad(unrolled, argnums=(0, 1)))(x, stack),
    )


def test_gradient_accumulation(case):
    cfg, params, mesh, _ = case
    x = tokens(3, 4, 6)

    def loss(p, x):
        return jnp.sum(jm.ep_moe(x, p, cfg, mesh=mesh)[0] ** 2)

    def accumulated(p, xs):
        def add(total, x):
            return jax.tree.map(jnp.add, total, jax.grad(loss)(p, x)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, p), xs)[0]

    want = jax.tree.map(lambda *g: sum(g), *(jax.jit(jax.grad(loss))(params, x[i]) for i in range(3)))
    close(jax.jit(accumulated)(params, x), want)


def count_calls(fn, *args):
    """Custom calls by target in the optimised program."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    names = ("moriep_dispatch", "moriep_combine", "moriep_replay")
    return {name: text.count(f'custom_call_target="{name}"') for name in names}


def test_each_exchange_runs_once_forward_and_once_backward(case):
    cfg, params, mesh, x = case

    def loss(x, p):
        return jnp.sum(jnp.sin(jm.ep_moe(x, p, cfg, mesh=mesh)[0]))

    assert count_calls(loss, x, params) == {"moriep_dispatch": 1, "moriep_combine": 1, "moriep_replay": 0}
    both = {"moriep_dispatch": 1, "moriep_combine": 2, "moriep_replay": 1}
    assert count_calls(jax.grad(loss, argnums=(0, 1)), x, params) == both


def test_the_checkpoint_policy_saves_the_exchanges():
    """In a scan, where XLA cannot merge a recomputation, the policy keeps it from being emitted at all."""
    if jax.default_backend() != "cpu":
        pytest.skip("XLA lays a loop's body out more than once on GPUs, and its calls with it")
    cfg, mesh, x = config(), meshes.up_to(4), tokens(4, 6)
    _, stack = stacked(cfg, 2)

    def loss(policy, x, stack):
        def layer(x, p):
            return x + jm.ep_moe(x, p, cfg, mesh=mesh)[0], None

        return jnp.sum(jnp.sin(lax.scan(jax.checkpoint(layer, policy=policy), x, stack)[0]))

    def grad(policy):
        return jax.grad(lambda x, stack: loss(policy, x, stack), argnums=(0, 1))

    assert count_calls(grad(jm.checkpoint_policy()), x, stack)["moriep_dispatch"] == 1
    assert count_calls(grad(None), x, stack)["moriep_dispatch"] == 2
    assert count_calls(grad(jm.checkpoint_policy("experts")), x, stack)["moriep_dispatch"] == 2
    for got, want in zip(
        *(jax.jit(grad(p))(x, stack) for p in (jm.checkpoint_policy("experts"), None)), strict=True
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_the_checkpoint_policy_knows_what_it_saves():
    with pytest.raises(jm.ConfigError, match="save='all'"):
        jm.checkpoint_policy("all")


def test_vmap_says_what_to_do(case):
    cfg, params, mesh, x = case
    batch = jnp.stack([x, x])
    for fn in (
        lambda b: jax.vmap(lambda x: jm.ep_moe(x, params, cfg, mesh=mesh)[0])(b),
        jax.jit(jax.vmap(jax.jit(lambda x: jm.ep_moe(x, params, cfg, mesh=mesh)[0]))),
        jax.vmap(jax.grad(lambda x: jm.ep_moe(x, params, cfg, mesh=mesh)[0].sum())),
    ):
        with pytest.raises(jm.ConfigError, match=r"cannot be batched by jax.vmap.*pass the whole batch"):
            fn(batch)
    masks = jnp.ones((2, *x.shape[:-1]), bool)
    for fn, batched in (
        (lambda p: jm.ep_moe(x, p, cfg, mesh=mesh)[0], jax.tree.map(lambda p: jnp.stack([p, p]), params)),
        (lambda mask: jm.ep_moe(x, params, cfg, mesh=mesh, token_mask=mask)[0], masks),
    ):
        with pytest.raises(jm.ConfigError, match=r"cannot be batched by jax.vmap"):
            jax.vmap(fn)(batched)


FORWARD = r"ep_moe has no forward-mode derivative .*; use reverse mode: jax\.grad"
SECOND = r"dispatch has derivatives of first order only; use"
BATCHED_BACK = r"the cotangents of an exchange cannot be batched by jax\.vmap .*; call the function of"


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (lambda f, x: jax.jvp(f, (x,), (x,)), FORWARD),
        (lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x), FORWARD),
        (lambda f, x: jax.jacfwd(f)(x), FORWARD),
        # Under jit, for without it each operation of the backward pass would be compiled alone before that.
        (lambda f, x: jax.jit(lambda x: jax.linearize(f, x)[1](x))(x), FORWARD),
        (lambda f, x: jax.jvp(jax.checkpoint(f), (x,), (x,)), FORWARD),
        (lambda f, x: jax.hessian(lambda x: f(x).sum())(x), FORWARD),
        (lambda f, x: jax.jit(jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum()))(x), SECOND),
        (lambda f, x: jax.jit(jax.jacrev(f))(x), BATCHED_BACK),
        (lambda f, x: jax.jit(lambda x: jax.vmap(jax.vjp(f, x)[1])(jnp.stack([x, x])))(x), BATCHED_BACK),
    ],
)
def test_derivatives_that_there_are_not(case, transform, text):
    """A text of ours, also outside jit, where forward mode compiled for long and then failed inside JAX."""
    cfg, params, mesh, x = case
    with pytest.raises(jm.ConfigError, match=text):
        transform(lambda x: jm.ep_moe(x, params, cfg, mesh=mesh)[0], x)


def test_vmap_of_the_exchanges_says_what_to_do(transport):
    cfg = config(transport)
    ids, weights = jnp.zeros((8, cfg.top_k), jnp.int32), jnp.ones((8, cfg.top_k))

    def exchanged(x):
        disp = jm.dispatch(x, ids, weights, cfg)
        return jm.combine(disp.rows, disp.plan)

    mapped = jax.shard_map(jax.vmap(exchanged), mesh=meshes.of(1), in_specs=P(), out_specs=P("ep"))
    with pytest.raises(jm.ConfigError, match=r"dispatch and combine cannot be batched by jax.vmap"):
        mapped(tokens(2, 8))


@pytest.mark.token_major
def test_several_layers_and_configs_in_one_program(transport):
    """Different widths, experts and blocks over the same and over different groups, in one jitted step."""
    flat, grid = meshes.up_to(4), meshes.up_to(2, 4, names=("dp", "ep"))
    first, second = config(transport), jm.MoEConfig(5, 3, HIDDEN, 4, transport=transport, block=16)
    p1, p2 = jm.init_params(jax.random.key(0), first), jm.init_params(jax.random.key(1), second)
    x = tokens(8, 4)

    def model(x):
        x = x + jm.ep_moe(x, p1, first, mesh=grid)[0]
        return x + jm.ep_moe(x, p2, second, mesh=grid)[0]

    want = x + plain(x, p1, first, flat)
    want = want + plain(want, p2, second, flat)
    close(jax.jit(model)(x), want)


def test_a_subset_of_the_devices(transport):
    """A group may be any devices in any order."""
    if jax.device_count() < 7 or jax.process_count() > 1:
        pytest.skip("it needs 7 devices in one process")
    cfg = config(transport)
    params = jm.init_params(jax.random.key(0), cfg)
    devices = np.array(jax.devices())[[6, 1, 4]]
    x = tokens(3, 5)
    close(plain(x, params, cfg, Mesh(devices, ("ep",))), plain(x, params, cfg, meshes.of(3)))


def test_exported_program_runs_again(case):
    _, params, mesh, x = case
    # jax exports no kernel of Triton's, which "auto" takes on GPUs, without being asked to.
    cfg = config(experts="blocked")
    sharding = NamedSharding(mesh, P())
    args = jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), (x, params))
    fn = jax.jit(lambda x, *leaves: jm.ep_moe(x, jax.tree.unflatten(tree, leaves), cfg, mesh=mesh)[0])
    leaves, tree = jax.tree.flatten(args[1])
    checks = [jax.export.DisabledSafetyCheck.custom_call(f"moriep_{n}") for n in ("dispatch", "combine")]
    blob = jax.export.export(fn, disabled_checks=checks)(args[0], *leaves).serialize()
    jm.initialize(mesh)
    again = jax.jit(jax.export.deserialize(blob).call)(args[0], *leaves)
    close(again, plain(x, params, cfg, mesh))
