"""The command ``jax-moriep``: a table of subcommands, each in a module of its own.

A subcommand's module has ``add_parser(subparsers)``, which adds its parser, and ``run(args) -> int``, which
returns the exit code. Only the chosen one is imported: ``jax-moriep doctor`` does not load the demo's model.

Modules here have parsers and calls: what a subcommand does lies in the package's other rooms.

| file | |
|---|---|
| `demo.py`, `launch.py`, `doctor.py`, `plot.py`, `tune.py` | the subcommand of that name |
| `bench.py` | the table of its kinds |
| `bench_cases.py` | its kinds exchange, experts and layer |
| `bench_host.py`, `bench_floor.py`, `bench_kernels.py` | the kind of that name |
| `bench_load.py`, `bench_plan.py` | likewise |
| `output.py` | what all that measure share |
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from jax_moriep.errors import MoriepError

PROGRAM = "jax-moriep"
COMMANDS = {
    "demo": "train a small mixture-of-experts language model on several processes",
    "launch": "run a script on several processes joined by jax.distributed",
    "doctor": "say what can run on this machine, and why the rest cannot",
    "bench": "measure the exchange, the experts or the whole layer",
    "plot": "draw what bench measured",
    "tune": "measure how the experts' GPU kernels are best cut, and save it",
}
"""Name of each subcommand, also that of its module here, and its line in ``jax-moriep --help``."""

EXAMPLES = {
    "": "jax-moriep doctor",
    "demo": "jax-moriep demo --ranks 2 --steps 60",
    "launch": "jax-moriep launch -n 4 train.py",
    "doctor": "jax-moriep doctor --json",
    "bench": "jax-moriep bench layer --ranks 2",
    "bench exchange": "jax-moriep bench exchange --ranks 4",
    "bench experts": "jax-moriep bench experts --ranks 1",
    "bench layer": "jax-moriep bench layer --ranks 2",
    "bench host": "jax-moriep bench host --out results",
    "bench floor": "jax-moriep bench floor --minutes 8",
    "bench kernels": "jax-moriep bench kernels --sizes uniform",
    "bench load": "jax-moriep bench load --gb 1",
    "bench plan": "jax-moriep bench plan --model deepseek-v3 --wire fp8",
    "plot": "jax-moriep plot results.json --out results.png",
    "tune": "jax-moriep tune --out table.json",
}
"""A command line that works, for subcommands and their kinds; wrong arguments are answered with it."""


class _Parser(argparse.ArgumentParser):
    """Answers wrong arguments with the usage and an example of the subcommand that they were given to."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            # Here and not in the program's own parser, which would show its own usage.
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        name = self.prog.removeprefix(PROGRAM).strip()
        while name not in EXAMPLES:
            name = name.rpartition(" ")[0]
        self.exit(2, f"{self.prog}: error: {message}\nfor example: {EXAMPLES[name]}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
      argv: the arguments after the program's name; None takes the process's own.

    Returns:
      The exit code: 0 when it worked, 1 when jax_moriep reported an error.

    Raises:
      SystemExit: the arguments are wrong (code 2), or help was asked for (code 0).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog=PROGRAM, description="Expert-parallel MoE for JAX.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == chosen:
            _module(name).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(argv)
    try:
        return _module(args.command).run(args)
    except MoriepError as error:
        print(f"jax-moriep {args.command}: {error}", file=sys.stderr)
        return 1


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
