"""What the experts compute on the rows that dispatch brought. Each module here is one implementation.

A new implementation is one file with the functions of ``Implementation`` and one entry in
``IMPLEMENTATIONS``; ``tests/unit/test_experts.py`` then runs on it unchanged.

| file | |
|---|---|
| `reference.py`, `blocked.py`, `aiter.py`, `pallas/` | the implementations; `pallas` is experts="triton" |
| `spec.py`, `stacks.py` | what an implementation gets beside the rows; one layer of a stack |
| `checks.py`, `frozen.py` | what is refused: of operands, and of gradients |
| `activation.py`, `rounding.py` | what those in pure JAX share |
| `shared.py` | the shared expert, which sees every token |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jax_moriep import schemes
from jax_moriep.config import EXPERTS, QUANTISED, MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, TransportError, rule
from jax_moriep.experts import aiter, blocked, pallas, reference
from jax_moriep.experts.checks import check_format, check_operands
from jax_moriep.experts.frozen import without_gradient
from jax_moriep.experts.shared import shared_mlp
from jax_moriep.experts.spec import SAVED_NAME, ExpertSpec, ExpertWeights, Rows, Stack, TokenExperts
from jax_moriep.experts.stacks import of_layer
from jax_moriep.plan import Dispatched, ExchangeShape, Link
from jax_moriep.runtime.place import Place

__all__ = [
    "IMPLEMENTATIONS",
    "SAVED_NAME",
    "ExpertSpec",
    "ExpertWeights",
    "Implementation",
    "Rows",
    "Stack",
    "choose",
    "expert_mlp",
    "mlp_at",
    "of_layer",
    "reasons",
    "saved_rows",
    "shared_mlp",
]


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
        weights: ExpertWeights,
        spec: ExpertSpec,
        stack: Stack | None = None,
    ) -> jax.Array:
        """See ``blocked.expert_mlp``. Rows outside every run give zeros and get zero gradients, whatever they
        hold, and their share of ``row_weights`` likewise. With a stack, values may be read there, and spare
        the copy of ``weights``, which are the same; gradients are of ``weights`` in any case."""
        ...


@runtime_checkable
class LaysOut(Protocol):
    """What an implementation offers besides, if it wants quantised weights in a layout that has its name."""

    def lay_out(self, params: MoEParams, cfg: MoEConfig) -> MoEParams:
        """Weights in the plain layout in its own; under jit, on all ranks' experts or on some."""
        ...


@runtime_checkable
class RunsOnTokens(Protocol):
    """What an implementation offers besides, if a transport's own call can run it on tokens as they come."""

    def expert_tokens(
        self,
        weights: ExpertWeights,
        spec: ExpertSpec,
        shape: ExchangeShape,
        *,
        backend: str,
        fp8_wire: bool,
    ) -> TokenExperts:
        """What a custom call of the library ``backend`` needs to run the experts on what an exchange brings,
        by the fp8 wire or as it was; loads the kernel there."""
        ...


@runtime_checkable
class Opens(Protocol):
    """What an implementation offers besides, if its programs call what must be loaded before."""

    def open(self, cfg: MoEConfig, backend: str | None) -> None:
        """Loads what programs with a layer call: its own calls, and those of the library ``backend`` that run
        it on tokens (``RunsOnTokens``). Idempotent."""
        ...


@runtime_checkable
class Describes(Protocol):
    """What an implementation may offer besides, if it chooses what it runs by more than its name."""

    def describe(
        self, place: Place, cfg: MoEConfig | None, shape: ExchangeShape | None, dtype: str
    ) -> str | None:
        """What it would run, and what must be known of that; in lines for people. None: nothing to tell.

        cfg None asks about the place alone, shape None about no sizes in particular; ``dtype`` is that of
        rows and of floating weights.
        """
        ...


IMPLEMENTATIONS: dict[str, Implementation] = {
    "aiter": aiter,
    "triton": pallas,
    "blocked": blocked,
    "reference": reference,
}
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


def open_for(cfg: MoEConfig, place: Place, backend: str | None = None) -> None:
    """Loads what programs with a layer call at a place; tracing one does so too.

    Args:
      cfg: the layer.
      place: where.
      backend: the library of a transport that runs experts itself (``transports.RunsExperts``).
    """
    implementation = IMPLEMENTATIONS[choose(cfg, place)]
    if place.platform is not None and isinstance(implementation, Opens):
        implementation.open(cfg, backend)


