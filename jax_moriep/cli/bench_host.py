"""``jax-moriep bench host``: the whole table of a host in one command."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jax_moriep.bench.run import host, host_plan
from jax_moriep.bench.show import host_picture, host_report
from jax_moriep.errors import ConfigError, rule

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(host_plan.Options)}


def add_parser(kinds: Any) -> None:
    """Adds the parser."""
    parser = kinds.add_parser(
        "host",
        help="exchange, layer and training step at 1, 2, ... and all devices of this host, in one table",
        description="Measures the exchange, the layer and a training step at 1, 2, ... and all devices of "
        "this host, and writes one file.",
        epilog="The exit code is 1 if any value was wrong or anything but a baseline failed.",
    )
    _add_sizes(parser)
    _add_lists(parser)
    parser.add_argument(
        "--one-process", action="store_true", help="one process holds all devices, instead of one each"
    )
    parser.add_argument(
        "--minutes", type=float, default=9.0, help="after which nothing new begins (default: 9)"
    )
    seconds = _DEFAULTS["case_seconds"]
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=seconds,
        help=f"after which a case counts as hanging (default: {seconds:g})",
    )
    parser.add_argument("--platform", help="value for JAX_PLATFORMS, such as cuda or cpu")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="for the files (default: here)",
    )


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    texts = {
        "hidden": "H, width of a token",
        "intermediate": "I, width inside an expert",
        "experts": "E of the exchange",
        "experts_per_rank": "experts of the layer on each rank",
        "top_k": "K, experts per token",
        "train_tokens": "tokens per rank of a training step",
        "link_mib": "MiB that the measure of the links sends",
        "iters": "timed iterations of every call",
    }
    for name, text in texts.items():
        option = "--" + name.replace("_", "-")
        default = _DEFAULTS[name]
        parser.add_argument(option, type=int, default=default, help=f"{text} (default: {default})")


def _add_lists(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranks", type=_numbers, default=(), metavar="R,R,...", help="default: 1, 2, 4, ... and all devices"
    )
    parser.add_argument(
        "--tokens",
        type=_numbers,
        default=_DEFAULTS["tokens"],
        metavar="T,T,...",
        help="tokens per rank of the exchange; the layer has the most (default: 128,1024,4096)",
    )
    parser.add_argument(
        "--routings",
        type=_names,
        default=host_plan.ROUTINGS,
        metavar="A,B,...",
        help=f"of the exchange (default: {','.join(host_plan.ROUTINGS)})",
    )
    parser.add_argument(
        "--kinds",
        type=_names,
        default=_DEFAULTS["kinds"],
        metavar="A,B,...",
        help="exchange, layer, train or several (default: all)",
    )
    parser.add_argument(
        "--transports",
        type=_names,
        default=(),
        metavar="A,B,...",
        help=f"what to measure (default: those of {','.join(host_plan.TRANSPORTS)} that can run here)",
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(args: argparse.Namespace, command: str) -> int:
    """Measures, writes and prints; returns 1 if a value was wrong or something failed, else 0."""
    if not args.out.is_dir():
        raise ConfigError(rule("--out", str(args.out), "be an existing folder", "make the folder first"))
    options = host_plan.Options(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(host_plan.Options)}
    )
    result, path = host.run(options, command, args.out, lambda line: print(line, flush=True))
    picture = path.with_suffix(".png")
    drawn = host_picture.draw(result, picture)
    print(host_report.as_text(result))
    print(f"wrote {path}" + (f" and {picture}" if drawn else "; no picture, for matplotlib is not installed"))
    return 1 if host.failures(result) else 0
