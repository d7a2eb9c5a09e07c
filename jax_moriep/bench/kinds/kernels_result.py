"""What ``bench kernels`` writes: the entries of its result, and the FLOPs and bytes that they count."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from jax_moriep.bench.kinds.products import FORWARD, UNITS, flops
from jax_moriep.bench.measure.seconds import milliseconds
from jax_moriep.bench.problem import shares
from jax_moriep.bench.problem.shares import Data

PASSES = {"forward": False, "forward+backward": True}
"""The passes of the whole MLP, and whether they have gradients."""

# For how often a program repeats its work, and for nothing else.
_FLOPS_PER_S, BYTES_PER_S = {"bf16": 6e14, "f32": 1e14}, 2.5e12


def kernels_of(label: str) -> tuple[str, ...]:
    """The kernels in a pass; a kernel's own name."""
    return {"forward": FORWARD, "forward+backward": tuple(UNITS)}.get(label, (label,))


def estimate(data: Data, label: str) -> float:
    """Seconds that a kernel or a pass may take."""
    share, units = data.share, sum(UNITS[name] for name in kernels_of(label))
    read = data.d_out.dtype.itemsize * share.experts * share.hidden * share.inner * units / BYTES_PER_S
    return max(read, flops(share, kernels_of(label)) / _FLOPS_PER_S[data.dtype])


def described(name: str, kind: str, data: Data) -> dict[str, Any]:
    """A share's part of the result, before anything is measured."""
    share = data.share
    return {
        "share": name,
        "sizes": kind,
        "experts": share.experts,
        "hidden": share.hidden,
        "intermediate": share.inner,
        "rows": share.rows,
        "padded_rows": shares.padded_rows(data.sizes, data.spec.block),
        "block": data.spec.block,
        "capacity": data.operands[0].shape[0],
        "group_sizes": data.sizes.tolist(),
        "kernels": {},
        "mlp": {},
        "baselines": {},
        "errors": {},
    }


def entry(
    data: Data,
    label: str,
    seconds: Sequence[float],
    reference: Sequence[float],
    copied: int,
    *,
    compact: bool = False,
) -> dict[str, float]:
    """Times and rates of a kernel or a pass; see ``kernels.run``.

    Args:
      data: what it ran on.
      label: the kernel or pass.
      seconds: it took.
      reference: seconds that the dense matmuls took, or the copy.
      copied: bytes that the copy reads, and writes.
      compact: it has no padding, so that no ``of_padded`` is to be told.
    """
    share, names = data.share, kernels_of(label)
    found = milliseconds(seconds)
    taken, beside = statistics.median(seconds), statistics.median(reference)
    if share.decode:
        used = int((data.sizes > 0).sum()) * data.d_out.dtype.itemsize * share.hidden * share.inner
        found["copy_tb_per_s"] = 2 * copied / beside / 1e12
        found["weights_tb_per_s"] = sum(UNITS[name] for name in names) * used / taken / 1e12
        found["of_copy"] = found["weights_tb_per_s"] / found["copy_tb_per_s"]
        return found
    work = flops(share, names)
    found["tflop_per_s"] = work / taken / 1e12
    found["dense_ms"] = beside * 1e3
    found["dense_tflop_per_s"] = work / beside / 1e12
    found["of_dense"] = beside / taken
    if not compact:
        padded = shares.padded_rows(data.sizes, data.spec.block)
        found["of_padded"] = found["of_dense"] * padded / share.rows
    return found


def check_chain(run: dict[str, Any], label: str, found: dict[str, float]) -> None:
    """Raises RuntimeError if a pass's dense matmuls took another time together than one by one.

    XLA would then have left out or merged some, and the pass or a kernel would have been compared with too
    little.
    """
    parts = [run["kernels"].get(name, {}).get("dense_ms") for name in kernels_of(label)]
    if "dense_ms" in found and None not in parts and not 0.85 < found["dense_ms"] / sum(parts) < 1.5:
        raise RuntimeError(f"dense matmuls took {found['dense_ms']:.3f} ms together, but {parts} ms alone")
