"""``jax-moriep bench floor``: models' layers on one GPU, beside their floors and others, in one command."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from jax_moriep.bench.run import floor, floor_plan
from jax_moriep.bench.show import floor_report
from jax_moriep.cli import output


def add_parser(kinds: Any) -> None:
    """Adds the parser."""
    parser = kinds.add_parser(
        "floor",
        help="models' layers on one GPU, their router, decoding and kernels, beside floors and others",
        description="Measures layers of several models on one GPU, their router, decoding, a training step "
        "and the experts' kernels, each beside its floor and what others have made.",
        epilog="The exit code is 1 if any value was wrong or anything but a baseline failed.",
    )
    defaults = floor_plan.Options()
    parser.add_argument(
        "--parts",
        type=_names,
        default=defaults.parts,
        metavar="A,B,...",
        help=f"what to measure (default: all of {','.join(floor_plan.PARTS)})",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=defaults.minutes,
        help=f"after which nothing new begins (default: {defaults.minutes:g})",
    )
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=defaults.case_seconds,
        help=f"after which a case counts as hanging (default: {defaults.case_seconds:g})",
    )
    parser.add_argument("--platform", help="value for JAX_PLATFORMS, such as cuda")
    output.add_option(parser)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def run(args: argparse.Namespace, command: str) -> int:
    """Measures, writes and prints; returns 1 if a value was wrong or something failed, else 0."""
    options = floor_plan.Options(args.parts, args.minutes, args.case_seconds, args.platform)
    save = functools.partial(output.write, args.json)
    result = floor.run(options, command, functools.partial(print, flush=True), save)
    print(floor_report.as_text(result))
    return 1 if floor.failures(result) else 0
