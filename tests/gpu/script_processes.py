"""One process of a job on one machine's GPUs: script_processes.py PORT NUMBER_OF_PROCESSES INDEX GPU."""

import os
import signal
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))

import jax_moriep as jm  # noqa: E402
from jax_moriep.runtime import group  # noqa: E402

TOKENS, HIDDEN, EXPERTS, TOP_K = 24, 64, 10, 3


def main(port: int, num_processes: int, index: int, device: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, index, local_device_ids=[device])
    if jax.device_count() != num_processes:
        print(f"jax refuses several processes on one GPU: {jax.devices()}", flush=True)
        return
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    cfg = jm.MoEConfig(EXPERTS, TOP_K, HIDDEN, 8, transport="native", block=4)
    jm.initialize(mesh)

    def body(x, ids, weights, dy):
        def combined(x, weights):
            disp = jm.dispatch(x, ids, weights, cfg, axis_name="ep")
            return jm.combine(disp.rows * disp.row_weights[:, None], disp.plan, axis_name="ep")

        y, pull = jax.vjp(combined, x, weights)
        return y, *pull(dy)

    step = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_processes, TOKENS, HIDDEN)).astype(np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    ids = rng.permuted(np.tile(np.arange(EXPERTS), (num_processes, TOKENS, 1)), axis=-1)[..., :TOP_K].astype(
        np.int32
    )
    weights = rng.uniform(0.1, 1, size=ids.shape).astype(np.float32)

    def global_array(value):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, P("ep")), value[index])

    operands = [global_array(v) for v in (x, ids, weights, dy)]
    for _ in range(20):
        y, d_x, d_weights = (np.asarray(a.addressable_shards[0].data) for a in step(*operands))
        group.check_failures()
        total = weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(y, (x * total)[index], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(d_x, (dy * total)[index], rtol=1e-5, atol=1e-5)
        want = np.repeat((x * dy).sum(-1, keepdims=True), TOP_K, -1)[index]
        np.testing.assert_allclose(d_weights, want, rtol=1e-4, atol=1e-4)
    print(f"process {index} agrees", flush=True)
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        jax.block_until_ready(step(*operands))
        group.check_failures()
    except Exception as e:  # noqa: BLE001 - whatever says it
        print(f"process {index} saw: {e}", flush=True)
    # Not the long way out: jax.distributed would wait for the dead.
    os._exit(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
