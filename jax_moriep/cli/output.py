"""What subcommands that measure share: the command line, which results keep, and the file of a result."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any


def command_line() -> str:
    """The command line that a result came of."""
    return shlex.join(["jax-moriep", *sys.argv[1:]])


def add_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--json``."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Writes a result as JSON; does nothing where no file is wanted."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
