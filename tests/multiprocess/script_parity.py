"""Run by the launcher: one step of the layer; each process saves its shards and its compiled program."""

import hashlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jax_moriep as jm
from tests.multiprocess import common

folder, transport = sys.argv[1:]
mesh = common.mesh()
cfg = common.config(transport, capacity_factor=2.0)
x, params = common.placed_case(cfg, mesh)


def loss(x, params):
    y, stats = jm.ep_moe(x, params, cfg, mesh=mesh)
    return jnp.sum(jnp.sin(y)) + stats.load_balance_loss, y


step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
compiled = step.lower(x, params).compile()
for _ in range(3):
    (_, y), grads = compiled(x, params)
shards = {}
for name, array in {"y": y, "d_x": grads[0], "d_w1": grads[1].w1, "d_router": grads[1].router}.items():
    for shard in array.addressable_shards:
        shards[f"{name}/{shard.index[0].start or 0}"] = np.asarray(shard.data)
digest = hashlib.sha256(compiled.as_text().encode()).hexdigest()
np.savez(f"{folder}/{jax.process_index()}.npz", digest=np.array(digest), **shards)
