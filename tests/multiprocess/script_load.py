"""Run by the launcher: loads a checkpoint; each process saves its shards and how many bytes it read."""

import os
import sys

import jax
import numpy as np

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
np.savez(f"{out}/{jax.process_index()}.npz", read=np.array(sum(read)), **shards)
