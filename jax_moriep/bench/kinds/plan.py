"""``jax-moriep bench plan``: what each transport would move, hold and take for a model on many ranks."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep import hf_layers, quant
from jax_moriep.bench.kinds import plan_bytes
from jax_moriep.bench.problem import destinations
from jax_moriep.bench.problem.destinations import Destinations
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, MoriepError, rule
from jax_moriep.mori import limits, tuning
from jax_moriep.plan import ExchangeShape

FORMAT = "jax-moriep bench plan 1"
RANKS = "8,16,32,64,128,256,512,1024,2048,4096"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's MoE layers: their number and their config."""

    layers: int
    cfg: MoEConfig


MODELS = {
    "deepseek-v3": Model(
        58,
        MoEConfig(
            *(256, 8, 7168, 2048),
            router="deepseek_v3",
            score_bias=True,
            num_groups=8,
            top_groups=4,
            shared_intermediate_size=2048,
        ),
    ),
    "mixtral-8x7b": Model(32, MoEConfig(8, 2, 4096, 14336)),
    "qwen3-30b-a3b": Model(48, MoEConfig(128, 8, 2048, 768)),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Speeds of one rank: bytes per second in each direction inside a node and between nodes, and FLOP/s."""

    inside: float
    between: float
    flops: float


MACHINES = {
    # AMD's data sheet of the MI300X: seven links of 128 GB/s, both ways together; bf16 without sparsity.
    "mi300x": Machine(7 * 64e9, 400e9 / 8, 1307e12),
    # NVIDIA's data sheet of the H100 SXM: NVLink 900 GB/s, both ways together; bf16 without sparsity.
    "h100": Machine(450e9, 400e9 / 8, 989e12),
}
"""Peaks of public data sheets, and a network of 400 Gbit/s for each rank."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench plan``."""
    parser.add_argument("--model", choices=MODELS, default="deepseek-v3", help="default: %(default)s")
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
    parser.add_argument("--ranks", default=RANKS, metavar="R,...", help="default: %(default)s")
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")


def of_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Plans what the arguments say.

    Returns:
      A JSON-able dict: model, machine, routing, and a plan for each number of ranks, as ``plan`` makes it.

    Raises:
      ConfigError: an argument breaks a rule.
    """
    model = _model(args)
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
    destinations = routing(args.routing, model.cfg)
    plans = [
        plan(model, machine, args.tokens, args.dtype, destinations, count, min(count, args.per_node))
        for count in ranks
    ]
    described = {"layers": model.layers, "config": model.cfg.describe(), "tokens": args.tokens}
    return {
        "format": FORMAT,
        "model": {**described, "dtype": args.dtype},
        "machine": dataclasses.asdict(machine),
        "routing": args.routing,
        "plans": plans,
    }


def plan(
    model: Model,
    machine: Machine,
    tokens: int,
    dtype: str,
    destinations: Callable[[int, int], Destinations],
    ranks: int,
    per_node: int,
) -> dict[str, Any]:
    """Plans one number of ranks.

    Args:
      model: the model.
      machine: its speeds.
      tokens: T.
      dtype: of x.
      destinations: where tokens go, of R and P.
      ranks: R.
      per_node: P.

    Returns:
      A JSON-able dict. ``transports`` has for each the bytes of dispatch and combine (inside and between
      nodes, out of and into a rank, mean and maximum over the ranks; ``spread`` where libraries may share
      what crosses among the ranks of a node, so that the mean counts), the least ``seconds`` of each, the
      ``buffer_bytes`` of a rank and the exchanges' least ``share`` of the time of a layer with its experts,
      forward and in training; or the ``reason`` why it does not run there.
    """
    sizes = sizes_of(model, tokens, dtype, ranks, per_node)
    to = destinations(ranks, per_node)
    transports: dict[str, Any] = {}
    for name, formula in plan_bytes.TRANSPORTS.items():
        if name == "native" and sizes.nodes > 1:
            transports[name] = {"reason": "it needs the ranks of a group on one machine"}
            continue
        exchange = formula(sizes, to)
        if name == "mori":
            try:
                exchange = dataclasses.replace(exchange, buffers=_heap_bytes(sizes, model.cfg, dtype))
            except MoriepError as error:
                transports[name] = {"reason": str(error)}
                continue
        transports[name] = {
            "dispatch": _moved(exchange.dispatch, machine),
            "combine": _moved(exchange.combine, machine),
            "buffer_bytes": exchange.buffers,
            "share": {
                what: _share(exchange, sizes, to, machine, training)
                for what, training in (("forward", False), ("training", True))
            },
        }
    return {
        "ranks": ranks,
        "nodes": sizes.nodes,
        "capacity": sizes.capacity,
        "weight_bytes": plan_bytes.weight_bytes(sizes),
        "row_bytes": sizes.capacity * sizes.sum_bytes,
        "expert_seconds": plan_bytes.expert_seconds(sizes, to, machine.flops),
        "rows": {"mean": float(to.rows().mean() * tokens), "max": float(to.rows().max() * tokens)},
        "transports": transports,
    }


def sizes_of(model: Model, tokens: int, dtype: str, ranks: int, per_node: int) -> plan_bytes.Sizes:
    """The sizes that the formulas take, by the package's own rules."""
    cfg = model.cfg
    value = jnp.dtype(dtype).itemsize
    row = quant.packed_width(cfg.hidden_size) if cfg.wire_dtype == "fp8" else cfg.hidden_size * value
    return plan_bytes.Sizes(
        ranks=ranks,
        per_node=per_node,
        tokens=tokens,
        top_k=cfg.top_k,
        experts=cfg.num_experts,
        hidden=cfg.hidden_size,
        inner=cfg.intermediate_size,
        shared=cfg.shared_intermediate_size or 0,
        layers=model.layers,
        row_bytes=row,
        value_bytes=value,
        weight_bytes=1 if cfg.expert_quant else value,
        capacity=ExchangeShape.of(cfg, ranks, tokens).capacity,
        # A layer's statistics: counts and scores of each expert, two losses' sums and the number of tokens.
        words=2 * cfg.num_experts + 3,
        to_every_node=_kernel(cfg, tokens, ranks, ranks // per_node) == "InterNodeV1LL",
    )


def routing(kind: str, cfg: MoEConfig) -> Callable[[int, int], Destinations]:
    """Where tokens go, as a function of R and P.

    Args:
      kind: "uniform", "zipf", or the path of a file: i[E], how often each expert was chosen, or routes
        i[N, K].
      cfg: the layer's.

    Raises:
      ConfigError: there is no such file, or it does not fit the config.
    """
    if kind in ("uniform", "zipf"):
        popularity = np.ones(cfg.num_experts) if kind == "uniform" else destinations.zipf(cfg.num_experts)
    else:
        measured = _measured(kind, cfg)
        if measured.ndim == 2:
            return functools.partial(_counted, measured, cfg)
        popularity = destinations.fitted(measured, cfg.top_k)
    if cfg.num_groups is not None and cfg.top_groups is not None and cfg.top_groups < cfg.num_groups:
        two_best = cfg.router != "deepseek_v2"
        ids = destinations.sampled(popularity, cfg.top_k, cfg.num_groups, cfg.top_groups, two_best=two_best)
        if np.ptp(popularity) > 0:
            return functools.partial(_counted, ids, cfg)
        return lambda ranks, per_node: destinations.evened(
            _counted(ids, cfg, ranks, per_node), cfg.num_experts
        )
    chosen = destinations.chosen_from(popularity, cfg.top_k, np.arange(cfg.num_experts))
    return lambda ranks, per_node: destinations.of_popularity(popularity, cfg.top_k, ranks, per_node, chosen)


def _counted(ids: np.ndarray, cfg: MoEConfig, ranks: int, per_node: int) -> Destinations:
    return destinations.of_ids(ids, cfg.num_experts, ranks, per_node, of_all=False)


def _measured(path: str, cfg: MoEConfig) -> np.ndarray:
    try:
        found = np.load(path)
    except (OSError, ValueError) as error:
        must = f"be uniform, zipf, or a file of NumPy ({error})"
        raise ConfigError(rule("routing", path, must, "correct it")) from None
    shapes = f"[{cfg.num_experts}] or [N, {cfg.top_k}]"
    fits = isinstance(found, np.ndarray) and np.issubdtype(found.dtype, np.integer)
    if not fits or not (found.shape == (cfg.num_experts,) or found.shape[1:] == (cfg.top_k,)):
        shape = f"{found.dtype}{list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
        must = f"hold integers {shapes}, and holds {shape}"
        raise ConfigError(rule("routing", path, must, "save counts of experts, or tokens' routes"))
    # Counts are how often, routes are which.
    leads_somewhere = found.any() if found.ndim == 1 else ((found >= 0) & (found < cfg.num_experts)).any()
    if not leads_somewhere:
        must = f"lead to at least one of the {cfg.num_experts} experts"
        raise ConfigError(rule("routing", path, must, "save what tokens of this model chose"))
    return found


def _model(args: argparse.Namespace) -> Model:
    model = MODELS[args.model]
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


def _kernel(cfg: MoEConfig, tokens: int, ranks: int, nodes: int) -> str:
    """The type of MORI's kernels that would run."""
    return tuning.choose_kernel(cfg.tuning, nodes, tokens, -(-cfg.num_experts // ranks))[0]


def _heap_bytes(sizes: plan_bytes.Sizes, cfg: MoEConfig, dtype: str) -> int:
    """MORI's memory of a rank.

    Raises:
      MoriepError: MORI does not run there.
    """
    limits.check_rows("dtype", dtype)
    kernel = _kernel(cfg, sizes.tokens, sizes.ranks, sizes.nodes)
    size = limits.HandleSize(
        kernel=kernel,
        ranks=sizes.ranks,
        gpus_per_node=limits.gpus_per_node(kernel, sizes.ranks, sizes.nodes),
        max_tokens=sizes.tokens,
        hidden=sizes.hidden,
        element_bytes=sizes.value_bytes,
        experts_per_rank=-(-sizes.experts // sizes.ranks),
        top_k=sizes.top_k,
        scales=quant.num_groups(sizes.hidden) if cfg.wire_dtype == "fp8" else 0,
    )
    limits.check_handle(size)
    own = limits.HEAP_OWN_BYTES + limits.notice_bytes(sizes.nodes) + limits.between_bytes(size)
    return own + limits.heap_bytes(size)


def _moved(moved: plan_bytes.Moved, machine: Machine) -> dict[str, Any]:
    def of(values: np.ndarray) -> dict[str, float]:
        return {"mean": float(values.mean()), "max": float(values.max())}

    return {
        "inside": {"out": of(moved.inside_out), "in": of(moved.inside_in)},
        "between": {"out": of(moved.between_out), "in": of(moved.between_in)},
        "spread": moved.spread,
        "seconds": moved.seconds(machine.inside, machine.between),
    }


def _share(
    exchange: plan_bytes.Exchange, sizes: plan_bytes.Sizes, to: Destinations, machine: Machine, training: bool
) -> float:
    moving = exchange.seconds(machine.inside, machine.between, training=training)
    return moving / (moving + plan_bytes.expert_seconds(sizes, to, machine.flops, training=training))


def as_text(planned: dict[str, Any]) -> str:
    """What ``of_arguments`` gave, for people."""
    model, machine = planned["model"], planned["machine"]
    lines = [
        f"{model['layers']} MoE layers, {model['config']}",
        f"T={model['tokens']} of each rank, {model['dtype']}, routing {planned['routing']}",
        f"each rank, one way: {machine['inside'] / 1e9:g} GB/s inside a node, {machine['between'] / 1e9:g} "
        f"GB/s between nodes; {machine['flops'] / 1e12:g} TFLOP/s",
        "MB are of one exchange of one layer, out of or into the rank that has most; times are the least "
        "that these speeds allow",
    ]
    for of_ranks in planned["plans"]:
        lines += ["", *_plan_lines(of_ranks)]
    return "\n".join(lines)


def _most(of: dict[str, Any]) -> tuple[float, float]:
    """Bytes inside and between nodes of the rank with the most; of the mean one where they are spread."""
    kind = "mean" if of["spread"] else "max"
    inside, between = of["inside"], of["between"]
    return max(way["max"] for way in inside.values()), max(way[kind] for way in between.values())


def _plan_lines(of_ranks: dict[str, Any]) -> list[str]:
    rows = of_ranks["rows"]
    lines = [
        f"{of_ranks['ranks']} ranks, {of_ranks['nodes']} nodes; of a rank: weights "
        f"{of_ranks['weight_bytes'] / 1e9:.3g} GB, rows {of_ranks['row_bytes'] / 1e9:.3g} GB (capacity "
        f"{of_ranks['capacity']}, used {rows['mean']:.0f}, at most {rows['max']:.0f}), experts "
        f"{of_ranks['expert_seconds'] * 1e6:.0f} us",
        f"  {'':11}{'dispatch MB':>20}{'combine MB':>20}{'us':>20}{'buffers':>10}{'share of a layer':>22}",
        f"  {'':11}{'inside':>10}{'between':>10}{'inside':>10}{'between':>10}{'dispatch':>10}{'combine':>10}"
        f"{'GB':>10}{'forward':>12}{'training':>10}",
    ]
    for name, found in of_ranks["transports"].items():
        if "reason" in found:
            lines.append(f"  {name:11}{found['reason']}")
            continue
        operations = [found["dispatch"], found["combine"]]
        megabytes = [value / 1e6 for of in operations for value in _most(of)]
        micros = [of["seconds"] * 1e6 for of in operations]
        share = found["share"]
        lines.append(
            f"  {name:11}{''.join(f' {value:9.0f}' for value in megabytes)}"
            f"{''.join(f' {value:9.0f}' for value in micros)} {found['buffer_bytes'] / 1e9:9.3g}"
            f"{share['forward']:12.0%}{share['training']:10.0%}"
        )
    return lines
