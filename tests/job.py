"""Runs tests in jobs of one process for each GPU, as MORI wants it, on real devices or on simulated ones.

    python -m tests.job --platform rocm [--processes 1,2,8] ARGUMENTS OF PYTEST

Every process runs the same tests in step (``tests.processes``), so a job ends with its first failure.
"""

import argparse
import collections
import os
import sys

from jax_moriep.bench.run import devices
from jax_moriep.processes.launch import launch
from tests import processes

KEPT_LINES = 200


def sizes_of(count: int) -> list[int]:
    """How many processes the jobs have: 1, 2, 4, ... and all."""
    return sorted({*(1 << i for i in range(count.bit_length())), count})


def run(platform: str, size: int, arguments: list[str]) -> int:
    """Runs one job; prints what its first process says, and of others what they said before they failed."""
    kept = [collections.deque(maxlen=KEPT_LINES) for _ in range(size)]

    def on_line(process: int, line: str) -> None:
        kept[process].append(line)
        if process == 0:
            sys.stdout.write(line)
            sys.stdout.flush()

    env = {processes.VARIABLE: processes.LAUNCHED, "JAX_MORIEP_TEST_PLATFORM": platform}
    # The heap of MORI and the arenas of native are beside XLA's memory.
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    # The first tests compile MORI's kernels.
    env["JAX_MORIEP_TIMEOUT"] = os.environ.get("JAX_MORIEP_TIMEOUT", "300")
    pytest = ["-x", "-q", "-p", "no:cacheprovider", *arguments]
    ended = launch("pytest", size, args=pytest, env=env, platform=platform, module=True, on_line=on_line)
    for process, code in enumerate(ended.codes):
        if process and code == ended.returncode != 0:
            sys.stdout.write(f"process {process} ended with code {code}; it said:\n{''.join(kept[process])}")
            break
    return ended.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.job", description=__doc__)
    parser.add_argument("--platform", required=True, help="value for JAX_PLATFORMS")
    parser.add_argument("--processes", help="how many, as 1,2,8 (default: 1, 2, 4, ... and all GPUs)")
    options, arguments = parser.parse_known_args()
    sizes = [int(size) for size in options.processes.split(",")] if options.processes else None
    for size in sizes or sizes_of(devices.of_host(options.platform, one_process=False).count):
        sys.stdout.write(f"{size} processes, one GPU each\n")
        if code := run(options.platform, size, arguments):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
