"""The rows of ``bench floor``: ratios of what was measured, each with the aim that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax_moriep.bench.kinds.experts import BACKWARD, FORWARD
from jax_moriep.bench.kinds.products import UNITS
from jax_moriep.bench.problem.names import DENSE_COPY, DENSE_COPY_READ, READ, TORCH
from jax_moriep.bench.run.floor_plan import OURS, model_of
from jax_moriep.bench.show import report


@dataclasses.dataclass(frozen=True)
class Row:
    """One number.

    Attributes:
      group: what it was measured on, such as "deepseek-v3 layer".
      what: which number of it.
      value: the number.
      unit: "" for a ratio.
      aim: what it should reach; None without one.
      at_least: larger is better.
    """

    group: str
    what: str
    value: float
    unit: str = ""
    aim: float | None = None
    at_least: bool = False

    @property
    def reached(self) -> float | None:
        """How much of the aim: at least 1 where it is met; None without an aim."""
        if self.aim is None:
            return None
        return self.value / self.aim if self.at_least else self.aim / self.value


_FLOORS = {DENSE_COPY: "dense products and copies", DENSE_COPY_READ: "these and reading all experts once"}
_AIMS_OVER_FLOOR = {
    ("deepseek-v3", DENSE_COPY, FORWARD): 1.08,
    ("deepseek-v3", DENSE_COPY, BACKWARD): 1.10,
    ("qwen3-30b-a3b", DENSE_COPY_READ, FORWARD): 1.35,
    ("qwen3-30b-a3b", DENSE_COPY_READ, BACKWARD): 1.35,
}
_AIMS_TIMES_FASTER = {
    ("qwen3-30b-a3b", TORCH, FORWARD): 1.6,
    ("qwen3-30b-a3b", TORCH, BACKWARD): 1.5,
}
_AIMS_OF_MEMORY = {"deepseek-v3": 750.0}
"""MiB, forward and backward."""
_AIMS_OF_DECODE = {
    ("qwen3-30b-a3b", "T=1"): 2.5,
    ("qwen3-30b-a3b", "T=8"): 1.5,
    ("qwen3-30b-a3b", "T=128"): 1.2,
    ("deepseek-v3", "T=1"): 1.2,
    ("deepseek-v3", "T=128"): 1.1,
}
_AIMS_OF_ROUTE = {FORWARD: 0.15, BACKWARD: 0.45}
"""Milliseconds."""
_AIMS_OF_DENSE = {"deepseek-v3-ep8-t1024": 0.85, "gpt-oss-120b-ep4": 0.85}
_AIM_OF_PRODUCTS = {"deepseek-v3-ep8": 0.93}
"""All six by one, in one run."""
_AIM_OF_F32 = 0.8


def rows_of(result: dict[str, Any]) -> list[Row]:
    """All rows that the result has numbers for, in the order of its parts."""
    of_kind = {"layer": _layer, "route": _route, "decode": _decode, "train": _train}
    rows: list[Row] = []
    for of_set in result["sets"]:
        for entry in of_set["cases"]:
            rows += of_kind[entry["case"]["kind"]](entry)
    for of_kernels in result["kernels"]:
        for run in of_kernels.get("runs", ()):
            rows += _kernels(run, of_kernels["dtype"])
    return rows


def _layer(entry: dict[str, Any]) -> Iterator[Row]:
    case = report.case_of(entry)
    model, is_uniform = model_of(case), case.routing == "uniform"
    group = f"{model} layer" + ("" if is_uniform else f", {case.routing} routing")
    for operation in (FORWARD, BACKWARD):
        times = {c["name"]: c["p50"] for c in entry["calls"] if c["operation"] == operation}
        if OURS not in times:
            continue
        yield Row(group, operation, times[OURS] * 1e3, "ms")
        for floor, said in _FLOORS.items():
            if floor in times:
                aim = _AIMS_OVER_FLOOR.get((model, floor, operation)) if is_uniform else None
                yield Row(group, f"{operation} over {said}", times[OURS] / times[floor], aim=aim)
        for other in [name for name in times if name not in (OURS, *_FLOORS)]:
            aim = _AIMS_TIMES_FASTER.get((model, other, operation)) if is_uniform else None
            said = f"{operation}, times faster than {_said(entry, other)}"
            yield Row(group, said, times[other] / times[OURS], aim=aim, at_least=True)
    for call in entry["calls"]:
        if call["operation"] == BACKWARD and call["name"] in (OURS, TORCH) and "memory" in call:
            aim = _AIMS_OF_MEMORY.get(model) if call["name"] == OURS and is_uniform else None
            what = f"{BACKWARD}, memory of {call['name']} beside operands and results"
            yield Row(group, what, call["memory"] / 2**20, "MiB", aim)


def _said(entry: dict[str, Any], name: str) -> str:
    """A baseline's name, with a word where values of its are wrong."""
    over = {check["what"].split(" of rank")[0] for check in entry["wrong"] if check["name"] == name}
    return name + (f" (its {', '.join(sorted(over))} wrong)" if over else "")


def _route(entry: dict[str, Any]) -> Iterator[Row]:
    case = report.case_of(entry)
    for call in entry["calls"]:
        group = f"router, E={case.experts} T={case.tokens} H={case.hidden}"
        yield Row(group, call["operation"], call["p50"] * 1e3, "ms", _AIMS_OF_ROUTE[call["operation"]])


def _decode(entry: dict[str, Any]) -> Iterator[Row]:
    model = model_of(report.case_of(entry))
    for operation in report.operations(entry):
        (ours,), floor = report.of_operation(entry, operation)
        group = f"{model} decode"
        yield Row(group, operation, ours["p50"] * 1e6, "us")
        if floor is not None and floor["name"] == READ:
            aim = _AIMS_OF_DECODE.get((model, operation))
            yield Row(
                group, f"{operation} over reading the used experts", ours["p50"] / floor["p50"], aim=aim
            )


def _train(entry: dict[str, Any]) -> Iterator[Row]:
    for call in entry["calls"]:
        yield Row("training step", call["name"], call["p50"] * 1e3, "ms")


def _kernels(run: dict[str, Any], dtype: str) -> Iterator[Row]:
    share = run["share"]
    group = f"{share} kernels, {run['sizes']} runs, {dtype}"
    good = {name: entry for name, entry in run["kernels"].items() if "dense_ms" in entry}
    if set(good) == set(UNITS):
        dense, ours = (sum(entry[key] for entry in good.values()) for key in ("dense_ms", "ms"))
        aim = _AIM_OF_PRODUCTS.get(share) if dtype == "bf16" else _AIM_OF_F32
        yield Row(group, "six products, of dense", dense / ours, aim=aim, at_least=True)
    for label, entry in run["mlp"].items():
        said = label.removeprefix("triton ")
        if "of_dense" in entry:
            aim = _AIMS_OF_DENSE.get(share) if dtype == "bf16" else _AIM_OF_F32
            yield Row(group, f"MLP {said}, of dense", entry["of_dense"], aim=aim, at_least=True)
        elif "of_copy" in entry:
            yield Row(group, f"MLP {said}, of the copy's speed", entry["of_copy"], at_least=True)
