"""``jax-moriep bench``: measures the exchange, the experts or the layer, and checks the values."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from jax_moriep.bench import cases, report, runner
from jax_moriep.errors import ConfigError, rule

KINDS = {
    "exchange": "dispatch and combine over several transports, beside a memcpy of the same bytes",
    "experts": "the experts' MLP on each rank's rows, beside a dense matmul chain of the same FLOPs",
    "layer": "the whole layer, over pairs of a transport and experts",
}


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep bench``."""
    parser = subparsers.add_parser(
        "bench",
        description="Measures several implementations by turns in one run and checks their values in it.",
        epilog="The exit code is 1 if any value was wrong.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, summary in KINDS.items():
        of_kind = kinds.add_parser(kind, help=summary, description=f"Measures {summary}.")
        cases.add_arguments(of_kind, kind)
        of_kind.add_argument("--platform", help="value for JAX_PLATFORMS, such as cpu")
        of_kind.add_argument(
            "--timeout", type=float, metavar="S", help="end a set of processes after S seconds"
        )
        of_kind.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")

    of_kernels = kinds.add_parser(
        "kernels",
        help="the experts' GPU kernels, beside a dense matmul by turns",
        description="Measures the experts' kernels on one GPU, beside a dense matmul by turns.",
    )
    of_kernels.add_argument("--shares", type=_names, help="which models' shares (default: all)")
    of_kernels.add_argument("--sizes", type=_names, help="uniform, zipf or both (default: both)")
    of_kernels.add_argument("--rounds", type=int, default=7, help="turns of each pair (default: 7)")
    of_kernels.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def _names(text: str) -> list[str]:
    return text.split(",")


def _run_kernels(args: argparse.Namespace) -> int:
    # Imported here, because it needs Pallas, which takes its time to import.
    from jax_moriep.bench import kernels

    shares, sizes = args.shares or list(kernels.SHARES), args.sizes or list(kernels.SIZES)
    found = kernels.run(shares, sizes, args.rounds, lambda line: print(line, flush=True))
    print("wrong:", found["wrong"] or "nothing")
    if args.json is not None:
        command = shlex.join(["jax-moriep", *sys.argv[1:]])
        args.json.write_text(json.dumps({"command": command, **found}, indent=1) + "\n")
    return 1 if found["wrong"] else 0


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep bench``; returns 1 if a value was wrong, else 0."""
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError(
            rule("--json", str(args.json), "lie in an existing folder", "make the folder first")
        )
    if args.kind == "kernels":
        return _run_kernels(args)
    case = cases.of_arguments(args.kind, args)
    command = shlex.join(["jax-moriep", *sys.argv[1:]])
    result = runner.measure(case, command, timeout=args.timeout, platform_name=args.platform)
    print(report.as_text(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if runner.failed_checks(result) else 0
