"""Dispatch and combine on two machines: seconds, and the bytes that the machines send each other.

    python -m tests.nodes.measure_exchange --tokens 1024 --hidden 1024

prints the median time of the slowest rank and the bytes of one dispatch and combine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from collections.abc import Sequence

from tests.nodes import jobs
from tests.nodes.machines import Machines


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one transport: seconds of the slowest rank in each step, bytes of a step, and the largest error."""

    seconds: list[float]
    sent: float
    error: float


def measure(
    machines: Machines,
    transports: Sequence[str],
    *,
    tokens: int,
    hidden: int,
    experts: int,
    top_k: int,
    steps: int,
    deadline: float,
) -> dict[str, Measured]:
    """Runs the transports one after the other, with two ranks on each machine, a process each."""
    sizes = (tokens, hidden, experts, top_k, steps)
    with jobs.launch(machines, "script_exchange.py", ",".join(transports), *sizes) as job:
        assert not any(ended.code for ended in job.wait(deadline)), job.said()
    found = {}
    lines = [
        (int(process), json.loads(text)) for process, text in re.findall(r"\[(\d)\] (\{.*\})", job.said())
    ]
    for name in transports:
        told = {process: of_process for process, of_process in lines if of_process["transport"] == name}
        assert len(told) == 2 * len(machines.addresses)
        found[name] = Measured(
            [max(of_step) for of_step in zip(*(of["seconds"] for of in told.values()), strict=True)],
            sum(told[2 * machine]["sent"] for machine in range(len(machines.addresses))) / steps,
            max(of["error"] for of in told.values()),
        )
    return found


def main() -> None:
    """Prints a line for each transport."""
    parser = argparse.ArgumentParser()
    for name, default in (("tokens", 1024), ("hidden", 1024), ("experts", 32), ("top-k", 4), ("steps", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = vars(parser.parse_args())
    with Machines(2) as machines:
        found = measure(machines, ["collective", "two_level"], deadline=600, **sizes)
    for name, of_name in found.items():
        milliseconds = 1e3 * statistics.median(of_name.seconds)
        print(f"{name}: {milliseconds:.1f} ms, {of_name.sent / 1e6:.2f} MB, error {of_name.error:.1e}")


if __name__ == "__main__":
    main()
