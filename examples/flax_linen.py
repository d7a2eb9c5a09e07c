"""The layer in Flax linen: its weights carry their shardings, and the selection bias balances the load."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import jax_moriep as jm

WIDTH, STEPS = 64, 60
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
cfg = jm.MoEConfig(8, 2, WIDTH, 2 * WIDTH, router="sigmoid_topk", score_bias=True)
moe = jm.flax.LinenEpMoE(cfg, mesh=mesh, score_bias_rate=0.01)
optimizer = optax.adam(3e-3)

x = jax.random.normal(jax.random.key(0), (256, WIDTH)) + 0.5
target = jnp.roll(jnp.sin(2 * x), 1, axis=-1)
boxed = jax.jit(moe.init)(jax.random.key(1), x)
print("w1 is split over", nn.get_partition_spec(boxed)["params"]["w1"][0])
variables = nn.unbox(boxed)
params, bias = variables["params"], variables["score_bias"]
opt_state = optimizer.init(params)


@jax.jit
def step(params: dict, bias: dict, opt_state: optax.OptState) -> tuple:
    """One step of training: new weights, a new bias, the error before it, and the load of the experts."""

    def loss(params: dict) -> tuple:
        variables = {"params": params, "score_bias": bias}
        (y, stats), changed = moe.apply(variables, x, mutable=["score_bias"])
        return jnp.mean((y - target) ** 2), (changed["score_bias"], stats.expert_counts)

    (error, (moved, counts)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), moved, opt_state, error, counts


for i in range(STEPS):
    params, bias, opt_state, error, counts = step(params, bias, opt_state)
    error = float(error)  # waits: see "Steps in flight" in docs/sharp_bits.md
    if i in (0, STEPS - 1):
        print(f"step {i + 1}: mean squared error {error:.3f}, tokens per expert {counts.tolist()}")
