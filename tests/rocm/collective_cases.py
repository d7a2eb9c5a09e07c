"""What test_collectives.py runs on simulated devices, in one process and in several.

Usage of one rank's process: python -m tests.rocm.collective_cases PORT RANKS RANK CASE RESULT.
"""

import os
import pickle
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.contract import test_exchange

SMALL = (4, 3)  # in one process XLA reduces such arrays by a kernel of its own
LARGE = (4, 50_000)  # and leaves such ones to RCCL


def draw(shape: tuple[int, int], dtype: str, num_ranks: int) -> np.ndarray:
    """The inputs of all ranks: [ranks, ranks * rows, columns], which every process draws alike."""
    rng = np.random.default_rng(num_ranks)
    size = (num_ranks, num_ranks * shape[0], shape[1])
    if dtype in ("float32", "bfloat16", "float16"):
        return rng.normal(size=size).astype(jnp.dtype(dtype))
    return rng.integers(0, 2 if dtype == "bool" else 100, size=size).astype(dtype)


def each_rank(function, x: np.ndarray) -> dict[int, np.ndarray]:
    """A function of [ranks * rows, columns] on every rank: results by rank, of this process's ranks."""
    mesh = Mesh(np.array(jax.devices()), ("i",))
    sharding = NamedSharding(mesh, P("i"))
    given = jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def body(part):
        return function(part[0])[None]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("i"), out_specs=P("i"), check_vma=False)
    result = jax.jit(mapped)(given)
    return {shard.index[0].start or 0: np.asarray(shard.data)[0] for shard in result.addressable_shards}


def shift(num_ranks: int) -> list[tuple[int, int]]:
    return [(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)]


FUNCTIONS = {
    "psum": lambda x: jax.lax.psum(x, "i"),
    "pmax": lambda x: jax.lax.pmax(x, "i"),
    "pmin": lambda x: jax.lax.pmin(x, "i"),
    "all_gather": lambda x: jax.lax.all_gather(x, "i", tiled=True),
    "psum_scatter": lambda x: jax.lax.psum_scatter(x, "i", tiled=True),
    "all_to_all": lambda x: jax.lax.all_to_all(x, "i", 0, 0, tiled=True),
    "ppermute": lambda x: jax.lax.ppermute(x, "i", shift(jax.device_count())),
    "pbroadcast": lambda x: jax.lax.pbroadcast(x, "i", jax.device_count() - 1),
}
CASES = [
    *((name, shape, "float32") for name in FUNCTIONS for shape in (SMALL, LARGE)),
    *(("psum", LARGE, dtype) for dtype in ("bfloat16", "float16", "int32", "uint32", "int64")),
    *(("pmax", LARGE, dtype) for dtype in ("bfloat16", "int32", "uint8", "bool")),
    ("pmin", LARGE, "float16"),
    ("all_to_all", LARGE, "uint8"),
    ("all_gather", LARGE, "bool"),
]


def everything() -> list[dict[int, np.ndarray]]:
    num_ranks = jax.device_count()
    return [each_rank(FUNCTIONS[name], draw(shape, dtype, num_ranks)) for name, shape, dtype in CASES]


def exchanges(transport: str) -> None:
    """The contract of a transport: rows, sums and gradients equal the oracle's."""
    num_ranks = jax.device_count()
    with jax.default_matmul_precision("highest"):
        cfg = test_exchange.config(transport, capacity_factor=0.5)
        test_exchange.check(cfg, *test_exchange.random_case(np.random.default_rng(0), num_ranks, 70, cfg))
        test_exchange.test_gradients_are_the_transpose(transport, num_ranks)


def without_rank_one(how: str) -> str:
    """A sum that rank 1 does not come to. Gives what the others are told."""
    x = draw(LARGE, "float32", jax.device_count())
    each_rank(FUNCTIONS["psum"], x)
    if jax.process_index() == 1:
        if how == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(600)
    try:
        each_rank(FUNCTIONS["psum"], x + 1)
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return "nothing"


def main(port: str, num_ranks: str, rank: str, case: str, result: Path) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", int(num_ranks), int(rank), local_device_ids=[int(rank)])
    name, *arguments = case.split()
    result.write_bytes(pickle.dumps(globals()[name](*arguments)))
    # A process that ends otherwise waits for the others, of which one may be gone.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:5], Path(sys.argv[5]))
