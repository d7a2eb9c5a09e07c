"""Run by the launcher: steps in a loop until one process misbehaves as the first argument names.

The second argument is the process, the third the transport, native if not given.
"""

import os
import signal
import sys
import time

import jax
import jax.numpy as jnp

import jax_moriep as jm
from tests.multiprocess import common

fault, culprit = sys.argv[1], int(sys.argv[2])
me = jax.process_index()
guilty = me == culprit
mesh = common.mesh()
transport = sys.argv[3] if len(sys.argv) > 3 else "native"
cfg = common.config(transport, capacity_factor=3.0 if fault == "config" and guilty else 2.0)
tokens = 4 if fault == "tokens" and guilty else 6
layers = 3 if fault == "layers" and guilty else 2
x, params = common.placed_case(cfg, mesh, tokens)


@jax.jit
def step(x, params):
    for _ in range(layers):
        x = x + jm.ep_moe(jnp.tanh(x), params, cfg, mesh=mesh)[0]
    return x


compiled = step.lower(x, params).compile()
common.meet("compiled")  # a slow compiler must not look like a stopped rank
for i in range(6):
    if i == 3 and guilty and fault in ("kill", "stop"):
        time.sleep(0.5)  # the others are inside their step by now, waiting
        common.say(f"time {time.time()}")
        os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    try:
        y = jax.block_until_ready(compiled(x, params))
    except jax.errors.JaxRuntimeError as e:
        common.say(f"error at {time.time()} {e}")
        raise
common.say("finished")
