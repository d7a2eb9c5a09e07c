"""Reads what launches did: the file of ROCM_SIM_COUNT, a line of JSON for each launch, copy and fill."""

import collections
import json
import os
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
    return _sums(read(path, device=device))


def mark(path: str, name: str, device: int) -> None:
    """Adds a line that ends a phase of a device's work, which must have ended."""
    line = json.dumps({"what": "mark", "device": device, "name": name})
    # One write to a file that only grows, so that several processes can share it.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def by_phase(path: Path, device: int) -> dict[str, dict[str, collections.Counter]]:
    """For each phase of a device's work that ``mark`` ended, sums as of ``by_kernel``.

    Copies and fills are among them, as kernels "copy" and "fill" that have read and written so many bytes.
    """
    phases, lines = {}, []
    for one in (json.loads(line) for line in path.read_text().splitlines()):
        if one["device"] != device:
            continue
        lines.append(one)
        if one["what"] == "mark":
            phases[one["name"]], lines = _sums(lines), []
    return phases


def _sums(lines: list[dict]) -> dict[str, collections.Counter]:
    sums = collections.defaultdict(collections.Counter)
    for one in lines:
        if one["what"] == "mark":
            continue
        total = sums[one.get("name", one["what"])]
        total["launches"] += 1
        if one["what"] == "kernel":
            total.update(one["instructions"])
            for home in HOMES:
                total.update({f"{home}.{key}": number for key, number in one[home].items()})
            continue
        total[f"{one['to']}.written"] += one["bytes"]
        if "from" in one:
            total[f"{one['from']}.read"] += one["bytes"]
    return dict(sums)
