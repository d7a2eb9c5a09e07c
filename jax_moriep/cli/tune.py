"""``jax-moriep tune``: measures how the experts' Triton kernels are best cut on this GPU, and saves it."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from jax_moriep.cli import output
from jax_moriep.results.files import check_file


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep tune``."""
    parser = subparsers.add_parser(
        "tune",
        description="Measures how the experts' Triton kernels are best cut on this GPU and saves a table.",
        epilog="Set JAX_MORIEP_TUNING to the file's path to use it; nothing is measured otherwise.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, as JSON")
    parser.add_argument("--experts", type=int, default=32, help="L, experts on this GPU (default: 32)")
    parser.add_argument("--hidden", type=int, default=7168, help="H (default: 7168)")
    parser.add_argument("--intermediate", type=int, default=2048, help="I (default: 2048)")


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep tune``."""
    check_file("--out", args.out)
    # Imported here, because it needs Pallas, which takes its time to import.
    from jax_moriep.bench.kinds import tune

    asked = tune.Asked(args.experts, args.hidden, args.intermediate)
    tune.run(asked, functools.partial(print, flush=True), functools.partial(output.write, args.out))
    print(f"wrote {args.out}; set JAX_MORIEP_TUNING={args.out.absolute()} to use it")
    return 0
