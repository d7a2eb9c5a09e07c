"""``jax-moriep launch``: runs a script on processes of one or more machines, joined by jax.distributed."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

from jax_moriep.errors import ConfigError, rule
from jax_moriep.processes.launch import launch
from jax_moriep.processes.nodes import Nodes


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep launch``."""
    parser = subparsers.add_parser(
        "launch",
        description="Runs a script on several processes of one or more machines, joined by jax.distributed.",
        usage="jax-moriep launch -n N [options] (script.py | -m module) [argument ...]",
        epilog="On several machines it is called on each, with the same arguments but for --node.",
    )
    parser.add_argument("-n", "--nprocs", type=int, required=True, help="number of processes on this machine")
    parser.add_argument("--devices-per-process", type=int, default=1, metavar="D", help="default: 1")
    parser.add_argument("--platform", help="value for JAX_PLATFORMS, such as cpu")
    parser.add_argument("--timeout", type=float, metavar="S", help="end all processes after S seconds")
    parser.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds that the others have to report, after one process failed (default: 10)",
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="number of machines (default: 1)")
    parser.add_argument("--node", type=int, metavar="I", help="which of them this is, from 0 on")
    parser.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="an address of machine 0 that the others reach, and a free port of it",
    )
    parser.add_argument(
        "--lost-after",
        type=float,
        default=Nodes.lost_after,
        metavar="S",
        help="seconds without a word after which another machine counts as lost (default: %(default)g)",
    )
    parser.add_argument(
        "--join-timeout",
        type=float,
        default=Nodes.join_timeout,
        metavar="S",
        help="seconds to wait for the other machines at the beginning (default: %(default)g)",
    )
    parser.add_argument("-m", dest="module", action="store_true", help="the script is a module's name")
    parser.add_argument("script", help="the script that every process runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's arguments")


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep launch``; returns the exit code of the process that failed first, or 0."""
    signal.signal(signal.SIGTERM, _exit_by_signal)
    signal.signal(signal.SIGHUP, _exit_by_signal)
    # What the processes print is theirs: a terminal that cannot show it is no reason to end them.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return launch(
            args.script,
            args.nprocs,
            args.devices_per_process,
            args=args.arguments,
            timeout=args.timeout,
            platform=args.platform,
            module=args.module,
            grace=args.grace,
            nodes=_nodes(args),
        ).returncode
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _nodes(args: argparse.Namespace) -> Nodes | None:
    """What the arguments say of other machines."""
    given = {"node": args.node, "coordinator": args.coordinator}
    if args.nodes == 1 and not any(value is not None for value in given.values()):
        return None
    for name, value in given.items():
        if value is None:
            raise ConfigError(rule(name, value, f"be given with nodes={args.nodes}", f"pass --{name}"))
    return Nodes(args.nodes, args.node, args.coordinator, args.lost_after, args.join_timeout)


def _exit_by_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Turns a signal into an exception, so that the processes are ended on the way out."""
    del frame
    raise SystemExit(128 + number)
