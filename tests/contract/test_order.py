"""Exchanges with no data between them: the order token must keep them in one order on all ranks.

The traps of the CPU thunk executor show only with many independent calls and large rows; small ones pass by
luck. A failure here would be an error about a differing program, or a hang that the test's deadline ends.
The transports that are made of XLA's own collectives are ordered by XLA; they run the same on small rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jax_moriep as jm

BRANCHES, HIDDEN = 8, 1024


def mesh():
    return Mesh(np.array(jax.devices()), ("ep",))


def config(transport):
    return jm.MoEConfig(16, 2, HIDDEN, 8, transport=transport, capacity_factor=2.0)


def num_tokens(transport):
    return 256 if transport == "native" else 8  # 1 MiB of tokens a rank in each branch, or little


def inputs(transport):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(BRANCHES, 8 * num_tokens(transport), HIDDEN)), jnp.float32)


def test_eight_independent_layers(transport):
    """Values and gradients, several times, equal to the branches run one by one."""
    cfg = config(transport)
    params = [jm.init_params(jax.random.key(i), cfg) for i in range(BRANCHES)]

    def branch(x, params):
        y, stats = jm.ep_moe(jnp.sin(x), params, cfg, mesh=mesh())
        return jnp.sum(jnp.sin(y)) + stats.load_balance_loss

    def all_of_them(xs, params):
        return sum(branch(xs[i], params[i]) for i in range(BRANCHES))

    xs = inputs(transport)
    run = jax.jit(jax.value_and_grad(all_of_them))
    one = jax.jit(jax.value_and_grad(branch))
    want = [one(xs[i], params[i]) for i in range(BRANCHES)]
    for _ in range(3):
        value, grads = run(xs, params)
        np.testing.assert_allclose(float(value), sum(float(w[0]) for w in want), rtol=1e-4)
        for i in range(BRANCHES):
            np.testing.assert_allclose(np.asarray(grads[i]), np.asarray(want[i][1]), atol=1e-4, rtol=1e-3)


def test_eight_independent_exchanges_in_one_shard_map(transport):
    cfg = config(transport)
    rng = np.random.default_rng(1)
    count = 8 * num_tokens(transport)
    ids = np.array([rng.permutation(16)[:2] for _ in range(count)], np.int32)
    weights = np.ones((count, 2), np.float32)

    def body(xs, ids, weights):
        total = jnp.zeros_like(xs[0])
        for i in range(BRANCHES):
            disp = jm.dispatch(jnp.cos(xs[i]), ids, weights, cfg, axis_name="ep")
            total = total + jm.combine(disp.rows * (i + 1.0), disp.plan, axis_name="ep")
        return total

    mapped = jax.shard_map(body, mesh=mesh(), in_specs=(P(None, "ep"), P("ep"), P("ep")), out_specs=P("ep"))
    xs = inputs(transport)
    want = 2 * sum(np.cos(np.asarray(xs[i])) * (i + 1.0) for i in range(BRANCHES))
    run = jax.jit(mapped)
    for _ in range(3):
        np.testing.assert_allclose(np.asarray(run(xs, ids, weights)), want, atol=1e-3, rtol=1e-4)


@functools.cache
def chain_hlo():
    cfg = config("native")

    def two(x, y):
        a, _ = jm.ep_moe(x, params, cfg, mesh=mesh())
        b, _ = jm.ep_moe(y, params, cfg, mesh=mesh())
        return a, b

    params = jm.init_params(jax.random.key(0), cfg)
    x = inputs("native")[0]
    return jax.jit(two).lower(x, x + 1).as_text()


def test_the_token_links_two_layers_that_share_no_data():
    """In the lowered module the second layer's order operand comes from the first layer's combine."""
    layers = [line for line in chain_hlo().splitlines() if "sdy.manual_computation(" in line]
    assert len(layers) == 2
    results = layers[0].split(":2 =")[0].strip()
    operands = layers[1].split("sdy.manual_computation(")[1].split(")")[0]
    assert operands.endswith(f"{results}#1")


@pytest.mark.parametrize("policy", [None, "save"])
def test_independent_layers_under_remat(transport, policy):
    """Checkpointed layers in a chain, recomputed in the backward pass."""
    cfg = config(transport)
    params = [jm.init_params(jax.random.key(i), cfg) for i in range(4)]

    def layer(x, params):
        return x + jm.ep_moe(x, params, cfg, mesh=mesh())[0]

    saved = jm.checkpoint_policy() if policy else None
    remat = jax.checkpoint(layer, policy=saved)

    def loss(fn, x):
        for p in params:
            x = fn(x, p)
        return jnp.sum(jnp.sin(x))

    x = inputs(transport)[0]
    want = jax.jit(jax.grad(functools.partial(loss, layer)))(x)
    run = jax.jit(jax.grad(functools.partial(loss, remat)))
    for _ in range(2):
        np.testing.assert_allclose(np.asarray(run(x)), np.asarray(want), atol=1e-4, rtol=1e-3)
