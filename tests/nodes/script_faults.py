"""Run on every machine: steps without an end, until something happens; process 3 may be the cause.

script_faults.py FAULT TRANSPORT
"""

import os
import signal
import sys
import time

import jax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from tests.nodes import common

fault, transport = sys.argv[1:]
guilty = jax.process_index() == 3
mesh = common.mesh()
cfg = common.config(transport)
layer, x, _ = common.case(mesh.size, tokens=4 if fault == "tokens" and guilty else common.TOKENS)
params = common.placed_params(layer, cfg, mesh)
x = common.place(x, mesh, P("ep"))
step = jax.jit(lambda x, params: jm.ep_moe(x, params, cfg, mesh=mesh)[0]).lower(x, params).compile()
multihost_utils.sync_global_devices("compiled")
i = 0
while True:
    i += 1
    if i == 3:
        common.say("running")
    if i == 3 and guilty and fault == "kill":
        time.sleep(0.5)  # the others are inside their step by now, waiting
        common.say(f"time {time.time()}")
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 3 and guilty and fault == "exit":
        sys.exit(7)
    try:
        jax.block_until_ready(step(x, params))
    except jax.errors.JaxRuntimeError as error:
        common.say(f"error at {time.time()} {error}")
        raise
