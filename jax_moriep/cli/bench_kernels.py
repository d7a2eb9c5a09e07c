"""``jax-moriep bench kernels``: the experts' GPU kernels, as they are or under a scheme."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from jax_moriep.cli import output
from jax_moriep.config import SCHEMES
from jax_moriep.errors import ConfigError, rule


def add_parser(kinds: Any) -> None:
    """Adds the parser."""
    parser = kinds.add_parser(
        "kernels",
        help="the experts' GPU kernels, beside dense matmuls and other libraries by turns",
        description="Measures the experts' kernels on one GPU, by turns with the dense matmuls of their "
        "shapes, and the whole MLP by turns with other libraries' grouped products.",
        epilog="The exit code is 1 if a value of the package was wrong or anything failed.",
    )
    parser.add_argument("--shares", type=_names, help="which models' shares (default: all)")
    parser.add_argument("--sizes", type=_names, help="uniform, random, zipf or several (default: all)")
    parser.add_argument(
        "--dtype", choices=("bf16", "f32"), default="bf16", help="of rows and weights; others take bf16 alone"
    )
    parser.add_argument("--rounds", type=int, default=7, help="turns of each pair (default: 7)")
    parser.add_argument(
        "--baselines",
        type=_names,
        help="torch, ragged_dot, jax_hopper, tokamax, several, or none (default: all that can run)",
    )
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="after which no baseline begins (default: 5)"
    )
    parser.add_argument(
        "--quant", choices=SCHEMES, help="measure experts under this scheme, beside bf16 and torch's float8"
    )
    output.add_option(parser)


def _names(text: str) -> list[str]:
    return text.split(",")


def run(args: argparse.Namespace, command: str) -> int:
    """Measures, writes and prints; returns 1 if a value was wrong or something failed, else 0."""
    # Imported here, because they need Pallas, which takes its time to import.
    from jax_moriep.bench.against.baselines import BASELINES
    from jax_moriep.bench.kinds import kernels, quantised
    from jax_moriep.bench.problem import shares
    from jax_moriep.bench.show import kernels_report

    say = functools.partial(print, flush=True)

    def save(result: dict[str, Any]) -> None:
        output.write(args.json, {"command": command, **result})

    names = args.shares or list(shares.SHARES)
    if args.quant is not None:
        if args.dtype != "bf16":
            raise ConfigError(rule("dtype", args.dtype, "be bf16 with --quant", "leave out one of them"))
        result = quantised.run(quantised.Asked(args.quant, names, args.rounds), say, save)
    else:
        baselines = args.baselines or (list(BASELINES) if args.dtype == "bf16" else ["none"])
        asked = kernels.Asked(
            names,
            args.sizes or list(shares.SIZES),
            args.rounds,
            [] if baselines == ["none"] else baselines,
            args.minutes,
            args.dtype,
        )
        result = kernels.run(asked, say, save)
    print(kernels_report.as_text(result))
    return 1 if result["wrong"] or result["failed"] else 0
