"""``jax-moriep bench plan``: what each transport would move, hold and take for a model on many ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep import quant
from jax_moriep.bench.kinds import plan_bytes
from jax_moriep.bench.problem import formats
from jax_moriep.bench.problem.destinations import Destinations
from jax_moriep.bench.problem.models import Machine, Model
from jax_moriep.bench.problem.routing import routing
from jax_moriep.config import MoEConfig
from jax_moriep.errors import MoriepError
from jax_moriep.mori import limits, tuning
from jax_moriep.plan import ExchangeShape


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to plan.

    Args:
      model: the model.
      machine: its speeds.
      tokens: T.
      dtype: of x.
      routing: where tokens go; see ``problem.routing``.
      ranks: each R that is planned.
      per_node: P.
    """

    model: Model
    machine: Machine
    tokens: int
    dtype: str
    routing: str
    ranks: Sequence[int]
    per_node: int


def run(asked: Asked, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Plans; see ``Study``. Nothing is measured, and there is nothing to say meanwhile.

    Returns:
      A JSON-able dict: model, machine, routing, and a plan for each number of ranks, as ``plan`` makes it.

    Raises:
      ConfigError: the routing is unknown, or does not fit the model.
    """
    del say
    model, to = asked.model, routing(asked.routing, asked.model.cfg)
    described = {"layers": model.layers, "config": model.cfg.describe(), "tokens": asked.tokens}
    planned = {
        "format": formats.PLAN,
        "model": {**described, "dtype": asked.dtype},
        "machine": dataclasses.asdict(asked.machine),
        "routing": asked.routing,
        "plans": [plan(asked, to, ranks) for ranks in asked.ranks],
    }
    save(planned)
    return planned


def plan(asked: Asked, to_ranks: Callable[[int, int], Destinations], ranks: int) -> dict[str, Any]:
    """Plans one number of ranks.

    Args:
      asked: the other sizes.
      to_ranks: where tokens go, of R and P.
      ranks: R.

    Returns:
      A JSON-able dict. ``transports`` has for each the bytes of dispatch and combine (inside and between
      nodes, out of and into a rank, mean and maximum over the ranks; ``spread`` where libraries may share
      what crosses among the ranks of a node, so that the mean counts), the least ``seconds`` of each, the
      ``buffer_bytes`` of a rank and the exchanges' least ``share`` of the time of a layer with its experts,
      forward and in training; or the ``reason`` why it does not run there.
    """
    model, machine, tokens, dtype = asked.model, asked.machine, asked.tokens, asked.dtype
    per_node = min(ranks, asked.per_node)
    sizes = sizes_of(model, tokens, dtype, ranks, per_node)
    to = to_ranks(ranks, per_node)
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
