"""Which devices a host has, and what can run on them.

They are asked in a process of its own, ``python -m jax_moriep.bench.run.devices ONE_PROCESS``: who starts the
processes of a bench must not hold any device itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np

from jax_moriep import transports
from jax_moriep.bench.problem.world import AXIS
from jax_moriep.errors import MoriepError
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place

_SECONDS = 120


@dataclasses.dataclass(frozen=True)
class Devices:
    """What the host has.

    Attributes:
      platform: as jax names it.
      kind: of each device.
      count: how many there are.
      reasons: for each transport why it cannot run on them, None if it can.
    """

    platform: str
    kind: str
    count: int
    reasons: dict[str, str | None]

    @property
    def gpus(self) -> bool:
        """Whether they are GPUs."""
        return self.platform == "gpu"


def cpus(count: int) -> Devices:
    """So many devices of the CPU platform, which the processes make themselves."""
    return Devices("cpu", "cpu", count, transports.reasons(Place("cpu")))


def of_host(platform: str | None, one_process: bool) -> Devices:
    """The devices that jax finds.

    Args:
      platform: value for JAX_PLATFORMS; None leaves it as it is.
      one_process: one process shall hold all of them, instead of one each.

    Raises:
      MoriepError: jax cannot start there.
    """
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if platform is not None:
        env["JAX_PLATFORMS"] = platform
    command = [sys.executable, "-m", __name__, str(int(one_process))]
    try:
        asked = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_SECONDS, check=True)
        return Devices(**json.loads(asked.stdout.splitlines()[-1]))
    except (subprocess.SubprocessError, ValueError, IndexError, TypeError) as e:
        said = getattr(e, "stderr", None) or e
        raise MoriepError(f"jax cannot say which devices there are: {str(said)[-2000:]}") from e


def main(one_process: str) -> None:
    """Prints what ``of_host`` gives."""
    devices = jax.devices()
    first, count = devices[0], len(devices)
    if one_process == "1":
        place = Place.of(jax.sharding.Mesh(np.array(devices), (AXIS,)), AXIS)
    else:
        place = Place(first.platform, compat.architecture(first), num_ranks=count, num_processes=count)
    found = Devices(first.platform, first.device_kind, count, transports.reasons(place))
    sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
