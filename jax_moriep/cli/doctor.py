"""``jax-moriep doctor``: what can run on this machine, and for everything else why not and the cure."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jax_moriep.doctor import facts, text


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        description="Says what can run on this machine, and for everything else why not and the cure.",
        epilog='The exit code is 0 if transport="auto" and experts="auto" find something that can run.',
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep doctor``; returns 0 if the default path can run, else 1."""
    found = facts.examine()
    print(json.dumps(found, indent=2) if args.json else text.as_text(found))
    return 0 if found["ok"] else 1
