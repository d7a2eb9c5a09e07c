"""``jax-moriep bench``: a table of its kinds, each in a module ``bench_...`` beside this one.

A kind's module has ``add_parser(kinds)`` and ``run(args, command) -> int``, which returns the exit code; that
of exchange, experts and layer adds a parser for each.
"""

from __future__ import annotations

import argparse
from typing import Any

from jax_moriep.cli import (
    bench_cases,
    bench_floor,
    bench_host,
    bench_kernels,
    bench_load,
    bench_plan,
    output,
)
from jax_moriep.results.files import check_file

_OTHERS = {
    "host": bench_host,
    "floor": bench_floor,
    "load": bench_load,
    "plan": bench_plan,
    "kernels": bench_kernels,
}


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep bench``."""
    parser = subparsers.add_parser(
        "bench",
        description="Measures several implementations by turns in one run and checks their values in it.",
        epilog="The exit code is 1 if any value was wrong.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for module in (bench_cases, *_OTHERS.values()):
        module.add_parser(kinds)


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep bench``; returns 1 if a value was wrong, else 0."""
    if args.kind != "host" and args.json is not None:
        check_file("--json", args.json)
    return _OTHERS.get(args.kind, bench_cases).run(args, output.command_line())
