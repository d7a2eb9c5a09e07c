"""The end of ``bench kernels`` for people: what did not run, and what was wrong. Numbers were told before."""

from __future__ import annotations

from typing import Any


def as_text(result: dict[str, Any]) -> str:
    """The closing lines of a result of ``kinds.kernels``, or of ``kinds.quantised``, without baselines."""
    lines = [f"{name} did not run: {reason}" for name, reason in result.get("unavailable", {}).items()]
    for key, title in (("inaccurate", "inaccurate baselines"), ("not_run", "not run")):
        lines += [f"{title}: {', '.join(map(str, entry))}" for entry in result.get(key, ())]
    return "\n".join([*lines, *(f"{key}: {result[key] or 'nothing'}" for key in ("wrong", "failed"))])
