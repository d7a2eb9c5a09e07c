"""explain: which transport and which expert implementation a config gets on a mesh, and why."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_moriep import experts, fused, transports
from jax_moriep.config import MoEConfig, check_type
from jax_moriep.errors import ShardingError, rule
from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime.place import Place


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What runs, and for everything else why it does not. ``str()`` is made for people.

    Attributes:
      transport: the transport's name, or None if the named one cannot run.
      experts: the expert implementation's name, or None if the named one cannot run.
      transport_reasons: for each transport why it cannot run, None if it can.
      experts_reasons: the same for the expert implementations.
      shape: the sizes of an exchange, if ``num_tokens`` was given.
      transport_details: what transports that can run tell of that exchange: kernels and their launch sizes,
        or what they refuse it for. Empty without ``num_tokens``.
      experts_details: what expert implementations that can run tell of the layer: their kernels, and what
        must be known of them.
      one_call: a program that is not differentiated, with weights from ``jm.prepare_params``, runs dispatch,
        experts and combine as one custom call.
    """

    transport: str | None
    experts: str | None
    transport_reasons: dict[str, str | None]
    experts_reasons: dict[str, str | None]
    shape: ExchangeShape | None
    transport_details: dict[str, str] = dataclasses.field(default_factory=dict)
    experts_details: dict[str, str] = dataclasses.field(default_factory=dict)
    one_call: bool = False

    def __str__(self) -> str:
        lines = []
        for kind, chosen, reasons, details in (
            ("transport", self.transport, self.transport_reasons, self.transport_details),
            ("experts", self.experts, self.experts_reasons, self.experts_details),
        ):
            lines.append(f"{kind}: {chosen or 'none: the named one cannot run'}")
            for name, why in reasons.items():
                lines.append(f"  {name}: {'can run' if why is None else why}")
                lines += [f"    {line}" for line in details.get(name, "").splitlines()]
        if self.one_call:
            lines.append("dispatch, experts and combine are one call, and three where it is differentiated")
        if self.shape is not None:
            lines.append(f"sizes: {self.shape}")
        return "\n".join(lines)


def explain(
    cfg: MoEConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    *,
    ep_axis: str = "ep",
    num_tokens: int | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> Explanation:
    """Says what ``ep_moe`` would run for a config on a mesh, and why not something else.

    Asks the other processes of the mesh once; they answer when they call this too, or trace a layer with any
    transport but "collective" and "reference".

    Args:
      cfg: the layer.
      mesh: the mesh.
      ep_axis: its expert-parallel axis.
      num_tokens: T, tokens per rank; if given, the sizes of an exchange are included, and what MORI's
        kernels would be launched with.
      dtype: of x, for the latter.

    Returns:
      The explanation.

    Raises:
      ConfigError: ``cfg`` is no config.
      ShardingError: ``mesh`` is no mesh, or has no such axis.
      TransportError: a process does not answer, or ``JAX_MORIEP_RANKS_PER_NODE`` is another there, or is
        wrong and decides here.
    """
    check_type("cfg", cfg, MoEConfig, "call explain(cfg, mesh)")
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        cure = "make one with jax.make_mesh"
        raise ShardingError(rule("mesh", type(mesh).__name__, "be a jax.sharding.Mesh or AbstractMesh", cure))
    place = Place.of(mesh, ep_axis)
    transport_reasons = transports.reasons(place)
    experts_reasons = experts.reasons(place, cfg)
    shape = None if num_tokens is None else ExchangeShape.of(cfg, place.num_ranks, num_tokens)
    told = {}
    if shape is not None:
        names = [name for name, why in transport_reasons.items() if why is None]
        told = {name: transports.describe(name, place, cfg, shape, jnp.dtype(dtype).name) for name in names}
    transport = transports.chosen(cfg.transport, transport_reasons)
    implementation = _chosen_experts(cfg.experts, experts_reasons)
    one_call = (
        transport is not None
        and implementation is not None
        and fused.is_one_call(cfg, transport, implementation, dtype, num_nodes=place.num_nodes)
    )
    return Explanation(
        transport=transport,
        experts=implementation,
        transport_reasons=transport_reasons,
        experts_reasons=experts_reasons,
        shape=shape,
        transport_details={name: text for name, text in told.items() if text is not None},
        experts_details=experts.details(place, experts_reasons, cfg, shape, jnp.dtype(dtype).name),
        one_call=one_call,
    )


def _chosen_experts(name: str, reasons: dict[str, str | None]) -> str | None:
    if name == "auto":
        return next((candidate for candidate, why in reasons.items() if why is None), None)
    return name if reasons[name] is None else None
