"""``bench floor``: one GPU, models' layers beside what they cannot be faster than and what others have made.

The cases run in processes of their own, as those of ``bench host`` do: what fails is recorded and the rest
goes on. The file is written after each case and behind each share of kernels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax_moriep.bench.problem import formats
from jax_moriep.bench.run import host, host_plan
from jax_moriep.bench.run.devices import of_host
from jax_moriep.bench.run.floor_plan import Kernels, Options, cases_of, kernels_of
from jax_moriep.errors import ConfigError, rule
from jax_moriep.results import machine

_OF_CASES = 0.65
"""Of the time, for the cases, where there are kernels as well."""


def run(
    options: Options, command: str, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Measures.

    Args:
      options: what.
      command: the command line, kept in the result.
      say: takes lines that tell how it goes.
      save: takes the result as far as it is, after each case.

    Returns:
      A dict with format, command, versions, machine and options; "sets", of which the only one has the cases
      as ``host.run`` gives them; "kernels", what ``bench kernels`` wrote, with an "error" where it met one.

    Raises:
      MoriepError: jax cannot start.
      ConfigError: there is no GPU.
    """
    began = time.monotonic()
    devices = of_host(options.platform, one_process=False)
    if not devices.gpus:
        raise ConfigError(rule("platform", devices.platform, "be a GPU", "run it on one"))
    until = began + 60 * options.minutes
    result: dict[str, Any] = {
        "format": formats.FLOOR,
        "command": command,
        "versions": machine.versions(),
        "machine": {**machine.machine(), "device": devices.kind, "devices": 1},
        "options": dataclasses.asdict(options),
        "sets": [],
        "kernels": [],
    }
    cases, kernels = cases_of(options), kernels_of(options)
    if cases:
        share = (until - time.monotonic()) * (_OF_CASES if kernels else 1.0)
        asked = host_plan.Options(case_seconds=options.case_seconds, platform=options.platform)
        say(f"{len(cases)} cases, at most {share:.0f} s")
        of_set = host.run_cases(
            1, cases, share, asked, devices, say, lambda so_far: save({**result, "sets": [so_far]})
        )
        result["sets"].append(of_set)
        save(result)
    for asked in kernels:
        left = until - time.monotonic()
        result["kernels"].append(_kernels(asked, left, options.platform, say))
        save(result)
    return result


def _kernels(
    asked: Kernels, seconds: float, platform: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a process with ``bench kernels`` has written within its time."""
    say(f"kernels of {', '.join(asked.shares)} {asked.dtype}, at most {seconds:.0f} s")
    with tempfile.TemporaryDirectory(prefix="jax-moriep-bench-") as folder:
        file = Path(folder, "kernels.json")
        command = [sys.executable, "-m", "jax_moriep", "bench", "kernels", *asked.argv, "--json", str(file)]
        if seconds <= 0:
            return {"error": "no time was left", "not_run": True, "shares": list(asked.shares)}
        try:
            env = os.environ if platform is None else {**os.environ, "JAX_PLATFORMS": platform}
            done = subprocess.run(command, env=env, timeout=seconds)
            # What is wrong ends it with 1 as well, and is in the file.
            error = None if done.returncode in (0, 1) else f"it ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            error = "no time was left for the rest"
        written = json.loads(file.read_text()) if file.exists() else {"shares": list(asked.shares)}
    if error is None and "runs" not in written:
        error = "it wrote nothing"
    return written if error is None else {**written, "error": error}


def failures(result: dict[str, Any]) -> list[str]:
    """What makes the run a failed one: wrong values, and what failed but baselines."""
    lines = host.failures(result)
    for of_kernels in result["kernels"]:
        lines += [f"WRONG: kernels: {' '.join(map(str, entry))}" for entry in of_kernels.get("wrong", ())]
        lines += [f"FAILED: kernels: {' '.join(map(str, entry))}" for entry in of_kernels.get("failed", ())]
        if "error" in of_kernels and not of_kernels.get("not_run"):
            lines.append(f"FAILED: kernels: {of_kernels['error']}")
    return lines
