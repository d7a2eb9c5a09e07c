"""``jax-moriep bench exchange``, ``experts`` and ``layer``: the kinds that have cases, and their options."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from jax_moriep.bench.kinds.table import KINDS, new_case
from jax_moriep.bench.problem import patterns
from jax_moriep.bench.problem.cases import DTYPES, GPU_PLATFORMS, Case, option
from jax_moriep.bench.problem.checks import failed_checks
from jax_moriep.bench.run import runner
from jax_moriep.bench.show import report
from jax_moriep.cli import output

_SUMMARIES = {
    "exchange": "dispatch and combine over several transports, beside a floor of the same bytes",
    "experts": "the experts' MLP on each rank's rows, beside a dense matmul chain of the same FLOPs",
    "layer": "the whole layer, over pairs of a transport and experts",
}


def add_parser(kinds: Any) -> None:
    """Adds a parser for each of them."""
    for kind, summary in _SUMMARIES.items():
        parser = kinds.add_parser(kind, help=summary, description=f"Measures {summary}.")
        add_arguments(parser, kind)
        parser.add_argument("--platform", help="value for JAX_PLATFORMS, such as cpu")
        parser.add_argument(
            "--timeout", type=float, metavar="S", help="end a set of processes after S seconds"
        )
        output.add_option(parser)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options of one kind of run."""
    kind = KINDS[name]
    defaults = {field.name: field.default for field in dataclasses.fields(Case)}

    def number(field: str, text: str, of: Callable[[str], Any] = int) -> None:
        help = f"{text} (default: {defaults[field]})"
        parser.add_argument(option(field), type=of, default=defaults[field], help=help)

    def unless(field: str, text: str, default: Any) -> None:
        parser.add_argument(option(field), type=int, help=f"{text} (default: {default})")

    number("ranks", "R, devices that share the experts")
    unless("processes", "processes that hold the ranks", "one for each rank")
    unless("tokens", "T, tokens per rank", kind.tokens_unless_told)
    number("hidden", "H, width of a token")
    number("intermediate", "I, width inside an expert")
    number("experts", "E, experts in all")
    number("top_k", "K, experts per token")
    parser.add_argument("--dtype", choices=DTYPES, default=defaults["dtype"], help="default: f32")
    parser.add_argument(
        "--routing", choices=patterns.PATTERNS, default=defaults["routing"], help="default: uniform"
    )
    number("capacity_factor", "rows reserved on a rank, in units of T*K; None is the exact bound", float)
    iters, warmup = kind.iterations
    unless("iters", "timed iterations of every call", iters)
    unless("warmup", "iterations before them", warmup)
    number("seed", "of the data")
    repeats = f"1, with --platform cuda or rocm {kind.repeats_on_gpus}"
    unless("repeats", "how often one program does the work, so that its start is paid once for all", repeats)
    parser.add_argument(
        *kind.compare_options,
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="A,B,...",
        help=f"what to compare, ratios being to the first one (default: {','.join(kind.compared)}; "
        f"there are: {', '.join(kind.comparable)})",
    )
    kind.add_options(parser)
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory too, each implementation in a run of its own",
    )


def case_of(name: str, args: argparse.Namespace) -> Case:
    """The case that parsed options describe.

    Raises:
      ConfigError: an option breaks its rule.
    """
    on_gpus = getattr(args, "platform", None) in GPU_PLATFORMS
    # A phase of a kind is a kind of its own, with the same options.
    name = getattr(args, "phase", None) or name
    kind = KINDS[name]
    of_options = {field.name for field in dataclasses.fields(Case)} - {"kind", "operations", "floors"}
    given = {key: value for key, value in vars(args).items() if key in of_options and value is not None}
    ranks = max(1, given["ranks"])
    iters, warmup = kind.iterations
    repeats = kind.repeats_on_gpus if on_gpus else 1
    fields = {"processes": ranks, "iters": iters, "warmup": warmup, "repeats": repeats, **given}
    floors, others = kind.beside(ranks, on_gpus)
    if not fields["compare"]:
        fields["compare"] = ((on_gpus and kind.compared_on_gpus) or kind.compared) + others
    kind.of_options(args, fields)
    return new_case(name, floors=floors, **fields)


def run(args: argparse.Namespace, command: str) -> int:
    """Measures, prints and writes; returns 1 if a value was wrong, else 0."""
    case = case_of(args.kind, args)
    result = runner.measure(case, command, timeout=args.timeout, platform_name=args.platform)
    print(report.as_text(result))
    output.write(args.json, result)
    return 1 if failed_checks(result) else 0
