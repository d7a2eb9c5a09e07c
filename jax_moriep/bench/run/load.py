"""``bench load``: ``jm.weights.load`` by turns with ``safetensors`` reading the same bytes; and memory."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from jax_moriep.bench.kinds import load
from jax_moriep.bench.measure.seconds import joined
from jax_moriep.bench.problem import formats
from jax_moriep.bench.problem.checkpoint import Model
from jax_moriep.bench.problem.world import Barrier
from jax_moriep.bench.run import load_worker, processes
from jax_moriep.errors import ConfigError, MoriepError, rule
from jax_moriep.results import machine

_FILE_BYTES = 1e9
_GLIBC_DEFAULT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Freed memory goes back to the system: a checkpoint is loaded once, into pages that a process gets anew."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--gb", type=float, default=0.2, help="size of the checkpoint, 1e9 bytes (default: 0.2)"
    )
    for option, default, text in (
        ("--processes", 4, "processes, one device each"),
        ("--rounds", 3, "timed turns"),
        ("--experts", 32, "E"),
        ("--hidden", 1024, "H"),
        ("--intermediate", 512, "I"),
    ):
        parser.add_argument(option, type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoint is made, and deleted again (default: a temporary one)",
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="end the processes after S seconds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def of_arguments(args: argparse.Namespace) -> Model:
    """The model whose checkpoint is about as large as asked for."""
    for name in ("gb", "processes", "rounds", "experts", "hidden", "intermediate"):
        if not 0 < getattr(args, name) < math.inf:
            must = "be positive and finite"
            raise ConfigError(rule(f"--{name}", getattr(args, name), must, "pass a positive number"))
    model = Model(1, args.experts, args.hidden, args.intermediate, 1)
    layer = args.experts * model.expert_bytes
    return dataclasses.replace(
        model,
        num_layers=max(1, round(args.gb * 1e9 / layer)),
        layers_per_file=max(1, int(_FILE_BYTES / layer)),
    )


def measure(
    model: Model, num_processes: int, rounds: int, command: str, folder: Path | None, timeout: float | None
) -> dict[str, Any]:
    """Makes the checkpoint, loads it both ways, and deletes it.

    Args:
      model: what is in it.
      num_processes: that load it together.
      rounds: timed turns, behind one that is not.
      command: the command line, kept in the result.
      folder: where the checkpoint's folder is made; None for the system's place of temporary files.
      timeout: seconds for the processes; None for no limit.

    Returns:
      A dict with format, command, versions, machine and model; own_bytes, those of the experts of the process
      that has most; calls, as ``runner.measure`` has them; checks; and memory, for each way what each process
      saw, in bytes.

    Raises:
      ConfigError: safetensors is not installed, or the checkpoint cannot be made in ``folder``.
      MoriepError: a process failed; the text has its last lines.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise ConfigError(
            "bench load compares with the package safetensors, which is not installed; pip install it"
        )
    try:
        place = tempfile.TemporaryDirectory(prefix="jax-moriep-load-", dir=folder)
    except OSError as e:
        must = f"be an existing folder that can be written to ({e.strerror})"
        raise ConfigError(rule("--folder", str(folder), must, "make the folder first")) from None
    with place as made:
        checkpoint = Path(made)
        model.write(checkpoint)
        found = _run(model, checkpoint, num_processes, rounds, timeout)
    return {
        "format": formats.LOAD,
        "command": command,
        "versions": machine.versions() | {"safetensors": importlib.metadata.version("safetensors")},
        "machine": machine.machine(),
        "model": dataclasses.asdict(model),
        "processes": num_processes,
        "own_bytes": -(-model.num_experts // num_processes) * model.num_layers * model.expert_bytes,
        "calls": joined(found),
        "checks": [check for of_process in found for check in of_process["checks"]],
        "memory": {
            name: [of_process["memory"][name] for of_process in found] for name in (load.OURS, load.THEIRS)
        },
    }


def _run(
    model: Model, checkpoint: Path, num_processes: int, rounds: int, timeout: float | None
) -> list[dict[str, Any]]:
    """Runs the processes; what each of them saw."""
    job = {"model": dataclasses.asdict(model), "checkpoint": str(checkpoint), "rounds": rounds}
    with tempfile.TemporaryDirectory(prefix="jax-moriep-bench-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({**job, "processes": num_processes}))
        Barrier.create(folder / load_worker.BARRIER, num_processes)
        failure = processes.run(
            load_worker.__name__,
            folder,
            num_processes,
            1,
            env=_GLIBC_DEFAULT,
            timeout=timeout,
            platform_name="cpu",
        )
        if failure is not None:
            raise MoriepError(failure)
        return [json.loads((folder / f"{i}.json").read_text()) for i in range(num_processes)]
