"""Run by the launcher: steps of a loss with a statistic in it, until one process is missing.

Arguments: how the process goes missing ("leaves" or "sleeps"), and which one.
"""

import sys
import time

import jax

import jax_moriep as jm
from tests.multiprocess import common

how, culprit = sys.argv[1], int(sys.argv[2])
mesh = common.mesh()
cfg = common.config()
x, params = common.placed_case(cfg, mesh)


def loss(params, x):
    y, stats = jm.ep_moe(x, params, cfg, mesh=mesh)
    return (y**2).mean() + 0.01 * stats.load_balance_loss, stats.recv_rows


step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, x).compile()
common.meet("compiled")  # a slow compiler must not look like a missing rank
for i in range(6):
    if i == 3 and jax.process_index() == culprit:
        common.say(f"time {time.time()}")
        if how == "leaves":
            sys.exit(0)
        time.sleep(100)
    try:
        jax.block_until_ready(step(params, x))
    except jax.errors.JaxRuntimeError as e:
        common.say(f"error at {time.time()} {e}")
        raise
common.say("finished")
