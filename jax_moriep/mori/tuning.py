"""Which of MORI's kernel types runs, and with how many work-groups and waves: from the tables in its wheel.

A table is a JSON file for a GPU model, a kernel type, a number of ranks and a phase (dispatch or combine).
Its rows were measured by MORI's authors for a type of rows, a number of tokens, a hidden size and mostly a
top_k. We take the nearest row: of hidden size, then of top_k (rows without one were measured at 8: their
bandwidth times their time is what 8 experts need), then the least that has at least as many tokens, or else
the one with the most.

Not all that is in them is believed:

- Combine has two ways: peers fetch rows from MORI's own buffer, or each rank sends them from anywhere. In
  MI300X's tables the second way's rows equal the first's to the last digit, measured time included. Wherever
  both were measured, sending wants several times as many waves. Such copies are left out, and
  ``SEND_COMBINE`` is taken, which is what the tables of the models with true measurements say on the whole.
- Block counts that are no multiple of 8 (257, 255, 223 and 225 are there) leave some of the chip's eight
  parts with one block more than others; nothing in the kernels asks for that. They are rounded to the nearest
  multiple of 8.
- Blocks beyond the compute units of the device at hand, which happens with another model's table or with a
  chip that is partitioned, would be waited for by blocks that do not make room. They are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax_moriep.config import MoEConfig
from jax_moriep.mori import limits
from jax_moriep.tuning_options import Tuning

# The compute units of whole chips.
COMPUTE_UNITS = {"mi300x": 304, "mi325x": 304, "mi308x": 80, "mi350x": 256, "mi355x": 256}
_MODEL_OF_ARCH = {"gfx942": "mi300x", "gfx950": "mi355x"}
# At so many tokens per rank or fewer, InterNodeV1LL is taken: the threshold that SGLang has by default.
LOW_LATENCY_TOKENS = 256
# The names of types of rows in the tables, the nearest first.
_TABLE_TYPES = {
    "float32": ("bf16",),
    "bfloat16": ("bf16",),
    "float8_e4m3fnuz": ("fp8_e4m3_fnuz", "bf16"),
}
# The top_k of rows that name none.
_UNNAMED_TOP_K = 8
_CHIP_PARTS = 8
# (block_num, warp_num_per_block) of a combine whose ranks send: up to 256 tokens, and above.
SEND_COMBINE = ((256, 8), (256, 16))
_SEND_COMBINE_TOKENS = 256
# (block_num, warp_num_per_block, rdma_block_num) where no table has a row: MORI's own.
_DEFAULTS = {
    ("IntraNode", "dispatch"): (256, 16, 0),
    ("IntraNode", "combine"): (80, 8, 0),
    ("IntraNodeLL", "dispatch"): (128, 16, 0),
    ("IntraNodeLL", "combine"): (80, 8, 0),
    ("InterNodeV1", "dispatch"): (96, 8, 64),
    ("InterNodeV1", "combine"): (96, 8, 64),
    ("InterNodeV1LL", "dispatch"): (256, 8, 128),
    ("InterNodeV1LL", "combine"): (256, 8, 128),
}
_DEFAULT = (128, 16, 0)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a group of ranks runs on, as the tables know it.

    Attributes:
      arch: of the devices, such as "gfx942".
      model: as the tables name it, such as "mi300x"; see ``model_of``.
      compute_units: of one device.
      ranks: R.
      nodes: machines.
    """

    arch: str
    model: str
    compute_units: int
    ranks: int
    nodes: int = 1


