"""The child of the ``on_rocm`` fixture: calls one function where jax's devices are simulated ones.

Usage: python -m tests.rocm.on_device GIVEN RESULT, two files of pickle.
"""

import importlib
import os
import pickle
import sys
from pathlib import Path

import jax
import numpy as np
from jax._src import hardware_utils


def main(given: Path, result: Path) -> None:
    # The plugin counts the devices that the kernel's driver shows, and there is no driver.
    count = int(os.environ["ROCM_SIM_DEVICES"])
    hardware_utils.num_available_amd_gpus = lambda stop_at=None: count
    module, name, arguments = pickle.loads(given.read_bytes())
    devices = jax.devices()
    assert len(devices) == count, devices
    assert all("Simulated" in d.device_kind for d in devices), devices
    function = getattr(importlib.import_module(module), name)
    result.write_bytes(pickle.dumps(jax.tree.map(np.asarray, function(*arguments))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
