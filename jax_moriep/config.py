"""MoEConfig, MoEParams and MoEStats: the static description, the weights and the measurements.

All validation of user-given values is here, so that a bad value fails when it is written down and not
inside a compiled program. Letters: T tokens per rank, H hidden, K top_k, E experts, R ranks, L experts
per rank, I intermediate size, C capacity.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import jax

from jax_moriep import hf_config
from jax_moriep.errors import ConfigError, rule
from jax_moriep.tuning_options import Tuning

ROUTER_NAMES = (
    "softmax_topk",
    "topk_softmax",
    "sigmoid_topk",
    "deepseek_v3",
    "deepseek_v2",
    "gpt_oss",
    "llama4",
    "ernie45",
)
GROUPED_ROUTERS = ("deepseek_v3", "deepseek_v2")
SCORE_BIAS_ROUTERS = ("sigmoid_topk", "deepseek_v3", "ernie45")
ACTIVATIONS = ("silu", "gelu", "swiglu_clamped")
TRANSPORTS = ("native", "mori", "two_level", "collective", "reference")
# In the order in which "auto" tries them.
EXPERTS = ("aiter", "triton", "blocked", "reference")
SCHEMES = ("fp8_block", "fp8_token", "int8_token")
LAYOUTS = ("plain", "aiter")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """What one mixture-of-experts layer is; frozen, and hashable by value.

    Args:
      num_experts: E, the number of routed experts; need not be divisible by the number of ranks.
      top_k: K, experts per token, at most E.
      hidden_size: H, the width of a token.
      intermediate_size: I, the width inside one expert.
      router: a name in ``jm.ROUTERS``, or ``callable(logits, bias, cfg) -> (ids, weights, scores)``.
      norm_topk: divide the K weights by their sum, where the router's formula has that step.
      routed_scaling: factor on every routing weight.
      num_groups: number of expert groups of the DeepSeek routers; None means one group.
      top_groups: groups kept per token; set together with ``num_groups``.
      score_bias: a per-expert bias [E] used for the selection only; it has no gradient.
      router_bias: a per-expert bias [E] on the logits (gpt-oss).
      activation: "silu", "gelu" (exact, erf) or "swiglu_clamped"; always gated.
      activation_limit: clamp of "swiglu_clamped", positive.
      activation_alpha: sigmoid slope of "swiglu_clamped".
      shared_intermediate_size: width of the shared expert; None means there is none.
      shared_gate: multiply the shared expert's output by ``sigmoid(x @ shared_gate)``.
      expert_bias: per-expert biases b1 and b2.
      capacity_factor: None reserves the exact bound ``R*T*min(K, L)`` rows on each rank and drops nothing;
        a number x reserves ``x*T*K`` rows, and what does not fit is dropped and counted.
      wire_dtype: None sends rows in x's dtype; "fp8" sends float8 with one f32 scale per 128 values.
      transport: "auto" or one of native, mori, two_level, collective, reference.
      experts: "auto" or one of blocked, triton, aiter, reference.
      expert_quant: a scheme of docs/quantisation.md, "fp8_block", "fp8_token" or "int8_token": the experts
        compute with quantised weights and rows. w1 and w2 may be what ``jm.quantize_params`` made of them, or
        floating master weights, which every call quantises.
      block: rows per block; every expert's run of rows starts at a multiple of it. None: chosen from T.
      tuning: a ``jm.Tuning``: how the transport launches its kernels. None: as its tables say.

    Raises:
      ConfigError: a value breaks its rule; the text names the value, the rule and the cure.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    _: dataclasses.KW_ONLY
    router: str | Callable[..., Any] = "softmax_topk"
    norm_topk: bool = True
    routed_scaling: float = 1.0
    num_groups: int | None = None
    top_groups: int | None = None
    score_bias: bool = False
    router_bias: bool = False
    activation: str = "silu"
    activation_limit: float = 7.0
    activation_alpha: float = 1.702
    shared_intermediate_size: int | None = None
    shared_gate: bool = False
    expert_bias: bool = False
    capacity_factor: float | None = None
    wire_dtype: str | None = None
    transport: str = "auto"
    experts: str = "auto"
    expert_quant: str | None = None
    block: int | None = None
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            self._store_int(name)
        for name in ("num_groups", "top_groups", "shared_intermediate_size", "block"):
            if getattr(self, name) is not None:
                self._store_int(name)
        for name in ("norm_topk", "score_bias", "router_bias", "shared_gate", "expert_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(rule(name, getattr(self, name), "be True or False", "pass a bool"))
        for name in ("routed_scaling", "activation_limit", "activation_alpha"):
            self._store_float(name)
        if self.activation_limit <= 0:
            raise ConfigError(
                rule("activation_limit", self.activation_limit, "be positive", "use a clamp above 0, as 7.0")
            )
        if self.capacity_factor is not None:
            self._store_float("capacity_factor")
            if self.capacity_factor <= 0:
                raise ConfigError(
                    rule("capacity_factor", self.capacity_factor, "be positive", "use None to drop nothing")
                )
        if self.top_k > self.num_experts:
            raise ConfigError(
                rule(
                    "top_k",
                    self.top_k,
                    f"be at most num_experts={self.num_experts}",
                    "lower top_k or add experts",
                )
            )
        self._check_choice("activation", ACTIVATIONS)
        self._check_choice("transport", ("auto", *TRANSPORTS))
        self._check_choice("experts", ("auto", *EXPERTS))
        self._check_choice("wire_dtype", (None, "fp8"))
        self._check_choice("expert_quant", (None, *SCHEMES))
        if self.tuning is not None and not isinstance(self.tuning, Tuning):
            raise ConfigError(rule("tuning", self.tuning, "be a jm.Tuning or None", "pass jm.Tuning(...)"))
        if self.shared_gate and self.shared_intermediate_size is None:
            raise ConfigError(
                rule("shared_gate", True, "come with a shared expert", "set shared_intermediate_size")
            )
        self._check_router()

    @classmethod
    def from_hf(cls, config: Any, **changes: Any) -> MoEConfig:
        """The layer of a published model, by its config.

        ``expert_quant`` is set where the config's ``quantization_config`` names one of ours.

        Args:
          config: a config object of transformers, the dict of a config.json, or the path of one or of the
            folder that holds it. Of a model with several kinds of input the language model's part counts.
          **changes: fields that the config does not decide, or that shall be others.

        Raises:
          ConfigError: the config is not of a model in the table in README.md, lacks a key, or has a null with
            which no model runs.

        Example:
          >>> cfg = jm.MoEConfig.from_hf("Qwen3-30B-A3B", capacity_factor=1.5)
        """
        return cls(**{**hf_config.describe(config).fields, **changes})

    def describe(self) -> str:
        """The fields that differ from their defaults, in words that are the same in every process."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={_in_words(value)}")
        return ", ".join(parts)

    def _store_int(self, name: str) -> None:
        """Checks a positive integer and stores it as a Python int, so that equal configs hash alike."""
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ConfigError(rule(name, value, "be an integer", "pass an int"))
        if value < 1:
            raise ConfigError(rule(name, value, "be at least 1", "pass a positive int"))
        object.__setattr__(self, name, int(value))

    def _store_float(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise ConfigError(rule(name, value, "be a finite number", "pass a float"))
        object.__setattr__(self, name, float(value))

    def _check_choice(self, name: str, choices: tuple[str | None, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(rule(name, getattr(self, name), f"be one of {choices}", "pick one of these"))

    def _check_router(self) -> None:
        if callable(self.router):
            return
        self._check_choice("router", ROUTER_NAMES)
        if self.score_bias and self.router not in SCORE_BIAS_ROUTERS:
            raise ConfigError(
                rule(
                    "score_bias",
                    True,
                    f"come with a router that uses one ({', '.join(SCORE_BIAS_ROUTERS)}), not "
                    f"router={self.router!r}",
                    "drop score_bias or change the router",
                )
            )
        if self.num_groups is None and self.top_groups is None:
            return
        if self.router not in GROUPED_ROUTERS:
            raise ConfigError(
                rule(
                    "num_groups",
                    self.num_groups,
                    f"come with a grouped router ({', '.join(GROUPED_ROUTERS)}), not router={self.router!r}",
                    "drop num_groups and top_groups or change the router",
                )
            )
        if self.num_groups is None or self.top_groups is None:
            raise ConfigError(
                f"num_groups={self.num_groups!r} and top_groups={self.top_groups!r} must be set together; "
                "set both or neither"
            )
        if self.num_experts % self.num_groups:
            raise ConfigError(
                rule(
                    "num_groups",
                    self.num_groups,
                    f"divide num_experts={self.num_experts}",
                    "choose a divisor",
                )
            )
        if self.top_groups > self.num_groups:
            raise ConfigError(
                rule("top_groups", self.top_groups, f"be at most num_groups={self.num_groups}", "lower it")
            )
        reachable = self.top_groups * (self.num_experts // self.num_groups)
        if self.top_k > reachable:
            raise ConfigError(
                rule(
                    "top_k",
                    self.top_k,
                    f"be at most the {reachable} experts of top_groups={self.top_groups} groups",
                    "raise top_groups or lower top_k",
                )
            )


def check_type(name: str, value: object, kind: type, cure: str) -> None:
    """Raises ConfigError with the type's name, not the value, whose repr may be pages of numbers."""
    if not isinstance(value, kind):
        raise ConfigError(rule(name, type(value).__name__, f"be a jm.{kind.__name__}", cure))


def _in_words(value: Any) -> str:
    """A value in words without addresses in memory, which differ between processes."""
    if isinstance(value, functools.partial):
        keywords = [f"{name}={_in_words(given)}" for name, given in value.keywords.items()]
        return f"partial({', '.join([*map(_in_words, (value.func, *value.args)), *keywords])})"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEParams:
    """The weights of one layer; what the config does not use is None.

    The layouts are those of Hugging Face's fused experts. E may also be the padded count that
    ``jm.pad_params`` makes. Experts may be quantised, see ``jm.quantize_params``.

    The types are those of a layer's weights. As any pytree it may hold something else in their places: their
    shardings (``jm.param_specs``), gradients, or what ``jax.eval_shape`` gives.
    """

    router: jax.Array
    """[H, E]"""
    w1: jax.Array
    """[E, 2*I, H]: gate rows, then up rows. Floating, or the codes of ``cfg.expert_quant``."""
    w2: jax.Array
    """[E, H, I], likewise."""
    router_bias: jax.Array | None = None
    """[E], added to the logits."""
    score_bias: jax.Array | None = None
    """[E], f32, selection only, no gradient."""
    b1: jax.Array | None = None
    """[E, 2*I]"""
    b2: jax.Array | None = None
    """[E, H]"""
    shared_w1: jax.Array | None = None
    """[2*Is, H]: gate rows, then up rows."""
    shared_w2: jax.Array | None = None
    """[H, Is]"""
    shared_gate: jax.Array | None = None
    """[H, 1]"""
    w1_scale: jax.Array | None = None
    """f32, with codes: a weight is its code times its scale. fp8_block: [E, 2*ceil(I/128), ceil(H/128)], one
    for 128 x 128 codes, those of gate before those of up; the other schemes: [E, 2*I], one for a row."""
    w2_scale: jax.Array | None = None
    """f32, with codes. fp8_block: [E, ceil(H/128), ceil(I/128)]; the other schemes: [E, H]."""
    layout: str = dataclasses.field(default="plain", metadata={"static": True})
    """How the codes of an expert lie: "plain", as above, or "aiter", as ``jm.prepare_params`` lays them out
    for AITER's kernels."""


WEIGHT_NAMES = tuple(f.name for f in dataclasses.fields(MoEParams) if not f.metadata.get("static"))
"""The fields of MoEParams that are arrays or None, in their order."""
QUANTISED = ("w1", "w2", "w1_scale", "w2_scale")
"""Those of them that ``jm.quantize_params`` makes."""
PER_EXPERT = ("w1", "w2", "b1", "b2", "w1_scale", "w2_scale")
"""Those of them that begin with the experts, whose number ``jm.pad_params`` changes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoEStats:
    """What one call measured, on the device and summed over all tokens of the mesh; nothing here syncs.

    Counts leave out masked tokens. The two losses and the entropy are means over the real tokens and are
    differentiable; add them to the training loss with the weights of your choice.
    """

    expert_counts: jax.Array
    """i32[E], routes per expert, before any drop."""
    recv_rows: jax.Array
    """i32[R], rows that the routing asked each rank to hold; the largest over the groups of the mesh."""
    dropped: jax.Array
    """i32[], routes that did not fit into their rank's capacity."""
    overflow: jax.Array
    """bool[], whether any route was dropped."""
    load_balance_loss: jax.Array
    """f32[]"""
    z_loss: jax.Array
    """f32[]"""
    router_entropy: jax.Array
    """f32[], in nats."""
