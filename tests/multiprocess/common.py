"""What the scripts of these tests share: a mesh over all processes, and arrays placed on it."""

import sys

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.runtime import compat

HIDDEN = 16


def mesh():
    """One axis over every device of every process."""
    return jax.sharding.Mesh(np.array(jax.devices()), ("ep",))


def place(array, spec, mesh):
    """A global array from a host array that all processes have."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def config(transport="native", **options):
    return jm.MoEConfig(10, 2, HIDDEN, 8, transport=transport, **options)


def case(cfg, num_ranks, tokens_per_rank=6):
    """Tokens and weights, the same in every process."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_ranks * tokens_per_rank, HIDDEN)).astype(np.float32)
    params = jax.tree.map(np.asarray, jm.pad_params(jm.init_params(jax.random.key(0), cfg), num_ranks))
    return x, params


def placed_case(cfg, mesh, tokens_per_rank=6):
    x, params = case(cfg, mesh.size, tokens_per_rank)
    specs = jm.param_specs(cfg)
    return place(x, P("ep"), mesh), jax.tree.map(lambda p, s: place(p, s, mesh), params, specs)


def meet(name):
    """Waits for all processes, at jax's service: a collective has the deadline that is tested."""
    compat.distributed_client().wait_at_barrier(name, 100_000)


def say(*words):
    """Prints at once, so that the launcher sees it before the process dies."""
    print(*words, flush=True)
    sys.stdout.flush()
