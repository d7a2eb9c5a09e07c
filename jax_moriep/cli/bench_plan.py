"""``jax-moriep bench plan``: a model on many ranks, on paper."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from jax_moriep import hf_layers
from jax_moriep.bench.kinds import plan
from jax_moriep.bench.problem.models import MACHINES, MODELS, Model
from jax_moriep.bench.show import plan_report
from jax_moriep.cli import output
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, rule

_MODEL = "deepseek-v3"
_RANKS = "8,16,32,64,128,256,512,1024,2048,4096"


def add_parser(kinds: Any) -> None:
    """Adds the parser."""
    parser = kinds.add_parser(
        "plan",
        help="bytes, memory and the least times of a model on many ranks, on paper",
        description="Computes what each transport would move over which link for a model on many ranks, what "
        "it would hold, and how long it takes at least; nothing is run.",
    )
    parser.add_argument("--model", choices=MODELS, help=f"default: {_MODEL}, without --config")
    parser.add_argument("--config", type=Path, metavar="PATH", help="a config.json instead, or its folder")
    for name, of in (("experts", "E"), ("top-k", "K"), ("hidden", "H"), ("intermediate", "I")):
        parser.add_argument(f"--{name}", type=int, metavar=of, help="instead of the model's")
    parser.add_argument("--layers", type=int, metavar="N", help="MoE layers, instead of the model's")
    parser.add_argument(
        "--tokens", type=int, default=4096, metavar="T", help="of a rank (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--wire", choices=("fp8",), help="send tokens as float8")
    parser.add_argument(
        "--capacity-factor", type=float, metavar="X", help="default: none, room for whatever may come"
    )
    parser.add_argument("--ranks", default=_RANKS, metavar="R,...", help="default: %(default)s")
    parser.add_argument("--per-node", type=int, default=8, metavar="P", help="ranks of a node (default: 8)")
    parser.add_argument(
        "--routing",
        default="uniform",
        metavar="KIND",
        help="uniform, zipf, or a .npy file: how often each expert was chosen [E], or routes [N, K]",
    )
    parser.add_argument(
        "--machine", choices=MACHINES, default="mi300x", help="whose speeds (default: %(default)s)"
    )
    parser.add_argument("--inside", type=float, metavar="GB/S", help="of a rank, one way, inside a node")
    parser.add_argument("--between", type=float, metavar="GB/S", help="of a rank, one way, between nodes")
    parser.add_argument("--tflops", type=float, metavar="N", help="at which a rank computes its experts")
    output.add_option(parser)


def asked_of(args: argparse.Namespace) -> plan.Asked:
    """What the arguments ask for.

    Raises:
      ConfigError: an argument breaks a rule.
    """
    machine = MACHINES[args.machine]
    given = {
        "inside": (args.inside, "inside", 1e9),
        "between": (args.between, "between", 1e9),
        "tflops": (args.tflops, "flops", 1e12),
    }
    for name, (value, speed, unit) in given.items():
        if value is not None:
            if not 0 < value < float("inf"):
                raise ConfigError(rule(name, value, "be positive and finite", "correct it"))
            machine = dataclasses.replace(machine, **{speed: value * unit})
    if args.tokens < 1:
        raise ConfigError(rule("tokens", args.tokens, "be at least 1", "pass a positive int"))
    ranks = _ranks(args.ranks, args.per_node)
    return plan.Asked(_model(args), machine, args.tokens, args.dtype, args.routing, ranks, args.per_node)


def _model(args: argparse.Namespace) -> Model:
    if args.model is not None and args.config is not None:
        must = f"be the only model, and config={str(args.config)!r} is another"
        raise ConfigError(rule("model", args.model, must, "leave out --model or --config"))
    model = MODELS[args.model or _MODEL]
    if args.config is not None:
        found = hf_layers.num_moe_layers(args.config) if args.layers is None else None
        model = Model(1 if found is None else found, MoEConfig.from_hf(args.config))
    names = {
        "experts": "num_experts",
        "top_k": "top_k",
        "hidden": "hidden_size",
        "intermediate": "intermediate_size",
    }
    given = {of: getattr(args, name) for name, of in names.items() if getattr(args, name) is not None}
    if "num_experts" in given or "top_k" in given:
        # The model's groups are of its own experts.
        given.update(router="softmax_topk", score_bias=False, num_groups=None, top_groups=None)
    cfg = dataclasses.replace(model.cfg, wire_dtype=args.wire, capacity_factor=args.capacity_factor, **given)
    layers = model.layers if args.layers is None else args.layers
    if layers < 1:
        raise ConfigError(rule("layers", layers, "be at least 1", "pass a positive int"))
    return Model(layers, cfg)


def _ranks(text: str, per_node: int) -> list[int]:
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        ranks = []
    if per_node < 1:
        raise ConfigError(rule("per_node", per_node, "be at least 1", "pass a positive int"))
    if not ranks or any(count < 1 or (count > per_node and count % per_node) for count in ranks):
        must = f"be numbers of ranks, of whole nodes of {per_node} where they are more"
        raise ConfigError(rule("ranks", text, must, "correct it, or pass --per-node"))
    return ranks


def run(args: argparse.Namespace, command: str) -> int:
    """Plans, writes and prints; returns 0."""

    def save(planned: dict[str, Any]) -> None:
        output.write(args.json, {"command": command, **planned})

    print(plan_report.as_text(plan.run(asked_of(args), print, save)))
    return 0
