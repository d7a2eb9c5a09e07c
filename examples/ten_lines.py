"""The layer in ten lines: values and gradients over all devices of this process."""

import jax

import jax_moriep as jm

mesh = jax.make_mesh((len(jax.devices()),), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
cfg = jm.MoEConfig(num_experts=16, top_k=2, hidden_size=64, intermediate_size=128)
params = jm.init_params(jax.random.key(0), cfg)


@jax.jit
def loss(params: jm.MoEParams, x: jax.Array) -> jax.Array:
    """A loss of the layer's output and of the router's balance."""
    y, stats = jm.ep_moe(x, params, cfg, mesh=mesh)
    return (y**2).mean() + 0.01 * stats.load_balance_loss


print(loss(params, jax.random.normal(jax.random.key(1), (8, 32, 64))))