def describe(
    name: str,
    place: Place,
    cfg: MoEConfig | None,
    shape: ExchangeShape | None = None,
    dtype: str = "bfloat16",
) -> str | None:
    """What an implementation that can run tells of a layer or of a place; None if it tells nothing.

    Args:
      name: of the implementation.
      place: where.
      cfg: the layer; None asks about the place alone.
      shape: the sizes of the exchange before the experts; None where they are not known.
      dtype: of x, and of floating weights.
    """
    implementation = IMPLEMENTATIONS[name]
    if place.platform is None or not isinstance(implementation, Describes):
        return None
    return implementation.describe(place, cfg, shape, dtype)


def details(
    place: Place,
    reasons: Mapping[str, str | None],
    cfg: MoEConfig | None,
    shape: ExchangeShape | None = None,
    dtype: str = "bfloat16",
) -> dict[str, str]:
    """What ``describe`` says for each name that has no reason against it; who tells nothing is left out."""
    told = {name: describe(name, place, cfg, shape, dtype) for name, why in reasons.items() if why is None}
    return {name: text for name, text in told.items() if text is not None}


def _reason(name: str, place: Place, cfg: MoEConfig | None) -> str | None:
    return None if place.platform is None else IMPLEMENTATIONS[name].unavailable_reason(place, cfg)


def choose(cfg: MoEConfig, place: Place, *, prepared: bool = True) -> str:
    """The implementation that a config's ``experts`` means at a place.

    Args:
      cfg: the layer; its ``experts`` is "auto" for the first that can run, or a name.
      place: where.
      prepared: the weights are, or will be, laid out for what is chosen; otherwise they lie as ``MoEParams``
        has them, and "auto" passes over what wants another layout.

    Returns:
      A name in ``IMPLEMENTATIONS``.

    Raises:
      TransportError: the named one cannot run here; the text says why and what to do.
    """
    name = cfg.experts
    if name == "auto":
        # A program that is only lowered may be for any platform: what runs on a CPU runs on all.
        asked = Place("cpu") if place.platform is None else place
        candidates = EXPERTS if prepared else tuple(n for n in EXPERTS if layout_of(n) == "plain")
        return next(candidate for candidate in candidates if _reason(candidate, asked, cfg) is None)
    why = _reason(name, place, cfg)
    if why is not None:
        raise TransportError(f"experts={name!r} cannot run on platform {place.platform!r}: {why}")
    return name


def layout_of(name: str) -> str:
    """The ``MoEParams.layout`` that an implementation wants."""
    return name if isinstance(IMPLEMENTATIONS.get(name), LaysOut) else "plain"


def laid_out(params: MoEParams, cfg: MoEConfig, layout: str) -> MoEParams:
    """Weights in the plain layout in another."""
    implementation = IMPLEMENTATIONS.get(layout)
    return implementation.lay_out(params, cfg) if isinstance(implementation, LaysOut) else params


def expert_mlp(
    disp: Dispatched,
    params: MoEParams,
    cfg: MoEConfig,
    *,
    layer: Any = None,
    stack: MoEParams | None = None,
) -> jax.Array:
    """Runs each row through its expert, in the implementation that ``cfg.experts`` names.

    Row r of expert e gives ``row_weights[r] * (act(rows[r] @ w1[e].T + b1[e]) @ w2[e].T + b2[e])``; with
    router "llama4" the weight multiplies the row before the expert instead. Weights of another float dtype
    than the rows' are cast, expert by expert. With ``cfg.expert_quant`` both products read quantised values,
    as docs/quantisation.md has it.

    Args:
      disp: what ``dispatch`` returned.
      params: this rank's experts: w1 [L, 2*I, H], w2 [L, H, I], and with ``cfg.expert_bias`` b1 [L, 2*I] and
        b2 [L, H]; codes come with w1_scale and w2_scale. I may be a tensor-parallel part of
        ``cfg.intermediate_size``.
      cfg: the layer.
      layer: as in ``ep_moe``, of params or of ``stack``, the experts of this rank [N, L, ...].
      stack: as in ``ep_moe``.

    Returns:
      [C, H] in the rows' dtype, ready for ``combine``; padding rows are zero. Sums run in f32.

    Raises:
      ConfigError: a shape or a dtype breaks a rule, the weights lie in another layout than the implementation
        wants, or a gradient of quantised weights is asked for.
      TransportError: the named implementation cannot run here.
    """
    params, read = of_layer(params, layer, stack)
    return of_rows(disp, params, cfg, read)


