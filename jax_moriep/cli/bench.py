"""``jax-moriep bench``: measures exchange, experts, layer or all of a host, and checks the values."""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from jax_moriep.bench.kinds import arguments, plan, plan_arguments
from jax_moriep.bench.problem.checks import failed_checks
from jax_moriep.bench.run import load, runner
from jax_moriep.bench.show import load_report, plan_report, report
from jax_moriep.cli import bench_host
from jax_moriep.config import SCHEMES
from jax_moriep.results.files import check_file

KINDS = {
    "exchange": "dispatch and combine over several transports, beside a floor of the same bytes",
    "experts": "the experts' MLP on each rank's rows, beside a dense matmul chain of the same FLOPs",
    "layer": "the whole layer, over pairs of a transport and experts",
}


def add_parser(subparsers: Any) -> None:
    """Adds the parser of ``jax-moriep bench``."""
    parser = subparsers.add_parser(
        "bench",
        description="Measures several implementations by turns in one run and checks their values in it.",
        epilog="The exit code is 1 if any value was wrong.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, summary in KINDS.items():
        of_kind = kinds.add_parser(kind, help=summary, description=f"Measures {summary}.")
        arguments.add_arguments(of_kind, kind)
        of_kind.add_argument("--platform", help="value for JAX_PLATFORMS, such as cpu")
        of_kind.add_argument(
            "--timeout", type=float, metavar="S", help="end a set of processes after S seconds"
        )
        of_kind.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")

    of_host = kinds.add_parser(
        "host",
        help="exchange, layer and training step at 1, 2, ... and all devices of this host, in one table",
        description="Measures the exchange, the layer and a training step at 1, 2, ... and all devices of "
        "this host, and writes one file.",
        epilog="The exit code is 1 if any value was wrong or anything but a baseline failed.",
    )
    bench_host.add_arguments(of_host)

    of_load = kinds.add_parser(
        "load",
        help="jm.weights.load beside safetensors reading the same bytes, and its memory",
        description="Makes a checkpoint, loads it by several processes with jm.weights.load, by turns with "
        "safetensors reading each process's bytes, compares every bit, and deletes it.",
        epilog="The exit code is 1 if any bit was wrong.",
    )
    load.add_arguments(of_load)

    of_plan = kinds.add_parser(
        "plan",
        help="bytes, memory and the least times of a model on many ranks, on paper",
        description="Computes what each transport would move over which link for a model on many ranks, what "
        "it would hold, and how long it takes at least; nothing is run.",
    )
    plan_arguments.add_arguments(of_plan)

    of_kernels = kinds.add_parser(
        "kernels",
        help="the experts' GPU kernels, beside dense matmuls and other libraries by turns",
        description="Measures the experts' kernels on one GPU, by turns with the dense matmuls of their "
        "shapes, and the whole MLP by turns with other libraries' grouped products.",
        epilog="The exit code is 1 if a value of the package was wrong or anything failed.",
    )
    of_kernels.add_argument("--shares", type=_names, help="which models' shares (default: all)")
    of_kernels.add_argument("--sizes", type=_names, help="uniform, zipf or both (default: both)")
    of_kernels.add_argument("--rounds", type=int, default=7, help="turns of each pair (default: 7)")
    of_kernels.add_argument(
        "--baselines",
        type=_names,
        help="torch, ragged_dot, jax_hopper, tokamax, several, or none (default: all that can run)",
    )
    of_kernels.add_argument(
        "--minutes", type=float, default=5.0, help="after which no baseline begins (default: 5)"
    )
    of_kernels.add_argument(
        "--quant", choices=SCHEMES, help="measure experts under this scheme, beside bf16 and torch's float8"
    )
    of_kernels.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def _names(text: str) -> list[str]:
    return text.split(",")


def _run_kernels(args: argparse.Namespace) -> int:
    # Imported here, because it needs Pallas, which takes its time to import.
    from jax_moriep.bench.against.baselines import BASELINES
    from jax_moriep.bench.kinds import kernels, quantised
    from jax_moriep.bench.problem import shares

    command = shlex.join(["jax-moriep", *sys.argv[1:]])
    say = functools.partial(print, flush=True)

    def save(result: dict[str, Any]) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps({"command": command, **result}, indent=1) + "\n")

    names = args.shares or list(shares.SHARES)
    if args.quant is not None:
        found = quantised.run(quantised.Asked(args.quant, names, args.rounds), say, save)
        for what in ("wrong", "failed"):
            print(f"{what}:", found[what] or "nothing")
        return 1 if found["wrong"] or found["failed"] else 0
    baselines = args.baselines or list(BASELINES)
    asked = kernels.Asked(
        names,
        args.sizes or list(shares.SIZES),
        args.rounds,
        [] if baselines == ["none"] else baselines,
        args.minutes,
    )
    found = kernels.run(asked, say, save)
    for name, reason in found["unavailable"].items():
        print(f"{name} did not run: {reason}")
    for what, title in (("inaccurate", "inaccurate baselines"), ("not_run", "not run")):
        for line in found[what]:
            print(f"{title}: {', '.join(map(str, line))}")
    for what in ("wrong", "failed"):
        print(f"{what}:", found[what] or "nothing")
    return 1 if found["wrong"] or found["failed"] else 0


def _run_load(args: argparse.Namespace, command: str) -> int:
    model = load.of_arguments(args)
    result = load.measure(model, args.processes, args.rounds, command, args.folder, args.timeout)
    print(load_report.as_text(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed_checks(result) else 0


def _run_plan(args: argparse.Namespace, command: str) -> int:
    def save(planned: dict[str, Any]) -> None:
        if args.json is not None:
            args.json.write_text(json.dumps({"command": command, **planned}, indent=1) + "\n")

    print(plan_report.as_text(plan.run(plan_arguments.of_arguments(args), print, save)))
    return 0


def run(args: argparse.Namespace) -> int:
    """Runs ``jax-moriep bench``; returns 1 if a value was wrong, else 0."""
    command = shlex.join(["jax-moriep", *sys.argv[1:]])
    if args.kind == "host":
        return bench_host.run(args, command)
    if args.json is not None:
        check_file("--json", args.json)
    if args.kind == "plan":
        return _run_plan(args, command)
    if args.kind == "kernels":
        return _run_kernels(args)
    if args.kind == "load":
        return _run_load(args, command)
    case = arguments.of_arguments(args.kind, args)
    result = runner.measure(case, command, timeout=args.timeout, platform_name=args.platform)
    print(report.as_text(result))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed_checks(result) else 0
