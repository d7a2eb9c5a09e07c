"""Exchanges with no data between them: the order must link them alike on all ranks.

The traps of the CPU thunk executor show only with many independent calls and large rows; small ones pass by
luck. A failure here would be an error about a differing program, or a hang that the test's deadline ends.
The transports that are made of XLA's own collectives are ordered by XLA; they run the same on small rows.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.runtime import order
from tests.contract import meshes

HIDDEN = 1024


def mesh():
    return meshes.up_to(8)


def config(transport):
    return jm.MoEConfig(16, 2, HIDDEN, 8, transport=transport, capacity_factor=2.0)


def num_tokens(transport):
    return 256 if transport == "native" else 8  # 1 MiB of tokens a rank in each branch, or little


def num_branches(transport):
    return 8 if transport in ("native", "mori") else 4


def inputs(transport):
    rng = np.random.default_rng(0)
    return jnp.asarray(
        rng.normal(size=(num_branches(transport), 8 * num_tokens(transport), HIDDEN)), jnp.float32
    )


def test_independent_layers(transport):
    """Values and gradients, several times, equal to the branches run one by one."""
    cfg = config(transport)
    branches = range(num_branches(transport))
    params = [jm.init_params(jax.random.key(i), cfg) for i in branches]

    def branch(x, params):
        y, stats = jm.ep_moe(jnp.sin(x), params, cfg, mesh=mesh())
        return jnp.sum(jnp.sin(y)) + stats.load_balance_loss

    def all_of_them(xs, params):
        return sum(branch(xs[i], params[i]) for i in branches)

    xs = inputs(transport)
    run = jax.jit(jax.value_and_grad(all_of_them))
    one = jax.jit(jax.value_and_grad(branch))
    want = [one(xs[i], params[i]) for i in branches]
    for _ in range(3):
        value, grads = run(xs, params)
        np.testing.assert_allclose(float(value), sum(float(w[0]) for w in want), rtol=1e-4)
        for i in branches:
            np.testing.assert_allclose(np.asarray(grads[i]), np.asarray(want[i][1]), atol=1e-4, rtol=1e-3)


def test_independent_exchanges_in_one_shard_map(transport):
    cfg = config(transport)
    branches = range(num_branches(transport))
    rng = np.random.default_rng(1)
    count = 8 * num_tokens(transport)
    ids = np.array([rng.permutation(16)[:2] for _ in range(count)], np.int32)
    weights = np.ones((count, 2), np.float32)

    def body(xs, ids, weights):
        total = jnp.zeros_like(xs[0])
        for i in branches:
            disp = jm.dispatch(jnp.cos(xs[i]), ids, weights, cfg, axis_name="ep")
            total = total + jm.combine(disp.rows * (i + 1.0), disp.plan, axis_name="ep")
        return total

    mapped = jax.shard_map(body, mesh=mesh(), in_specs=(P(None, "ep"), P("ep"), P("ep")), out_specs=P("ep"))
    xs = inputs(transport)
    want = 2 * sum(np.cos(np.asarray(xs[i])) * (i + 1.0) for i in branches)
    run = jax.jit(mapped)
    for _ in range(3):
        np.testing.assert_allclose(np.asarray(run(xs, ids, weights)), want, atol=1e-3, rtol=1e-4)


def unordered_pairs(text):
    """Pairs of our calls in compiled HLO of which neither depends on the other, and the number of calls."""
    pairs, count = [], 0
    for computation in re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ .*\{\n)", text):
        instructions = dict(re.findall(r"^ +(?:ROOT )?(%[\w.\-]+) = (.*)$", computation, re.MULTILINE))
        ours = [name for name, call in instructions.items() if 'custom_call_target="moriep_' in call]
        ancestors = {}
        for name, call in instructions.items():  # operands stand before their users
            operands = set(re.findall(r"%[\w.\-]+", call)) & ancestors.keys()
            ancestors[name] = operands.union(*(ancestors[operand] for operand in operands))
        pairs += [(a, b) for i, b in enumerate(ours) for a in ours[:i] if a not in ancestors[b]]
        count += len(ours)
    return pairs, count


def layers_in_a_row(remat=None):
    def layer(x, params, cfg):
        return x + jm.ep_moe(x, params, cfg, mesh=mesh())[0]

    layer = remat(layer) if remat else layer

    def model(x, params, cfg):
        for p in params:
            x = layer(x, p, cfg)
        return x.sum()

    return model


def independent_layers(x, params, cfg):
    return sum(jm.ep_moe(x + i, p, cfg, mesh=mesh())[0].sum() for i, p in enumerate(params))


def scanned_layers(x, params, cfg):
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *params)
    return jax.lax.scan(lambda x, p: (x + jm.ep_moe(x, p, cfg, mesh=mesh())[0], None), x, stacked)[0].sum()


@pytest.mark.parametrize(
    ("model", "calls"),
    [
        (layers_in_a_row(), 8),
        (independent_layers, 8),
        (
            layers_in_a_row(
                functools.partial(jax.checkpoint, policy=jm.checkpoint_policy(), static_argnums=2)
            ),
            8,
        ),
        (scanned_layers, 4),
    ],
    ids=["in a row", "independent", "checkpoint policy", "scan"],
)
def test_every_exchange_of_a_program_has_its_place(model, calls):
    """The loss is linear in y, so that no cotangent depends on the forward pass."""
    if jax.default_backend() != "cpu":
        pytest.skip("XLA lays a loop's body out more than once on GPUs, and its calls with it")
    cfg = config("native")
    params = [jm.init_params(jax.random.key(i), cfg) for i in range(2)]
    run = jax.jit(jax.value_and_grad(functools.partial(model, cfg=cfg), argnums=(0, 1)))
    pairs, found = unordered_pairs(run.lower(inputs("native")[0], params).compile().as_text())
    assert found == calls
    assert not pairs


def test_chains_of_other_layers_begin_apart():
    a, b = (jax.random.normal(jax.random.key(i), (32, 8)) for i in range(2))
    assert order.start(a) == order.start(a)
    assert order.start(a) != order.start(b)
    for token in (order.start(a), order.start(b), order.start(jnp.full((2, 2), jnp.nan)), order.start()):
        assert token.shape == (1,)
        assert 0 <= float(token[0]) < 2**22
        assert float(token[0]).is_integer()


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
    if mesh().size == 1:
        pytest.skip("a shard_map over one device is lowered to no computation of its own")
    layers = [line for line in chain_hlo().splitlines() if "sdy.manual_computation(" in line]
    assert len(layers) == 2
    results = layers[0].split(":2 =")[0].strip()
    operands = layers[1].split("sdy.manual_computation(")[1].split(")")[0]
    assert operands.endswith(f"{results}#1")


@pytest.mark.token_major
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
    # Of the thousands of tokens that a GPU takes here, one multiplies by hundreds what its sums round.
    atol = 1e-4 if jax.default_backend() == "cpu" else 1e-3
    for _ in range(2):
        np.testing.assert_allclose(np.asarray(run(x)), np.asarray(want), atol=atol, rtol=1e-3)
