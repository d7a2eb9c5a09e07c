"""The child of test_aiter.py: launches a kernel on a simulated device.

Usage: python -m tests.rocm.launch_kernel LAUNCH RESULT, a pickled Launch and the file that gets the bytes of
the output array.
"""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.rocm import code_object, hip


@dataclass(frozen=True)
class Launch:
    """A launch of the only kernel of a code object; the arguments go by their names in it."""

    code: Path
    grid: tuple[int, int, int]  # in blocks
    block: int
    arrays: dict[str, np.ndarray]  # copied to the device
    values: dict[str, int]
    output: str  # the array that the kernel changes


def run(launch: Launch) -> bytes:
    (kernel,) = code_object.kernels(launch.code)
    arrays = {name: hip.array(array) for name, array in launch.arrays.items()}
    arguments = kernel.pack(launch.values | {name: address.value or 0 for name, address in arrays.items()})
    function = hip.function(hip.load(str(launch.code)), kernel.name)
    assert hip.launch(function, launch.grid, (launch.block, 1, 1), arguments) == hip.SUCCESS
    hip.check("hipDeviceSynchronize")
    return hip.read(arrays[launch.output], launch.arrays[launch.output].nbytes)


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(run(pickle.loads(Path(sys.argv[1]).read_bytes())))
