"""Run on every machine: dispatch and combine over some transports, their seconds, and what the machine sent.

    script_exchange.py TRANSPORTS TOKENS HIDDEN EXPERTS TOP_K STEPS

Each process prints a line of JSON for each transport.
"""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.runtime import compat
from tests.nodes import common

transports = sys.argv[1].split(",")
tokens, hidden, experts, top_k, steps = map(int, sys.argv[2:])
mesh = common.mesh()
rng = np.random.default_rng(0)
count = mesh.size * tokens
x = rng.normal(size=(count, hidden)).astype(np.float32)
ids = np.argsort(rng.random((count, experts)), axis=1)[:, :top_k].astype(np.int32)
weights = rng.random(ids.shape).astype(np.float32)
placed = [common.place(array, mesh, P("ep")) for array in (x, ids, weights)]


def barrier(name):
    """By jax's service: a collective would be counted."""
    compat.distributed_client().wait_at_barrier(name, 60_000)


def sent_bytes():
    """Of this machine, with the headers of its packets."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in line)
    return int(line.split(":")[1].split()[8])


for name in transports:
    cfg = jm.MoEConfig(experts, top_k, hidden, 8, transport=name)

    def exchange(x, ids, weights, cfg=cfg):
        disp = jm.dispatch(x, ids, weights, cfg)
        return jm.combine(disp.rows, disp.plan)

    step = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    with jax.set_mesh(mesh):
        y = jax.block_until_ready(step(*placed))
        jax.block_until_ready(step(*placed))
        barrier(f"{name} is warm")
        before, seconds = sent_bytes(), []
        for i in range(steps):
            barrier(f"{name} {i}")
            began = time.perf_counter()
            jax.block_until_ready(step(*placed))
            seconds.append(time.perf_counter() - began)
        barrier(f"{name} is done")
        sent = sent_bytes() - before
    error = max(float(np.abs(np.asarray(s.data) - top_k * x[s.index]).max()) for s in y.addressable_shards)
    common.say(json.dumps({"transport": name, "sent": sent, "seconds": seconds, "error": error}))
