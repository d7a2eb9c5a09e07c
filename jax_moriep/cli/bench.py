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


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep bench``; returns 1 if a value was wrong, else 0."""
    case = cases.of_arguments(args.kind, args)
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError(
            rule("--json", str(args.json), "lie in an existing folder", "make the folder first")
        )
    command = shlex.join(["jax-moriep", *sys.argv[1:]])
    result = runner.measure(case, command, timeout=args.timeout, platform_name=args.platform)
    print(report.as_text(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if runner.failed_checks(result) else 0
