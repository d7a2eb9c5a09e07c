"""What becomes of freed memory on CPUs, seen by the page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

from jax_moriep.errors import TransportError
from jax_moriep.runtime import memory, settings

PAGES = (32 << 20) // 4096
"""Of the rows of a step: more than glibc keeps by itself."""
SCRIPT = """
import resource, statistics
import jax, jax.numpy as jnp, jax_moriep as jm
from jax.sharding import PartitionSpec as P

cfg = jm.MoEConfig(num_experts=8, top_k=4, hidden_size=1024, intermediate_size=128, transport="native")
mesh = jax.make_mesh((1,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))

@jax.jit
@jax.shard_map(mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
def there_and_back(x, ids, weights):
    there = jm.dispatch(x, ids, weights, cfg, axis_name="ep")
    return jm.combine(there.rows, there.plan, axis_name="ep")

x, weights = jnp.ones((2048, 1024)), jnp.full((2048, 4), 0.25)
ids = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (2048, 4))
counts = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(there_and_back(x, ids, weights))
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(counts)
print(int(statistics.median(counts)))
"""


def faults(**env: str) -> int:
    """Page faults of a step, at the median."""
    left = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    left |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0", **env}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=left, capture_output=True, text=True, timeout=120, check=True
    )
    return int(ended.stdout.split()[-1])


@pytest.mark.parametrize(
    ("env", "kept"),
    [
        ({}, True),
        ({"JAX_MORIEP_KEEP_MEMORY": "0"}, False),
        # What the user says of glibc holds.
        ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"}, False),
    ],
)
def test_large_buffers_are_used_again(env, kept):
    # Other work on the machine can take pages away, but not twice.
    count = min(faults(**env), faults(**env)) if kept else faults(**env)
    # A fault can take several pages, as the kernel likes.
    assert count < 100 if kept else count > PAGES // 16


def test_a_switch_that_says_nothing(monkeypatch):
    monkeypatch.setenv("JAX_MORIEP_KEEP_MEMORY", "yes")
    with pytest.raises(TransportError, match="JAX_MORIEP_KEEP_MEMORY='yes' must be 0 or 1; unset it"):
        settings.KEEP_MEMORY.value()


def test_another_c_library(monkeypatch):
    class Musl:
        pass

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Musl())
    monkeypatch.setattr(memory, "_set_by_user", lambda: False)
    assert not memory.keep_freed.__wrapped__()