@dataclasses.dataclass(frozen=True)
class Launch:
    """The numbers of one launch, and where they are from."""

    block_num: int
    warp_num_per_block: int
    rdma_block_num: int
    source: str

    def __str__(self) -> str:
        network = f", {self.rdma_block_num} of them for the network" if self.rdma_block_num else ""
        return f"{self.block_num} blocks{network}, of {self.warp_num_per_block} waves ({self.source})"


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What ``transport="mori"`` runs for a config on some hardware. ``str()`` is made for people."""

    kernel: str
    why: str
    dispatch: Launch
    combine: Launch

    def __str__(self) -> str:
        return "\n".join(
            (
                f"mori_kernel: {self.kernel} ({self.why})",
                f"  dispatch: {self.dispatch}",
                f"  combine: {self.combine}",
            )
        )


def model_of(arch: str, device_kind: str) -> str:
    """The GPU's model as the tables name it.

    Args:
      arch: such as "gfx942".
      device_kind: what jax says of the device; a kind that names no known model gets the usual one of its
      arch.
    """
    kind = device_kind.lower()
    return next((model for model in COMPUTE_UNITS if model in kind), _MODEL_OF_ARCH.get(arch, "unknown"))


def choose_kernel(tuning: Tuning | None, nodes: int, num_tokens: int, experts: int = 2) -> tuple[str, str]:
    """The kernel type that runs, and why.

    Args:
      tuning: of the config.
      nodes: machines of the group.
      num_tokens: T.
      experts: of a rank.
    """
    if tuning is not None and tuning.mori_kernel != "auto":
        return tuning.mori_kernel, "named by cfg.tuning"
    if nodes == 1:
        return "IntraNode", "all ranks are on one machine"
    if num_tokens <= LOW_LATENCY_TOKENS and experts < 2:
        return "InterNodeV1", f"{nodes} machines, and one expert per rank, which InterNodeV1LL cannot do"
    if num_tokens <= LOW_LATENCY_TOKENS:
        return "InterNodeV1LL", f"{nodes} machines, and at most {LOW_LATENCY_TOKENS} tokens per rank"
    return "InterNodeV1", f"{nodes} machines, and more than {LOW_LATENCY_TOKENS} tokens per rank"


def resolve(
    tables: Path, hardware: Hardware, cfg: MoEConfig, num_tokens: int, dtype: str, *, zero_copy: bool = False
) -> Resolution:
    """Chooses the kernel type and the numbers of its launches.

    Args:
      tables: the folder of the JSON tables, ``Wheel.tables``.
      hardware: of the group.
      cfg: the layer; its ``tuning`` overrides.
      num_tokens: T.
      dtype: the name of x's type; what dispatch sends is float8 with ``cfg.wire_dtype="fp8"``.
      zero_copy: whether combine fetches rows from MORI's own buffer; else its ranks send them.

    Returns:
      The choice. It is not checked against ``limits``: a number that the user gave may be refused there.
    """
    experts = -(-cfg.num_experts // hardware.ranks)
    kernel, why = choose_kernel(cfg.tuning, hardware.nodes, num_tokens, experts)
    sent = "float8_e4m3fnuz" if cfg.wire_dtype == "fp8" else dtype
    launches = [
        _launch(tables, hardware, kernel, phase, rows, num_tokens, cfg, zero_copy)
        for phase, rows in (("dispatch", sent), ("combine", dtype))
    ]
    return Resolution(kernel, why, *launches)


def _launch(
    tables: Path,
    hardware: Hardware,
    kernel: str,
    phase: str,
    dtype: str,
    num_tokens: int,
    cfg: MoEConfig,
    zero_copy: bool,
) -> Launch:
    sends = phase == "combine" and not zero_copy and kernel in limits.INTRA_NODE
    found = _nearest_row(tables, hardware, kernel, phase, dtype, num_tokens, cfg, zero_copy)
    if found is not None:
        row, source = found
        blocks, warps, network = row["block_num"], row["warp_per_block"], row["rdma_block_num"]
        if blocks != _even(blocks):
            source += f", its {blocks} blocks evened"
    elif sends:
        blocks, warps = SEND_COMBINE[num_tokens > _SEND_COMBINE_TOKENS]
        network, source = 0, "no measured row; what sending takes on other models"
    else:
        blocks, warps, network = _DEFAULTS.get((kernel, phase), _DEFAULT)
        source = "no measured row; MORI's default"
    blocks = min(_even(blocks), hardware.compute_units)
    most = limits.most_warps(hardware.ranks, -(-cfg.num_experts // hardware.ranks))
    least = limits.MIN_WARPS_LL if kernel == "IntraNodeLL" else 1
    warps = max(least, min(warps, most))
    return _overridden(Launch(blocks, warps, network, source), cfg.tuning)


def _overridden(launch: Launch, tuning: Tuning | None) -> Launch:
    """The user's numbers in place of the tables', and blocks for the network that leave the machine some."""
    given = {
        name: value
        for name in ("block_num", "warp_num_per_block", "rdma_block_num")
        if (value := getattr(tuning, name, None)) is not None
    }
    if given:
        others = "" if len(given) == 3 else f", the rest: {launch.source}"
        launch = dataclasses.replace(launch, **given, source=f"{', '.join(given)} by cfg.tuning{others}")
    if "rdma_block_num" not in given and launch.rdma_block_num >= launch.block_num:
        launch = dataclasses.replace(launch, rdma_block_num=launch.block_num // 2)
    return launch


def _even(blocks: int) -> int:
    """The nearest multiple of the chip's parts; what is less than one block for each is left alone."""
    return blocks if blocks < _CHIP_PARTS else (blocks + _CHIP_PARTS // 2) // _CHIP_PARTS * _CHIP_PARTS


def _nearest_row(
    tables: Path,
    hardware: Hardware,
    kernel: str,
    phase: str,
    dtype: str,
    num_tokens: int,
    cfg: MoEConfig,
    zero_copy: bool,
) -> tuple[dict[str, Any], str] | None:
    """The row to take and words that say which it is; None if no table has one that can be believed."""
    table = _table(tables, hardware, kernel, phase)
    if table is None:
        return None
    rows = [row for row in _rows(table) if _even(row["block_num"]) <= hardware.compute_units]
    if phase == "combine":
        rows = _combine_rows(rows, zero_copy)
    wanted = next((t for t in _TABLE_TYPES[dtype] if any(row["dtype"] == t for row in rows)), None)
    rows = [row for row in rows if row["dtype"] == wanted]
    if not rows:
        return None
    rows = _closest(rows, lambda row: row["hidden_dim"], cfg.hidden_size)
    rows = _closest(rows, lambda row: row.get("topk") or _UNNAMED_TOP_K, cfg.top_k)
    rows.sort(key=lambda row: row["num_tokens"])
    row = next((row for row in rows if row["num_tokens"] >= num_tokens), rows[-1])
    top_k = row.get("topk") or _UNNAMED_TOP_K
    said = f"{row['num_tokens']} tokens, hidden {row['hidden_dim']}, top_k {top_k}, {wanted}"
    return row, f"{table.name}: {said}"


def _closest(rows: list[dict[str, Any]], of: Any, wanted: int) -> list[dict[str, Any]]:
    """The rows whose value is nearest, the smaller of two that are equally near."""
    nearest = min((abs(of(row) - wanted), of(row)) for row in rows)[1]
    return [row for row in rows if of(row) == nearest]


def _combine_rows(rows: Sequence[dict[str, Any]], zero_copy: bool) -> list[dict[str, Any]]:
    """The rows of combine as it is launched, without copies of the other way's rows."""
    plain = [row for row in rows if row["quant_type"] == "none"]
    fetched = [_measurement(row) for row in plain if row["zero_copy"]]
    return [
        row
        for row in plain
        if row["zero_copy"] == zero_copy and (zero_copy or _measurement(row) not in fetched)
    ]


def _measurement(row: dict[str, Any]) -> dict[str, Any]:
    """What two measurements would not agree in to the last digit."""
    return {name: value for name, value in row.items() if name != "zero_copy"}


def _table(tables: Path, hardware: Hardware, kernel: str, phase: str) -> Path | None:
    """The file of this model, or that of the model of this arch whose size is nearest."""
    end = f"_{kernel}_ep{hardware.ranks}_{phase}.json"
    found = {path.name.split("_")[1]: path for path in sorted(tables.glob(f"{hardware.arch}_*{end}"))}
    if hardware.model in found:
        return found[hardware.model]
    by_size = sorted(found, key=lambda model: abs(COMPUTE_UNITS.get(model, 0) - hardware.compute_units))
    return found[by_size[0]] if by_size else None


@functools.cache
def _rows(table: Path) -> list[dict[str, Any]]:
    return json.loads(table.read_text())["rules"]
