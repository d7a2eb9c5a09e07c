"""The environment of processes on GPUs: room for the steps of their cases beside XLA's pool."""

from __future__ import annotations

import os

from jax_moriep import quant
from jax_moriep.bench.kinds.table import KINDS, transports_of
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import FP8, puts
from jax_moriep.mori import limits


def environment(cases: list[Case]) -> dict[str, str]:
    """What processes on GPUs need: arenas and a heap that hold the steps, and room beside XLA's pool."""
    halves = [
        case.tokens * _rows_per_token(case) * case.row_bytes
        for case in cases
        if KINDS[case.kind].fills_arenas
    ]
    megabytes = max(1024, int(2.1 * max(halves, default=0)) // (1 << 20) + 32)
    wanted = {"JAX_MORIEP_ARENA_MB": str(megabytes), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.7"}
    if any("mori" in transports_of(case) for case in cases):
        wanted["JAX_MORIEP_MORI_HEAP_MB"] = str(_mori_heap(cases))
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _rows_per_token(case: Case) -> int:
    """Rows of an arena's half for each token of a rank: what combine pushes, or dispatch puts.

    two_level has those of other nodes there too.
    """
    parts = case.ranks - 1 if any(map(puts, case.compare)) else 0
    nodes = case.ranks if "two_level" in transports_of(case) else 0
    return max(min(case.top_k, case.ranks), parts, nodes)


def _mori_heap(cases: list[Case]) -> int:
    """MiB that hold a handle for each of the cases: the heap is as large as it was made for the first."""
    sizes = {
        limits.HandleSize(
            kernel="IntraNode",
            ranks=case.ranks,
            gpus_per_node=limits.gpus_per_node("IntraNode", case.ranks, 1),
            max_tokens=case.tokens,
            hidden=case.hidden,
            element_bytes=case.numpy_dtype.itemsize,
            experts_per_rank=case.shape.num_local_experts,
            top_k=case.top_k,
            scales=-(-case.hidden // quant.GROUP) if name.endswith(FP8) else 0,
        )
        for case in cases
        if "mori" in transports_of(case)
        for name in case.compare
        if name.startswith("mori")
    }
    return (limits.HEAP_OWN_BYTES + sum(map(limits.heap_bytes, sizes)) >> 20) + 1
