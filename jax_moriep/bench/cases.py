"""What one run of the bench measures: its sizes, its implementations, and the options for them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep.bench import patterns
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, rule
from jax_moriep.plan import ExchangeShape

DTYPES = {"f32": jnp.dtype(jnp.float32), "bf16": jnp.dtype(jnp.bfloat16), "f16": jnp.dtype(jnp.float16)}

TRANSPORTS = ("native", "collective", "reference")
EXPERTS = ("blocked", "reference", "ragged_dot")
COMPARABLE = {
    "exchange": TRANSPORTS,
    "experts": (*EXPERTS, "dense"),
    "layer": tuple(f"{transport}+{experts}" for transport in TRANSPORTS for experts in EXPERTS),
}
"""What each kind of run can compare."""
COMPARED = {
    "exchange": ("native", "collective"),
    "experts": ("blocked", "ragged_dot", "dense"),
    "layer": ("native+blocked", "collective+ragged_dot"),
}
"""What each kind of run compares unless told otherwise."""
ITERATIONS = {"exchange": (20, 3), "experts": (7, 1), "layer": (7, 1)}
"""Timed iterations and those before them, unless told otherwise; one of ``ragged_dot`` takes many seconds."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of the bench.

    Args:
      kind: "exchange", "experts" or "layer".
      ranks: R.
      processes: how many processes hold the ranks; divides R.
      tokens: T, per rank.
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

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(
                    rule(name, getattr(self, name), f"be at least {least}", f"raise {_option(name)}")
                )
        if self.top_k > self.experts:
            raise ConfigError(
                rule(
                    "top_k",
                    self.top_k,
                    f"be at most experts={self.experts}",
                    "lower --top-k or raise --experts",
                )
            )
        if self.ranks % self.processes:
            raise ConfigError(
                rule(
                    "processes",
                    self.processes,
                    f"divide ranks={self.ranks}",
                    "every process holds equally many ranks; use --processes 1 or as many as ranks",
                )
            )
        if self.kind == "layer" and self.hidden < self.experts:
            raise ConfigError(
                rule(
                    "hidden",
                    self.hidden,
                    f"be at least experts={self.experts}",
                    "the tokens carry their router logits in their first columns; raise --hidden",
                )
            )
        if not self.compare:
            object.__setattr__(self, "compare", COMPARED[self.kind])
        for name in self.compare:
            if name not in COMPARABLE[self.kind]:
                raise ConfigError(
                    rule("compare", name, f"be one of {COMPARABLE[self.kind]}", "pick some of these")
                )
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
    def shape(self) -> ExchangeShape:
        """The sizes of the exchange."""
        return ExchangeShape.of(self.config(), self.ranks, self.tokens)

    def config(self, transport: str = "auto", experts: str = "auto") -> MoEConfig:
        """The layer's config."""
        return MoEConfig(
            self.experts,
            self.top_k,
            self.hidden,
            self.intermediate,
            capacity_factor=self.capacity_factor,
            transport=transport,
            experts=experts,
        )

    def title(self) -> str:
        """One line that names the run."""
        sizes = f"T={self.tokens} H={self.hidden} "
        if self.kind != "exchange":
            sizes += f"I={self.intermediate} "
        return (
            f"{self.kind}: {sizes}E={self.experts} K={self.top_k} {self.dtype}, {self.routing} routing, "
            f"{self.ranks} ranks in {self.processes} process{'es' if self.processes > 1 else ''}"
        )

    def to_json(self) -> str:
        """The case as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case that ``to_json`` gave."""
        fields = json.loads(text)
        return cls(**{**fields, "compare": tuple(fields["compare"])})


_LEAST = {
    "ranks": 1,
    "processes": 1,
    "tokens": 1,
    "hidden": 1,
    "intermediate": 1,
    "experts": 1,
    "top_k": 1,
    "iters": 1,
    "warmup": 1,
}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser, kind: str) -> None:
    """Adds the options of one kind of run."""
    defaults = {field.name: field.default for field in dataclasses.fields(Case)}

    def number(name: str, text: str, kind: Any = int) -> None:
        parser.add_argument(
            _option(name), type=kind, default=defaults[name], help=f"{text} (default: {defaults[name]})"
        )

    number("ranks", "R, devices that share the experts")
    parser.add_argument(
        "--processes", type=int, help="processes that hold the ranks (default: one for each rank)"
    )
    number("tokens", "T, tokens per rank")
    number("hidden", "H, width of a token")
    number("intermediate", "I, width inside an expert")
    number("experts", "E, experts in all")
    number("top_k", "K, experts per token")
    parser.add_argument("--dtype", choices=DTYPES, default=defaults["dtype"], help="default: f32")
    parser.add_argument(
        "--routing", choices=patterns.PATTERNS, default=defaults["routing"], help="default: uniform"
    )
    number("capacity_factor", "rows reserved on a rank, in units of T*K; None is the exact bound", float)
    defaults["iters"], defaults["warmup"] = ITERATIONS[kind]
    number("iters", "timed iterations of every call")
    number("warmup", "iterations before them")
    number("seed", "of the data")
    parser.add_argument(
        "--compare",
        *(["--transports"] if kind == "exchange" else []),
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="A,B,...",
        help=f"what to compare, ratios being to the first one (default: {','.join(COMPARED[kind])}; "
        f"there are: {', '.join(COMPARABLE[kind])})",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure peak memory too, each implementation in a run of its own",
    )


def of_arguments(kind: str, args: argparse.Namespace) -> Case:
    """The case that parsed options describe.

    Raises:
      ConfigError: an option breaks its rule.
    """
    given = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(Case) if field.name != "kind"
    }
    if given["processes"] is None:
        given["processes"] = max(1, given["ranks"])
    return Case(kind, **given)
