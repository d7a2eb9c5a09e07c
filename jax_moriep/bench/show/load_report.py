"""The result of ``bench load`` as a table for people."""

from __future__ import annotations

from typing import Any

from jax_moriep.bench.problem.checkpoint import Model
from jax_moriep.bench.problem.checks import failed_checks


def as_text(result: dict[str, Any]) -> str:
    """The result as a table for people."""
    model, own, machine = Model(**result["model"]), result["own_bytes"], result["machine"]
    total = model.num_layers * model.num_experts * model.expert_bytes
    ours, theirs = result["calls"]
    lines = [
        f"{total / 1e9:.3g} GB: {model.num_layers} layers, E={model.num_experts}, H={model.hidden}, "
        f"I={model.intermediate}, bfloat16, {-(-model.num_layers // model.layers_per_file)} files; "
        f"{result['processes']} processes on {machine['cores']} cores of {machine['processor']}",
        f"{'':<20}{'p50 s':>8}{'least':>8}{'most':>8}{'GB/s':>8}{'time over ' + theirs['name']:>24}"
        f"{'peak memory over own experts':>32}",
    ]
    for call in (ours, theirs):
        lines.append(
            f"  {call['name']:<18}{call['p50']:>8.2f}{min(call['seconds']):>8.2f}{max(call['seconds']):>8.2f}"
            f"{total / call['p50'] / 1e9:>8.2f}{call['p50'] / theirs['p50']:>24.2f}"
            f"{peak(result, call['name']) / own:>32.2f}"
        )
    wrong = failed_checks(result)
    count = len(result["checks"])
    if not wrong:
        return "\n".join([*lines, f"all {count} comparisons of the bits are right"])
    lines.append(f"WRONG: {len(wrong)} of {count} comparisons")
    lines += [f"  {check['name']}: {check['error']:.0f} {check['what']}" for check in wrong[:10]]
    return "\n".join(lines)


def peak(result: dict[str, Any], name: str) -> int:
    """The most bytes that became resident in a process while it loaded."""
    return max(seen["peak"] - seen["idle"] for seen in result["memory"][name])
