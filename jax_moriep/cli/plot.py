"""``jax-moriep plot``: draws what ``jax-moriep bench --json`` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jax_moriep.bench import kernels_picture, picture
from jax_moriep.errors import ConfigError, rule


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep plot``."""
    parser = subparsers.add_parser(
        "plot",
        description="Draws the comparisons that `jax-moriep bench --json FILE` wrote, one row for each file.",
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="what bench wrote")
    parser.add_argument(
        "--out", type=Path, default=Path("bench.png"), help="the picture (default: bench.png)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep plot``; returns 0."""
    of_kernels = [result for result in map(kernels_picture.read, args.files) if result is not None]
    if of_kernels and len(of_kernels) < len(args.files):
        names = [str(path) for path in args.files]
        cure = "draw those of `bench kernels` alone"
        raise ConfigError(rule("FILE", names, "be all of `bench kernels` or all of others", cure))
    if of_kernels:
        kernels_picture.draw(of_kernels, args.out)
    else:
        picture.draw([picture.read(path) for path in args.files], args.out)
    print(f"wrote {args.out}")
    return 0
