"""A model with an expert-parallel layer in Flax nnx, trained over all devices of one or of many processes.

python examples/flax_nnx.py, or on four processes: jax-moriep launch -n 4 examples/flax_nnx.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm

FEATURES, WIDTH, STEPS = 8, 64, 60
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
cfg = jm.MoEConfig(num_experts=8, top_k=2, hidden_size=WIDTH, intermediate_size=2 * WIDTH)


class Model(nnx.Module):
    """Features in, one number out; the layer in between is a mixture of experts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.moe = jm.flax.EpMoE(cfg, mesh=mesh, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jm.MoEStats]:
        """x [N, FEATURES] -> [N], and the statistics of the layer."""
        x = self.embed(x)
        y, stats = self.moe(x)
        return self.head(x + y)[:, 0], stats


@nnx.jit
def make() -> tuple[Model, nnx.Optimizer]:
    """The model and its optimizer, each weight made where its module says that it lives."""
    model = Model(nnx.Rngs(0))
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_named_sharding(state, mesh)))
    return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, x: jax.Array, target: jax.Array) -> jax.Array:
    """One step of training; returns the mean squared error before it."""

    def loss(model: Model) -> tuple[jax.Array, jax.Array]:
        y, stats = model(x)
        error = jnp.mean((y - target) ** 2)
        return error + 0.01 * stats.load_balance_loss, error

    grads, error = nnx.grad(loss, has_aux=True)(model)
    optimizer.update(model, grads)
    return error


def batch(seed: int, size: int = 256) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets, known to every process, split over the ranks."""
    size = -(-size // mesh.size) * mesh.size
    x = np.random.default_rng(seed).normal(size=(size, FEATURES)).astype(np.float32)
    target = np.sin(2 * x[:, 0]) * np.abs(x).sum(1)

    def place(array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, P("ep"))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return place(x), place(target)


show = print if jax.process_index() == 0 else functools.partial(lambda *words: None)
model, optimizer = make()
for i in range(STEPS):
    error = float(step(model, optimizer, *batch(i)))  # waits: see "Steps in flight" in docs/sharp_bits.md
    if i in (0, STEPS - 1):
        show(f"step {i + 1}: mean squared error {error:.3f}")
