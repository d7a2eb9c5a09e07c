"""Run on every machine: steps of the layer whose bytes are counted on the link meanwhile.

    script_bytes.py FOLDER TRANSPORT STEPS TOKENS HIDDEN

Before the steps and behind them it waits until the test has read the counters and made a file.
"""

import sys
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from tests.nodes import common

folder, transport, *numbers = sys.argv[1:]
steps, tokens, hidden = map(int, numbers)
mesh = common.mesh()
cfg = common.config(transport, hidden)
layer, x, _ = common.case(mesh.size, hidden, tokens)
params = common.placed_params(layer, cfg, mesh)
x = common.place(x, mesh, P("ep"))
step = jax.jit(lambda x, params: jm.ep_moe(x, params, cfg, mesh=mesh)[0])


def meet(name):
    multihost_utils.sync_global_devices(name)
    common.say(name)
    while not (Path(folder) / name).exists():
        time.sleep(0.02)


jax.block_until_ready(step(x, params))
meet("warm")
for _ in range(steps):
    jax.block_until_ready(step(x, params))
meet("counted")
