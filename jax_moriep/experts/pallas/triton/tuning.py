"""How the kernels are cut on a device: tables shipped as data, and pure functions that look them up.

``devices/`` has a file for each kind of device with a table, as ``jax-moriep tune`` writes it, and the
source of its numbers. Nothing is measured behind the user's back: ``jax-moriep tune`` measures and writes a
table, and the environment variable JAX_MORIEP_TUNING names a file whose entries come before the shipped ones.
A table that does not suit a device costs time and never changes what is computed, but for the order of f32
sums.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_moriep.errors import ConfigError, rule
from jax_moriep.experts.pallas.launch import Tile
from jax_moriep.runtime import settings

KERNELS = ("gate_up", "down", "d_act", "d_rows", "dw1", "dw2")
FORWARD = KERNELS[:2]
CLASSES = ("few", "some", "many")
"""Rows of an expert: below 64, below 256, more. Tiles of the H100's table have 16 to 64, 128 and 128 rows."""
HOPPER = "NVIDIA H100 80GB HBM3"
_HOPPER_KINDS = ("NVIDIA H", "NVIDIA GH")
"""How the kinds of NVIDIA's GPUs of that chip begin: the same shared memory, and the same multiprocessors."""
SMALLEST = "AMD Instinct MI300X"
"""Serves every device that has no entries: what fits its 64 KiB of local memory fits everywhere."""

# (64 + 2 * 64) * 32 values of 4 bytes in 2 stages are 48 KiB, which every GPU's local memory holds. Not
# tuned: exact f32 products use no matrix unit, and of few rows TF32 is bound by reading weights.
_F32 = Tile(rows=64, cols=64, depth=32, warps=4, stages=2)

_DOZENS = 16
"""Rows of an expert, in the mean, from which on kernels of ``FORWARD`` take the tile "dozens" for "few", if
the device has one: half of what a tile "few" of the H100's table has, which many runs exceed then."""

_FEWEST = 24
"""Rows of an expert, in the mean, up to which codes meet the tiles of "fewest_codes", which have 16 rows. How
it was chosen is not recorded."""

Table = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]
"""Device kind -> kernel -> class -> the fields of Tile."""


def class_of(block: int) -> str:
    """The class of a call's rows per expert.

    ``group_sizes`` is not known when the program is made, but ``block`` is, and ``plan.default_block`` makes
    it a quarter of an expert's mean run.
    """
    return "few" if block < 16 else "some" if block < 64 else "many"


def lookup(
    table: Table,
    device_kind: str,
    kernel: str,
    block: int,
    itemsize: int,
    mean_rows: float = 0,
    *,
    tf32: bool = False,
) -> Tile:
    """The tile of a kernel.

    A run that is longer than the tile has its expert's weights read again, and reading them is what bounds
    kernels with few rows. So those of ``FORWARD`` may have a tile for runs of dozens of rows.

    Args:
      table: see ``Table``.
      device_kind: as jax names the device; one that has no entries gets those of ``HOPPER`` or ``SMALLEST``.
      kernel: a name in ``KERNELS``.
      block: rows per block.
      itemsize: bytes of one value of rows.
      mean_rows: of an expert, in the mean, where the routing is balanced.
      tf32: f32 values are multiplied in TF32, for which a table may have entries.

    Returns:
      The tile.
    """
    if itemsize > 2:
        if not tf32 or class_of(block) == "few" or not device_kind.startswith(_HOPPER_KINDS):
            return _F32
        of_kernel = _of_device(table, device_kind)[kernel]
        return Tile(**(of_kernel.get("tf32") or shipped()[HOPPER][kernel]["tf32"]))
    of_kernel, name = _of_device(table, device_kind)[kernel], class_of(block)
    if name == "few" and kernel in FORWARD and mean_rows >= _DOZENS:
        name = "dozens" if "dozens" in of_kernel else name
    return Tile(**of_kernel[name])


def _of_device(table: Table, device_kind: str) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    other = HOPPER if device_kind.startswith(_HOPPER_KINDS) else SMALLEST
    return table.get(device_kind) or table[other]


def lookup_of_codes(table: Table, device_kind: str, kernel: str, block: int, mean_rows: float) -> Tile:
    """The tile of a kernel of ``FORWARD`` that multiplies codes.

    With few rows such a kernel is bound by reading weights, which tiles of fewer rows read several times, and
    by converting them, which takes longer for tiles of more rows than there are.

    Args:
      table: see ``Table``.
      device_kind: as for ``lookup``.
      kernel: its name.
      block: rows per block.
      mean_rows: the most rows that an expert can have in the mean.

    Returns:
      The tile.
    """
    of_kernel = _of_device(table, device_kind)[kernel]
    if class_of(block) != "few":
        return Tile(**of_kernel[class_of(block)])
    name = "fewest_codes" if mean_rows <= _FEWEST else "few_codes"
    return Tile(**(of_kernel.get(name) or shipped()[HOPPER][kernel][name]))


@functools.cache
def shipped() -> Table:
    """The tables in the package, all devices in one."""
    folder = importlib.resources.files("jax_moriep.experts.pallas.triton").joinpath("devices")
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name
    )
    return {kind: tiles for file in files for kind, tiles in json.loads(file.read_text())["devices"].items()}


def table() -> Table:
    """The shipped table, with the entries of the file that JAX_MORIEP_TUNING names before it.

    Raises:
      ConfigError: the file cannot be read or holds no such table.
    """
    path = settings.TUNING.value()
    return shipped() if path is None else {**shipped(), **_read(path)}


@functools.cache
def _read(path: Path) -> Table:
    try:
        devices = json.loads(path.read_text())["devices"]
        for kernels in devices.values():
            for kernel in KERNELS:
                for name in CLASSES:
                    Tile(**kernels[kernel][name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            rule(
                settings.TUNING.name,
                str(path),
                f"name a file that `jax-moriep tune` wrote ({error!r})",
                "run it again",
            )
        ) from error
    return devices


def as_entry(tile: Tile) -> dict[str, Any]:
    """A tile as the table holds it."""
    return dataclasses.asdict(tile)
