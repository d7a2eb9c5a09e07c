"""Meshes for tests that run on as many devices as there are: eight of a CPU, one GPU or several, or a job's.

A test that is told a number of ranks is skipped where there are fewer devices. One that takes any number asks
for the one that shows most, and gets what there is.
"""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from tests import processes


def of(*sizes: int, names: tuple[str, ...] = ("ep",), kind: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of exactly these sizes; the test is skipped where it cannot be made."""
    count = int(np.prod(sizes))
    processes.skip_unless_possible(count, sizes[names.index("ep")])
    return Mesh(np.array(jax.devices()[:count]).reshape(sizes), names, axis_types=(kind,) * len(sizes))


def up_to(*sizes: int, names: tuple[str, ...] = ("ep",), kind: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of these sizes, the largest of them cut down until there are devices enough."""
    return of(*cut(*sizes), names=names, kind=kind)


def ranks(wanted: int) -> int:
    """As many ranks as wanted, or the lower power of two that there are devices for."""
    return cut(wanted)[0]


def cut(*sizes: int) -> tuple[int, ...]:
    """The sizes, each cut to a lower power of two where there are too few devices, the largest first.

    A job's meshes have a device of each of its processes. There is a job for each number of ranks, so that
    nothing is cut there, and a test runs in one of them.
    """
    left = list(sizes)
    while int(np.prod(left)) > jax.device_count() and not os.environ.get(processes.VARIABLE):
        largest = left.index(max(left))
        left[largest] = 1 << (left[largest] - 1).bit_length() - 1
    return tuple(left)
