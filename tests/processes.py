"""The contract suite in a job of several processes, one device each, which all run the same tests in step.

``JAX_MORIEP_TEST_JOB="PORT COUNT INDEX"`` makes a pytest one process of a job; ``tests.job`` starts jobs. A
test sees the same as in one process with all devices: results that lie in other processes are asked for when
they are looked at. Tests of other numbers of ranks than there are processes are skipped.
"""

import io
import os
import time
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl

from jax_moriep.runtime.store import DistributedStore

VARIABLE = "JAX_MORIEP_TEST_JOB"
LAUNCHED = "launched"  # of a process that the package's launcher has joined to its job
DEADLINE = 120
_fetched = 0


def join() -> None:
    """Joins the job that the environment names, if any; before jax opens its devices."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    if text != LAUNCHED:
        port, count, index = map(int, text.split())
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index, local_device_ids=[index])
    of_this_process = ArrayImpl.__array__

    def of_all(self: ArrayImpl, *args: Any, **kwargs: Any) -> np.ndarray:
        if self.is_fully_addressable or self.is_fully_replicated:
            return of_this_process(self, *args, **kwargs)
        return np.array(_gathered(self), *args, **kwargs)

    ArrayImpl.__array__ = of_all


def _gathered(array: ArrayImpl) -> np.ndarray:
    """The whole of an array, put together from what each process has of it."""
    global _fetched
    _fetched += 1
    store, key = DistributedStore(), f"test/fetched/{_fetched}"
    out = np.zeros(array.shape, array.dtype)
    # As bytes, for NumPy's files know no bfloat16.
    here = {str(i): np.asarray(s.data).view(np.uint8) for i, s in enumerate(array.addressable_shards)}
    file = io.BytesIO()
    np.savez(file, **here)
    store.put(f"{key}/{jax.process_index()}", file.getvalue())
    places = array.sharding.devices_indices_map(array.shape)
    for process in sorted({d.process_index for d in places}):
        theirs = np.load(io.BytesIO(store.get(f"{key}/{process}", time.monotonic() + DEADLINE)))
        devices = [d for d in places if d.process_index == process]
        for i, device in enumerate(devices):
            part = out[places[device]]
            out[places[device]] = theirs[str(i)].view(array.dtype).reshape(part.shape)
    return out


def skip_unless_possible(num_devices: int, num_ranks: int) -> None:
    """Skips a test whose mesh cannot be made here.

    A job's meshes have a device of each of its processes and one group of all of them: MORI keeps one group
    for a process, so that after a group of all ranks it has none of fewer.
    """
    have = jax.device_count()
    if num_devices > have or (os.environ.get(VARIABLE) and num_devices != have):
        pytest.skip(
            f"it needs {num_devices} devices, and there are {have} in {jax.process_count()} processes"
        )
    if os.environ.get(VARIABLE) and num_ranks != num_devices:
        pytest.skip(f"MORI has a group of {have} ranks here, and opens none of {num_ranks} beside it")
