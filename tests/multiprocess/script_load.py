"""Run by the launcher: loads a checkpoint, saves what this process has and read, and a layer as on disk."""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

import jax_moriep as jm
from tests.multiprocess import common

folder, out = sys.argv[1:]
read = []
preadv = os.preadv


def counted(*arguments):
    read.append(preadv(*arguments))
    return read[-1]


os.preadv = counted
params = jm.weights.load(folder, mesh=common.mesh())
shards = {}
for name, array in vars(params).items():
    for shard in getattr(array, "addressable_shards", ()):
        first = shard.index[1].start or 0 if name in ("w1", "w2") else 0
        shards[f"{name}/{first}"] = np.asarray(shard.data)

# The way back of one layer: refused while other processes hold some of it, and right as the text says.
cfg, one = jm.MoEConfig.from_hf(folder), jax.tree.map(lambda w: w[1], params)
try:
    jm.weights.to_hf(one, "deepseek_v3", cfg)
    error = "none"
except jm.ShardingError as e:
    error = str(e)
whole = multihost_utils.process_allgather(one, tiled=True)
back = {f"back/{name}": value for name, value in jm.weights.to_hf(whole, "deepseek_v3", cfg).items()}
np.savez(
    f"{out}/{jax.process_index()}.npz",
    read=np.array(sum(read)),
    error=np.array(error),
    **shards,
    **back,
)
