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
from jax_moriep.flax import EpMoE, LinenEpMoE, ScoreBias

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
        params = optax.apply_updates(params, updates)
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


KINDS = {
    "plain": (Plain, AxisType.Auto),
    "plain-explicit": (Plain, AxisType.Explicit),
    "nnx": (Nnx, AxisType.Auto),
    "linen": (Linen, AxisType.Auto),
}


@pytest.mark.parametrize(("kind", "axis_type"), KINDS.values(), ids=KINDS)
def test_resuming_at_another_size_is_the_unbroken_run(kind, axis_type, tmp_path):
    run = kind(mesh_of(4, axis_type))
    train(run, range(2))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", jm.unpad_params(run.state, CFG))
    assert {12} == {leaf.shape[0] for leaf in jax.tree.leaves(run.state) if leaf.ndim == 3}
    losses = train(run, range(2, 4))
    assert losses[1] < losses[0]

    for size in (2, 8, 1, 5):
        fresh = kind(mesh_of(size, axis_type))
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
