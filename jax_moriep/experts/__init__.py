"""What the experts compute on the rows that dispatch brought. Each module here is one implementation.

A new implementation is one file with the functions of ``Implementation`` and one entry in
``IMPLEMENTATIONS``; ``tests/unit/test_experts.py`` then runs on it unchanged.
"""

from __future__ import annotations

from typing import Protocol

import jax

from jax_moriep.config import EXPERTS, MoEConfig, MoEParams
from jax_moriep.errors import TransportError
from jax_moriep.experts import blocked, reference, triton
from jax_moriep.experts.checks import check_operands
from jax_moriep.experts.shared import shared_mlp
from jax_moriep.experts.spec import ExpertSpec
from jax_moriep.plan import Dispatched
from jax_moriep.runtime.place import Place

__all__ = ["IMPLEMENTATIONS", "ExpertSpec", "Implementation", "choose", "expert_mlp", "reasons", "shared_mlp"]

_INPUT_WEIGHT_ROUTERS = ("llama4",)


class Implementation(Protocol):
    """The contract; all local to one rank."""

    def unavailable_reason(self, place: Place, cfg: MoEConfig | None) -> str | None:
        """Why it cannot run a layer at a place, with the cure; None if it can. cfg None asks about the place
        alone."""
        ...

    def expert_mlp(
        self,
        rows: jax.Array,
        row_weights: jax.Array,
        group_sizes: jax.Array,
        w1: jax.Array,
        w2: jax.Array,
        b1: jax.Array | None,
        b2: jax.Array | None,
        spec: ExpertSpec,
    ) -> jax.Array:
        """See ``blocked.expert_mlp``. Rows outside every run give zeros and get zero gradients, whatever they
        hold, and their share of ``row_weights`` likewise."""
        ...


IMPLEMENTATIONS: dict[str, Implementation] = {"blocked": blocked, "triton": triton, "reference": reference}
"""By name; ``config.EXPERTS`` has the order in which "auto" tries them."""


def reasons(place: Place, cfg: MoEConfig | None = None) -> dict[str, str | None]:
    """For each name that ``cfg.experts`` may have: why it cannot run, with the cure, or None if it can.

    Args:
      place: where; on one without a platform, programs are only lowered, and everything can be.
      cfg: the layer; None asks about the place alone.

    Returns:
      The reasons, in the order in which "auto" tries the names.
    """
    return {name: _reason(name, place, cfg) for name in EXPERTS}


def _reason(name: str, place: Place, cfg: MoEConfig | None) -> str | None:
    if name not in IMPLEMENTATIONS:
        return "it is not in this version; use experts='auto'"
    return None if place.platform is None else IMPLEMENTATIONS[name].unavailable_reason(place, cfg)


def choose(cfg: MoEConfig, place: Place) -> str:
    """The implementation that a config's ``experts`` means at a place.

    Args:
      cfg: the layer; its ``experts`` is "auto" for the first that can run, or a name.
      place: where.

    Returns:
      A name in ``IMPLEMENTATIONS``.

    Raises:
      TransportError: the named one cannot run here; the text says why and what to do.
    """
    name = cfg.experts
    if name == "auto":
        # A program that is only lowered may be for any platform: what runs on a CPU runs on all.
        asked = Place("cpu") if place.platform is None else place
        return next(candidate for candidate in EXPERTS if _reason(candidate, asked, cfg) is None)
    why = _reason(name, place, cfg)
    if why is not None:
        raise TransportError(f"experts={name!r} cannot run on platform {place.platform!r}: {why}")
    return name


def expert_mlp(disp: Dispatched, params: MoEParams, cfg: MoEConfig) -> jax.Array:
    """Runs each row through its expert, in the implementation that ``cfg.experts`` names.

    Row r of expert e gives ``row_weights[r] * (act(rows[r] @ w1[e].T + b1[e]) @ w2[e].T + b2[e])``; with
    router "llama4" the weight multiplies the row before the expert instead. Weights of another float dtype
    than the rows' are cast, expert by expert.

    Args:
      disp: what ``dispatch`` returned.
      params: this rank's experts: w1 [L, 2*I, H], w2 [L, H, I], and with ``cfg.expert_bias`` b1 [L, 2*I] and
        b2 [L, H]. I may be a tensor-parallel part of ``cfg.intermediate_size``.
      cfg: the layer.

    Returns:
      [C, H] in the rows' dtype, ready for ``combine``; padding rows are zero. Sums run in f32.

    Raises:
      ConfigError: a shape or a dtype breaks a rule.
      TransportError: the named implementation cannot run here.
    """
    check_operands(disp, params, cfg)
    biases = (params.b1, params.b2) if cfg.expert_bias else (None, None)
    link = disp.plan.link
    implementation = IMPLEMENTATIONS[choose(cfg, Place(link.platform, link.architecture))]
    return implementation.expert_mlp(
        disp.rows, disp.row_weights, disp.group_sizes, params.w1, params.w2, *biases, _spec(disp, cfg)
    )


def _spec(disp: Dispatched, cfg: MoEConfig) -> ExpertSpec:
    shape = disp.plan.link.shape
    return ExpertSpec(
        activation=cfg.activation,
        activation_limit=cfg.activation_limit,
        activation_alpha=cfg.activation_alpha,
        weight_input=cfg.router in _INPUT_WEIGHT_ROUTERS,
        block=disp.block,
        # Twice what a balanced routing brings, and the padding of the runs.
        saved_rows=2 * shape.num_tokens * shape.top_k + shape.num_local_experts * shape.block,
    )
