"""``jax-moriep bench load``: loading a checkpoint beside ``safetensors`` reading the same bytes."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

from jax_moriep.bench.problem.checkpoint import Model
from jax_moriep.bench.problem.checks import failed_checks
from jax_moriep.bench.run import load
from jax_moriep.bench.show import load_report
from jax_moriep.cli import output
from jax_moriep.errors import ConfigError, rule

_FILE_BYTES = 1e9


def add_parser(kinds: Any) -> None:
    """Adds the parser."""
    parser = kinds.add_parser(
        "load",
        help="jm.weights.load beside safetensors reading the same bytes, and its memory",
        description="Makes a checkpoint, loads it by several processes with jm.weights.load, by turns with "
        "safetensors reading each process's bytes, compares every bit, and deletes it.",
        epilog="The exit code is 1 if any bit was wrong.",
    )
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
    output.add_option(parser)


def model_of(args: argparse.Namespace) -> Model:
    """The model whose checkpoint is about as large as asked for.

    Raises:
      ConfigError: a number is not positive.
    """
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


def run(args: argparse.Namespace, command: str) -> int:
    """Measures, prints and writes; returns 1 if a bit was wrong, else 0."""
    result = load.measure(model_of(args), args.processes, args.rounds, command, args.folder, args.timeout)
    print(load_report.as_text(result))
    output.write(args.json, result)
    return 1 if failed_checks(result) else 0
