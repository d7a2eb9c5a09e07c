"""``jax-moriep demo``: several processes train a small mixture-of-experts language model on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jax_moriep.cli import output
from jax_moriep.config import SCHEMES, TRANSPORTS
from jax_moriep.demo import run as first_process
from jax_moriep.demo.settings import Settings


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep demo``."""
    parser = subparsers.add_parser(
        "demo",
        description="Trains a small mixture-of-experts language model on the source of Python's standard "
        "library, with several processes of this machine; takes a few minutes.",
    )
    parser.add_argument("--ranks", type=int, default=4, help="number of processes (default: 4)")
    parser.add_argument("--steps", type=int, default=360, help="steps of training (default: 360)")
    parser.add_argument("--experts", type=int, default=8, help="experts in each layer (default: 8)")
    parser.add_argument(
        "--windows",
        type=int,
        default=Settings.windows,
        help=f"windows of {Settings.context} bytes in a step, over all ranks (default: {Settings.windows})",
    )
    parser.add_argument("--transport", choices=("auto", *TRANSPORTS), default="auto", help="default: auto")
    parser.add_argument(
        "--quant",
        choices=SCHEMES,
        help="experts that compute quantised, from floating weights that are trained",
    )
    parser.add_argument(
        "--dtype",
        choices=("f32", "bf16"),
        default="f32",
        help="what the model computes in; its weights are trained in float32 (default: f32)",
    )
    parser.add_argument(
        "--platform",
        default="cpu",
        help="value for JAX_PLATFORMS; on GPUs each process takes one (default: cpu)",
    )
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=Settings.sample_bytes,
        help=f"length of the text that the trained model writes (default: {Settings.sample_bytes})",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: demo.png)")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write the losses there; `jax-moriep plot` compares such files",
    )
    parser.add_argument("--checkpoint-dir", default="checkpoints", help="default: checkpoints")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="default: a quarter of the steps; always after the last",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep demo``; returns 0, or the exit code of the process that failed first."""
    settings = Settings(
        ranks=args.ranks,
        steps=args.steps,
        experts=args.experts,
        windows=args.windows,
        sample_bytes=args.sample_bytes,
        transport=args.transport,
        seed=args.seed,
        checkpoint_dir=args.checkpoint_dir,
        checkpoint_every=args.checkpoint_every or max(1, -(-args.steps // 4)),
        resume=args.resume,
        quant=args.quant,
        dtype=args.dtype,
        platform=args.platform,
    )
    return first_process.run(settings, output.command_line(), args.out, args.json)
