"""Run on every machine: one step of the layer, forward and backward; each process saves its shards.

    script_layer.py FOLDER TRANSPORT [detect]

With ``detect`` it joins the job as jax finds it in the environment.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from tests.nodes import common

folder, transport, *options = sys.argv[1:]
if options:
    jax.distributed.initialize()
mesh = common.mesh()
cfg = common.config(transport)
layer, x, dy = common.case(mesh.size)
params = common.placed_params(layer, cfg, mesh)
x, dy = (common.place(array, mesh, P("ep")) for array in (x, dy))


@jax.jit
def step(x, params, dy, mask):
    def loss(x, params):
        y, _ = jm.ep_moe(x, params, cfg, mesh=mesh, token_mask=mask)
        return jnp.sum(y * dy), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)


shards = {}
for case, mask in common.masks(mesh.size).items():
    (_, y), (d_x, d_params) = step(x, params, dy, common.place(mask, mesh, P("ep")))
    named = {"y": y, "x": d_x, "w1": d_params.w1, "w2": d_params.w2, "router": d_params.router}
    for name, array in named.items():
        for shard in array.addressable_shards:
            shards[f"{case}/{name}/{shard.index[0].start or 0}"] = np.asarray(shard.data)
explained = jm.explain(common.config("auto"), mesh)
try:
    jm.ep_moe(x, params, common.config("native"), mesh=mesh)
    native = ""
except jm.TransportError as error:
    native = str(error)
told = {"native": native, "auto": explained.transport, "reasons": explained.transport_reasons}
np.savez(f"{folder}/{jax.process_index()}.npz", told=json.dumps(told), **shards)
