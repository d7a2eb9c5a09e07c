"""The child of the ``on_rocm`` fixture: calls functions where jax's devices are simulated ones.

Usage: python -m tests.rocm.on_device, and a line "GIVEN RESULT", two files of pickle, for each call. A call
that is done is answered with a line; one that fails ends the process.
"""

import importlib
import os
import pickle
import sys
from pathlib import Path

import jax
import numpy as np


def main() -> None:
    count = int(os.environ["ROCM_SIM_DEVICES"])
    devices = jax.devices()
    assert len(devices) == count, devices
    assert all("Simulated" in d.device_kind for d in devices), devices
    for line in sys.stdin:
        given, result = map(Path, line.split())
        module, name, arguments = pickle.loads(given.read_bytes())
        function = getattr(importlib.import_module(module), name)
        result.write_bytes(pickle.dumps(jax.tree.map(np.asarray, function(*arguments))))
        print("done", flush=True)


if __name__ == "__main__":
    main()
