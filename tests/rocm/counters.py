"""Reads what launches did: the file of ROCM_SIM_COUNT, a line of JSON for each launch, copy and fill."""

import collections
import json
from pathlib import Path

HOMES = ("own", "peer", "host", "arguments")


def read(path: Path, what: str = "kernel", device: int | None = None) -> list[dict]:
    """The lines of a kind, "kernel", "copy" or "fill", of all processes or of one device."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [one for one in lines if one["what"] == what and device in (None, one["device"])]


def by_kernel(path: Path, device: int | None = None) -> dict[str, collections.Counter]:
    """Sums by kernel: ``launches``, instructions by kind and ``own.read`` and its like.

    Lines of memory that two launches touch count twice.
    """
    sums = collections.defaultdict(collections.Counter)
    for launch in read(path, device=device):
        total = sums[launch["name"]]
        total["launches"] += 1
        total.update(launch["instructions"])
        for home in HOMES:
            total.update({f"{home}.{key}": number for key, number in launch[home].items()})
    return dict(sums)
