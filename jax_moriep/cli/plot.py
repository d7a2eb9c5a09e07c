"""``jax-moriep plot``: draws what ``jax-moriep bench --json`` and ``jax-moriep demo --json`` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jax_moriep.bench.show import floor_picture, kernels_picture, picture
from jax_moriep.demo import curves
from jax_moriep.errors import ConfigError, rule


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep plot``."""
    parser = subparsers.add_parser(
        "plot",
        description="Draws the comparisons that `jax-moriep bench --json FILE` wrote, one row for each file, "
        "or the losses that `jax-moriep demo --json FILE` wrote, over each other.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what bench or demo wrote")
    parser.add_argument(
        "--out", type=Path, default=Path("bench.png"), help="the picture (default: bench.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep plot``; returns 0."""
    for module, command in (
        (kernels_picture, "bench kernels"),
        (floor_picture, "bench floor"),
        (curves, "demo"),
    ):
        results = [result for result in map(module.read, args.files) if result is not None]
        if results and len(results) < len(args.files):
            names = [str(path) for path in args.files]
            cure = f"draw those of `{command}` alone"
            raise ConfigError(rule("FILE", names, f"be all of `{command}` or all of others", cure))
        if results:
            module.draw(results, args.out)
            break
    else:
        picture.draw([picture.read(path) for path in args.files], args.out)
    print(f"wrote {args.out}")
    return 0
