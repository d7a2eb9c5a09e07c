"""What one run of the bench measures: its sizes, its implementations, and the options for them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep.bench.problem.names import ALONE, FLOORS
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, rule
from jax_moriep.plan import ExchangeShape
from jax_moriep.tuning_options import Tuning

DTYPES = {"f32": jnp.dtype(jnp.float32), "bf16": jnp.dtype(jnp.bfloat16), "f16": jnp.dtype(jnp.float16)}
GPU_PLATFORMS = ("cuda", "rocm", "gpu")
"""Values of JAX_PLATFORMS."""
DECODED_TOKENS = (1, 8, 32, 128)
"""Tokens per rank while a server decodes."""
DECODED_LAYERS = 4
"""How many layers one program has then."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the bench.

    Args:
      kind: "exchange", "experts", "layer", "decode" (layers in a row, with few tokens), "link" (a copy to the
        next rank) or "train" (a step of a small language model, whose ``hidden`` is a multiple of 8).
      ranks: R.
      processes: how many processes hold the ranks; divides R.
      tokens: T, per rank; of "decode", whose operations have their own, the most.
      hidden: H.
      intermediate: I.
      experts: E.
      top_k: K.
      dtype: "f32", "bf16" or "f16".
      routing: a name in ``patterns.PATTERNS``.
      capacity_factor: as in ``MoEConfig``.
      iters: timed iterations of every call.
      warmup: iterations before them.
      seed: of the data.
      compare: the implementations; ratios are to the first one.
      memory: measure each implementation's peak memory in a run of its own.
      repeats: how often one program does the work; times are those of one.
      operations: which of the kind's operations; () for all.
      floors: some of ``FLOORS``.
      layers: of "decode", how many one program has, times being those of one; of "train", the model's.
      model_experts: of "layer", how many experts the router chooses from, of which the case's are a share
        that gets all tokens; 0 for the case's own.

    Raises:
      ConfigError: a value breaks its rule; the text names the value, the rule and the cure.
    """

    kind: str
    ranks: int = 4
    processes: int = 4
    tokens: int = 1024
    hidden: int = 1024
    intermediate: int = 1024
    experts: int = 32
    top_k: int = 4
    dtype: str = "f32"
    routing: str = "uniform"
    capacity_factor: float | None = None
    iters: int = 20
    warmup: int = 3
    seed: int = 0
    compare: tuple[str, ...] = ()
    memory: bool = False
    repeats: int = 1
    operations: tuple[str, ...] = ()
    floors: tuple[str, ...] = ()
    layers: int = 1
    model_experts: int = 0

    def __post_init__(self) -> None:
        _check_least(self)
        _check_together(self)
        self.config()  # checks what is left

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of rows and weights."""
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return self.hidden * self.numpy_dtype.itemsize

    @property
    def routed_experts(self) -> int:
        """How many experts the router chooses from."""
        return self.model_experts or self.experts

    @property
    def shape(self) -> ExchangeShape:
        """The sizes of the exchange."""
        return ExchangeShape.of(self.config(), self.ranks, self.tokens)

    def config(
        self,
        transport: str = "auto",
        experts: str = "auto",
        wire: str | None = None,
        quant: str | None = None,
        tuning: Tuning | None = None,
    ) -> MoEConfig:
        """The layer's config."""
        return MoEConfig(
            self.experts,
            self.top_k,
            self.hidden,
            self.intermediate,
            capacity_factor=self.capacity_factor,
            transport=transport,
            experts=experts,
            wire_dtype=wire,
            expert_quant=quant,
            tuning=tuning,
        )

    def to_json(self) -> str:
        """The case as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case that ``to_json`` gave."""
        fields = json.loads(text)
        return cls.of_fields(fields)

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Case:
        """The case whose fields ``dataclasses.asdict`` and JSON gave."""
        names = ("compare", "operations", "floors")
        return cls(**{**fields, **{name: tuple(fields[name]) for name in names if name in fields}})


def option(name: str) -> str:
    """The command line's option for a field."""
    return "--" + name.replace("_", "-")


_POSITIVE = (
    *("ranks", "processes", "tokens", "hidden", "intermediate", "experts", "top_k"),
    *("iters", "warmup", "repeats", "layers"),
)


def _check_least(case: Case) -> None:
    for name in _POSITIVE:
        value = getattr(case, name)
        if value < 1:
            raise ConfigError(rule(name, value, "be at least 1", f"raise {option(name)}"))


def _check_together(case: Case) -> None:
    """Fields that have rules among each other, in every kind of run."""
    if case.top_k > case.experts:
        must = f"be at most experts={case.experts}"
        raise ConfigError(rule("top_k", case.top_k, must, "lower --top-k or raise --experts"))
    if case.ranks % case.processes:
        must = f"divide ranks={case.ranks}"
        cure = "every process holds equally many ranks; use --processes 1 or as many as ranks"
        raise ConfigError(rule("processes", case.processes, must, cure))
    for name in case.floors:
        if name not in FLOORS:
            raise ConfigError(rule("floors", name, f"be some of {FLOORS}", "pick some of these"))
    if case.model_experts and case.model_experts < case.experts:
        must = f"be at least experts={case.experts}"
        raise ConfigError(rule("model_experts", case.model_experts, must, "raise --model-experts"))
    alone = [name for name in (*case.compare, *case.floors) if name in ALONE]
    if alone and case.ranks > 1:
        must = f"be 1 for {', '.join(alone)}"
        raise ConfigError(rule("ranks", case.ranks, must, "drop these or use --ranks 1"))
