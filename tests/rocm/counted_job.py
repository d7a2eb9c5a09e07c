"""One rank of test_counted.py: a dispatch, its combine and a replay, each a program of its own, once.

Usage: python -m tests.rocm.counted_job TRANSPORT SIZES GIVEN, joined by JAX_MORIEP_TEST_JOB. A line in the
file of ROCM_SIM_COUNT says where each ends. Other tests check results; here only that tokens came back.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.plan import ExchangeShape, Link
from jax_moriep.runtime.place import Place
from jax_moriep.transports import IMPLEMENTATIONS
from tests import processes
from tests.rocm import counters
from tests.rocm.counted_inputs import Given, Sizes

SHARDED = P("ep")


def main(transport: str, sizes: Sizes, given: Given) -> None:
    processes.join()
    rank = jax.process_index()
    mesh = Mesh(np.array(jax.devices()), ("ep",))
    cfg = jm.MoEConfig(
        sizes.experts,
        sizes.top_k,
        sizes.hidden,
        8,
        transport=transport,
        capacity_factor=sizes.capacity_factor,
        block=sizes.block,
        tuning=jm.Tuning(mori_kernel="IntraNode", block_num=sizes.blocks, warp_num_per_block=sizes.waves),
    )
    shape = ExchangeShape.of(cfg, sizes.ranks, sizes.tokens)
    implementation = IMPLEMENTATIONS[transport]
    place = Place.of(mesh, "ep")
    opened = implementation.open(place, cfg, shape, "bfloat16")
    link = Link(shape, transport, "ep", place.platform, place.architecture, opened)

    def put(value: np.ndarray) -> jax.Array:
        """What all ranks have, [R, n, ...], as one array [R * n, ...]."""
        flat = value.reshape(-1, *value.shape[2:])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, SHARDED), value[rank], flat.shape)

    def jit(body, out_specs=SHARDED):
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=SHARDED, out_specs=out_specs))

    def counted(name, step, *arguments):
        found = jax.block_until_ready(step(*arguments))
        counters.mark(os.environ["ROCM_SIM_COUNT"], name, rank)
        return found

    dispatch = jit(
        lambda *a: implementation.dispatch(link, *a), out_specs=(*[SHARDED] * 3, P(), SHARDED, SHARDED)
    )
    combine = jit(lambda *a: implementation.combine(link, *a)[::2])
    replay = jit(lambda *a: implementation.replay(link, *a))
    x, ids, weights, words = (put(one) for one in (given.x, given.ids, given.weights, given.words))
    order = put(np.zeros((sizes.ranks, 1), np.int32))
    # Peers are connected in the background, and the first exchange waits for that.
    rows, _, _, _, own, order = dispatch(x, ids, weights, words, order)
    _, order = counted("open", combine, rows, ids, own, order)
    rows, _, _, _, own, order = counted("dispatch", dispatch, x, ids, weights, words, order)
    y, order = counted("combine", combine, rows, ids, own, order)
    counted("replay", replay, y, ids, own, order)

    # Every token comes back as often as it has routes.
    routes = np.sum(given.ids[rank] >= 0, axis=1, keepdims=True)
    found = np.asarray(y.addressable_shards[0].data.astype(jnp.float32))
    np.testing.assert_allclose(found, routes * given.x[rank].astype(np.float32), rtol=0.02, atol=0.02)


if __name__ == "__main__":
    main(sys.argv[1], Sizes(**json.loads(sys.argv[2])), Given.load(sys.argv[3]))
