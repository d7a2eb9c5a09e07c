"""``jax-moriep demo``: several processes train a small mixture-of-experts language model on this machine.

This is the demo's first process: it starts the others (demo_train.py), shows how they get on, and ends with
the numbers and a picture (demo_report.py). It never computes with jax itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from jax_moriep.cli import demo_curves, demo_report
from jax_moriep.cli.demo_settings import EVENT_MARK, Settings
from jax_moriep.config import SCHEMES, TRANSPORTS
from jax_moriep.errors import ConfigError, MoriepError, rule
from jax_moriep.processes.launch import launch

_MARKER = "made-by-jax-moriep-demo"
"""A file in the checkpoint folder that says that the demo may clear it."""
_KEPT_LINES = 60


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
    parser.add_argument("--out", default="demo.png", help="the picture (default: demo.png)")
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
    for name in ("ranks", "steps", "experts", "windows", "sample_bytes"):
        if getattr(args, name) < 1:
            raise ConfigError(rule(name, getattr(args, name), "be at least 1", "pass a positive number"))
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise ConfigError(
            rule("--json", str(args.json), "lie in an existing folder", "make the folder first")
        )
    _check_installed()
    folder = Path(args.checkpoint_dir)
    _prepare_checkpoints(folder, args.resume)
    settings = Settings(
        ranks=args.ranks,
        steps=args.steps,
        experts=args.experts,
        windows=args.windows,
        sample_bytes=args.sample_bytes,
        transport=args.transport,
        seed=args.seed,
        checkpoint_dir=str(folder),
        checkpoint_every=args.checkpoint_every or max(1, -(-args.steps // 4)),
        resume=args.resume,
        quant=args.quant,
        dtype=args.dtype,
        platform=args.platform,
    )
    began = time.perf_counter()
    progress = demo_report.Progress(settings)
    talk: list[str] = []

    def on_line(process: int, line: str) -> None:
        if line.startswith(EVENT_MARK):
            progress.on_event(json.loads(line[len(EVENT_MARK) :]))
        else:
            talk.append(f"[{process}] {line}")
            del talk[:-_KEPT_LINES]

    try:
        result = launch(
            "jax_moriep.cli.demo_train",
            args.ranks,
            args=[settings.to_json()],
            platform=settings.platform,
            module=True,
            on_line=on_line,
        )
    except KeyboardInterrupt:
        progress.interrupted()
        return 128 + signal.SIGINT
    if result.returncode:
        progress.failed("".join(talk))
        return result.returncode
    seconds = time.perf_counter() - began
    progress.finish(seconds, _draw(progress.results, Path(args.out)))
    if args.json is not None:
        demo_curves.write(progress.results, seconds, shlex.join(["jax-moriep", *sys.argv[1:]]), args.json)
    return 0


def _check_installed() -> None:
    """Raises MoriepError unless what the processes import is there; each of them would say so."""
    missing = [name for name in ("flax", "optax", "orbax.checkpoint") if not _is_installed(name)]
    if missing:
        raise MoriepError(f"the demo needs {', '.join(missing)}; pip install 'jax-moriep[flax,plot]'")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _prepare_checkpoints(folder: Path, resume: bool) -> None:
    """Makes the folder; empties it for a new run if an earlier demo made it.

    Raises:
      ConfigError: there is nothing to go on from, or the folder holds something else.
    """
    steps = [path for path in folder.glob("*") if path.name.isdigit()]
    if resume:
        if not steps:
            raise ConfigError(
                rule(
                    "checkpoint_dir",
                    str(folder),
                    "hold a checkpoint to go on from",
                    "run without --resume first",
                )
            )
        return
    if folder.exists() and any(folder.iterdir()):
        if not (folder / _MARKER).exists():
            raise ConfigError(
                rule("checkpoint_dir", str(folder), "be empty or of an earlier demo", "name another folder")
            )
        for path in steps:
            shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).touch()


def _draw(results: demo_report.Results, path: Path) -> Path | None:
    if not _is_installed("matplotlib"):
        return None
    from jax_moriep.cli import demo_picture

    demo_picture.draw(results, path)
    return path