def of_rows(disp: Dispatched, params: MoEParams, cfg: MoEConfig, stack: Stack | None) -> jax.Array:
    """``expert_mlp`` of one layer's weights, and where they may be read."""
    link = disp.plan.link
    given = Rows(disp.rows, disp.row_weights, disp.group_sizes, disp.block)
    return mlp_at(_place(link), given, params, cfg, saved_rows=saved_rows(link.shape), stack=stack)


def mlp_at(
    place: Place,
    given: Rows,
    params: MoEParams,
    cfg: MoEConfig,
    *,
    saved_rows: int | None = None,
    stack: Stack | None = None,
) -> jax.Array:
    """``expert_mlp`` of rows that need not come from an exchange.

    Args:
      place: where.
      given: the rows.
      params: see ``expert_mlp``.
      cfg: the layer.
      saved_rows: see ``ExpertSpec``.
      stack: where the experts may be read.

    Returns:
      As ``expert_mlp``, which says what is raised too.
    """
    check_operands(given, params, cfg)
    name = choose(cfg, place, prepared=params.layout != "plain")
    _check_layout(name, params.layout)
    spec = ExpertSpec.of(cfg, block=given.block, architecture=place.architecture, saved_rows=saved_rows)
    weights = _weights(params, cfg, place)
    run = IMPLEMENTATIONS[name].expert_mlp
    return run(given.rows, given.row_weights, given.group_sizes, weights, spec, stack)


def saved_rows(shape: ExchangeShape) -> int:
    """Of how many rows of an exchange the backward pass may keep pre-activations: twice what a balanced
    routing brings, and the padding of the runs."""
    return 2 * shape.num_tokens * shape.top_k + shape.num_local_experts * shape.block


def expert_tokens(
    params: MoEParams, cfg: MoEConfig, link: Link, *, backend: str, fp8_wire: bool
) -> TokenExperts:
    """What a transport's own call needs to run the experts, where they are of the kind that it can run.

    Args:
      params: this rank's experts.
      cfg: the layer.
      link: the exchange.
      backend: the library that has the call.
      fp8_wire: whether tokens come as float8.
    """
    place, shape = _place(link), link.shape
    name = choose(cfg, place, prepared=params.layout != "plain")
    _check_layout(name, params.layout)
    implementation = IMPLEMENTATIONS[name]
    assert isinstance(implementation, RunsOnTokens)
    architecture = place.architecture
    spec = ExpertSpec.of(cfg, block=shape.block, architecture=architecture, saved_rows=saved_rows(shape))
    weights = _weights(params, cfg, place)
    return implementation.expert_tokens(weights, spec, shape, backend=backend, fp8_wire=fp8_wire)


def _place(link: Link) -> Place:
    """Where an exchange brings rows to."""
    return Place(link.platform, link.architecture)


def without_gradients(params: MoEParams) -> MoEParams:
    """The experts' codes and scales alone, whose derivative may not be asked for."""
    fixed: dict[str, Any] = {name: without_gradient(name, getattr(params, name)) for name in QUANTISED}
    fixed["router"] = None
    return MoEParams(**fixed, layout=params.layout)


def _weights(params: MoEParams, cfg: MoEConfig, place: Place) -> ExpertWeights:
    weights = ExpertWeights(params.w1, params.w2)
    if params.w1_scale is not None:
        check_format(params, place.platform, schemes.format_name(place.architecture))
        fixed = without_gradients(params)
        weights = ExpertWeights(fixed.w1, fixed.w2, w1_scale=fixed.w1_scale, w2_scale=fixed.w2_scale)
    if cfg.expert_bias:
        weights = weights._replace(b1=params.b1, b2=params.b2)
    return weights


def _check_layout(name: str, layout: str) -> None:
    wanted = layout_of(name)
    if layout != wanted:
        raise ConfigError(
            rule(
                "params.layout",
                layout,
                f"be {wanted!r} for experts={name!r}",
                "pass the weights through jm.prepare_params(params, cfg, mesh), with this cfg and mesh",
            )
        )
