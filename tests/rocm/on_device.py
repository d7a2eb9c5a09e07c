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


def main(given: Path, result: Path) -> None:
    count = int(os.environ["ROCM_SIM_DEVICES"])
    module, name, arguments = pickle.loads(given.read_bytes())
    devices = jax.devices()
    assert len(devices) == count, devices
    assert all("Simulated" in d.device_kind for d in devices), devices
    function = getattr(importlib.import_module(module), name)
    result.write_bytes(pickle.dumps(jax.tree.map(np.asarray, function(*arguments))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
