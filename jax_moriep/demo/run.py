"""The demo's first process: it starts the others (train.py), shows how they get on, and ends with the numbers
and a picture (report.py). It never computes with jax itself.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import time
from pathlib import Path

from jax_moriep.demo import curves
from jax_moriep.demo.report import Progress, Results
from jax_moriep.demo.settings import EVENT_MARK, Settings
from jax_moriep.errors import ConfigError, MoriepError, rule
from jax_moriep.processes.launch import launch
from jax_moriep.results.files import check_file

_MARKER = "made-by-jax-moriep-demo"
"""A file in the checkpoint folder that says that the demo may clear it."""
_KEPT_LINES = 60


def run(settings: Settings, command: str, picture: Path, losses: Path | None) -> int:
    """Trains, shows and draws.

    Args:
      settings: what the user chose.
      command: the command line, for who reads the losses.
      picture: the picture's file.
      losses: the file for the losses, if they are wanted.

    Returns:
      0, or the exit code of the process that failed first.

    Raises:
      ConfigError: a file or folder cannot be used.
      MoriepError: what the processes import is not installed.
    """
    for option, path in (("--out", picture), ("--json", losses)):
        if path is not None:
            check_file(option, path)
    _check_installed()
    _prepare_checkpoints(Path(settings.checkpoint_dir), settings.resume)
    began = time.perf_counter()
    progress = Progress(settings)
    talk: list[str] = []

    def on_line(process: int, line: str) -> None:
        if line.startswith(EVENT_MARK):
            progress.on_event(json.loads(line[len(EVENT_MARK) :]))
        else:
            talk.append(f"[{process}] {line}")
            del talk[:-_KEPT_LINES]

    try:
        ended = launch(
            "jax_moriep.demo.train",
            settings.ranks,
            args=[settings.to_json()],
            platform=settings.platform,
            module=True,
            on_line=on_line,
        )
    except KeyboardInterrupt:
        progress.interrupted()
        return 128 + signal.SIGINT
    if ended.returncode:
        progress.failed("".join(talk))
        return ended.returncode
    seconds = time.perf_counter() - began
    # Before the picture, whose format matplotlib may not know.
    if losses is not None:
        curves.write(progress.results, seconds, command, losses)
    progress.finish(seconds, _draw(progress.results, picture))
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


def _draw(results: Results, path: Path) -> Path | None:
    if not _is_installed("matplotlib"):
        return None
    from jax_moriep.demo import picture

    picture.draw(results, path)
    return path
