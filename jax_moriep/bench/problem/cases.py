"""What one run of the bench measures: its sizes, its implementations, and the options for them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep.bench.problem import patterns
from jax_moriep.bench.problem.names import EXCHANGES, FP8, transport_of
from jax_moriep.config import SCHEMES, TRANSPORTS, MoEConfig
from jax_moriep.errors import ConfigError, rule
from jax_moriep.plan import ExchangeShape
from jax_moriep.tuning_options import Tuning

DTYPES = {"f32": jnp.dtype(jnp.float32), "bf16": jnp.dtype(jnp.bfloat16), "f16": jnp.dtype(jnp.float16)}

EXPERTS = ("blocked", "triton", "reference", "ragged_dot")
PLAIN = ("plain", "plain_hopper")
"""Layers written without this package, for one rank."""
DENSE_COPY = "dense+copy"
"""Floor under the layer of one rank: dense products of its FLOPs, and copies of the bytes that must move."""
_PAIRS = tuple(f"{transport}+{experts}" for transport in TRANSPORTS for experts in EXPERTS)
_QUANTISED = tuple(
    f"{pair}-{scheme}" for pair in _PAIRS if not pair.endswith("ragged_dot") for scheme in SCHEMES
)
FLOORS = ("memcpy", "nccl", "copy", DENSE_COPY)
"""What no implementation can be faster than, or hardly."""
COMPARABLE = {
    "exchange": EXCHANGES,
    "experts": (*EXPERTS, "dense"),
    "layer": (*_PAIRS, *PLAIN),
    "decode": (*_PAIRS, *_QUANTISED, *PLAIN),
    "link": ("ppermute",),
    "train": TRANSPORTS,
}
"""What each kind of run can compare."""
COMPARED = {
    "exchange": ("native", "collective"),
    "experts": ("blocked", "ragged_dot", "dense"),
    "layer": ("native+blocked", "collective+ragged_dot"),
    "decode": ("native+blocked", "collective+ragged_dot"),
    "link": ("ppermute",),
    "train": ("native", "collective"),
}
"""What each kind of run compares unless told otherwise."""
_ON_GPUS = ("native+triton", "collective+triton")
COMPARED_ON_GPUS = {**COMPARED, "layer": _ON_GPUS, "decode": _ON_GPUS}
"""The same on GPUs."""
ITERATIONS = {
    "exchange": (20, 3),
    "experts": (7, 1),
    "layer": (7, 1),
    "decode": (20, 2),
    "link": (10, 2),
    "train": (5, 1),
}
"""Timed iterations and those before them, unless told otherwise; ``ragged_dot`` takes many seconds."""
REPEATS_ON_GPUS = {"exchange": 20, "experts": 1, "layer": 3, "decode": 5, "link": 5, "train": 5}
"""How often one program does the work there, unless told otherwise; its start is paid once for all."""
DECODED_TOKENS = (1, 8, 32, 128)
"""Tokens per rank while a server decodes."""
DECODED_LAYERS = 4
"""How many layers one program has then."""
GPU_PLATFORMS = ("cuda", "rocm", "gpu")


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
        if self.kind == "experts" and self.repeats > 1:
            raise ConfigError(
                rule(
                    "repeats",
                    self.repeats,
                    "be 1 for experts",
                    "leave out --repeats; `bench kernels` repeats",
                )
            )
        if self.kind not in ("decode", "train") and self.layers > 1:
            raise ConfigError(
                rule(
                    "layers", self.layers, "be 1 but for decoding", "add --phase decode or leave out --layers"
                )
            )
        if self.kind == "train" and self.hidden % 8:
            raise ConfigError(
                rule("hidden", self.hidden, "be a multiple of 8 in training", "four heads of pairs need it")
            )
        if self.kind in ("layer", "decode") and self.hidden < self.experts:
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
        for name in self.floors:
            if name not in FLOORS:
                raise ConfigError(rule("floors", name, f"be some of {FLOORS}", "pick some of these"))
        alone = [name for name in (*self.compare, *self.floors) if name in (*PLAIN, "copy", DENSE_COPY)]
        if alone and self.ranks > 1:
            raise ConfigError(
                rule("ranks", self.ranks, f"be 1 for {', '.join(alone)}", "drop these or use --ranks 1")
            )
        self.config()  # checks what is left

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of rows and weights."""
        return DTYPES[self.dtype]

    @property
    def transports(self) -> tuple[str, ...]:
        """Those that are compared, whatever they are joined with."""
        if self.kind == "experts":
            return ()
        names = [transport_of(name).split("+")[0] for name in self.compare]
        return tuple(dict.fromkeys(name for name in names if name in TRANSPORTS))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return self.hidden * self.numpy_dtype.itemsize

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

    def title(self) -> str:
        """One line that names the run."""
        sizes = f"{self.layers} layers, " if self.kind in ("decode", "train") else ""
        sizes += f"H={self.hidden} " if self.kind == "decode" else f"T={self.tokens} H={self.hidden} "
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
        return cls.of_fields(fields)

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Case:
        """The case whose fields ``dataclasses.asdict`` and JSON gave."""
        names = ("compare", "operations", "floors")
        return cls(**{**fields, **{name: tuple(fields[name]) for name in names if name in fields}})


def pair_of(name: str) -> tuple[str, str, str | None]:
    """The transport, the experts and the scheme of a layer's name, such as "native+blocked-fp8_block"."""
    transport, experts = name.split("+")
    scheme = next((scheme for scheme in SCHEMES if experts.endswith(f"-{scheme}")), None)
    return transport, experts.removesuffix(f"-{scheme}"), scheme


def is_baseline(name: str) -> bool:
    """Whether a name is of something that others have made: its errors are not the package's."""
    return name in (*PLAIN, *FLOORS, "ppermute")


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
    "repeats": 1,
    "layers": 1,
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
    decoding = ", with --phase decode 1, 8, 32 and 128" if kind == "layer" else ""
    parser.add_argument(
        "--tokens", type=int, help=f"T, tokens per rank (default: {defaults['tokens']}{decoding})"
    )
    number("hidden", "H, width of a token")
    number("intermediate", "I, width inside an expert")
    number("experts", "E, experts in all")
    number("top_k", "K, experts per token")
    parser.add_argument("--dtype", choices=DTYPES, default=defaults["dtype"], help="default: f32")
    parser.add_argument(
        "--routing", choices=patterns.PATTERNS, default=defaults["routing"], help="default: uniform"
    )
    number("capacity_factor", "rows reserved on a rank, in units of T*K; None is the exact bound", float)
    iters, warmup = ITERATIONS[kind]
    parser.add_argument("--iters", type=int, help=f"timed iterations of every call (default: {iters})")
    parser.add_argument("--warmup", type=int, help=f"iterations before them (default: {warmup})")
    number("seed", "of the data")
    parser.add_argument(
        "--repeats",
        type=int,
        help="how often one program does the work, so that its start is paid once for all (default: 1, with "
        f"--platform cuda or rocm {REPEATS_ON_GPUS[kind]})",
    )
    parser.add_argument(
        "--compare",
        *(["--transports"] if kind == "exchange" else []),
        type=lambda text: tuple(text.split(",")),
        default=(),
        metavar="A,B,...",
        help=f"what to compare, ratios being to the first one (default: {','.join(COMPARED[kind])}; "
        f"there are: {', '.join(COMPARABLE[kind])})",
    )
    if kind == "layer":
        parser.add_argument(
            "--phase", choices=("decode",), help="few tokens, forward, through several layers of one program"
        )
        parser.add_argument(
            "--layers", type=int, help=f"of one program, with --phase decode (default: {DECODED_LAYERS})"
        )
        parser.add_argument(
            "--quant",
            choices=SCHEMES,
            help="with --phase decode: compare each of them with its experts quantised as well",
        )
    if kind == "exchange":
        parser.add_argument(
            "--wire", choices=("fp8",), help="compare each of them with float8 on the wire as well"
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
    on_gpus = getattr(args, "platform", None) in GPU_PLATFORMS
    quant = getattr(args, "quant", None)
    if getattr(args, "phase", None) == "decode":
        kind = "decode"
    elif quant is not None:
        raise ConfigError(rule("quant", quant, "come with --phase decode", "add it, or leave out --quant"))
    taken_apart = ("kind", "operations", "floors")
    given = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(Case)
        if field.name not in taken_apart and getattr(args, field.name, None) is not None
    }
    ranks = max(1, given["ranks"])
    iters, warmup = ITERATIONS[kind]
    repeats = REPEATS_ON_GPUS[kind] if on_gpus else 1
    given = {"processes": ranks, "iters": iters, "warmup": warmup, "repeats": repeats, **given}
    floors: tuple[str, ...] = ()
    if kind == "exchange":
        floors = ("memcpy",) if not on_gpus else ("nccl",) if ranks > 1 else ("copy",)
    if kind == "layer" and on_gpus and ranks == 1:
        floors = (DENSE_COPY,)
    if kind == "decode":
        floors = ("copy",) if on_gpus and ranks == 1 else ()
        tokens = DECODED_TOKENS if args.tokens is None else (args.tokens,)
        operations = tuple(f"T={count}" for count in tokens)
        given = {"layers": DECODED_LAYERS, **given, "tokens": max(tokens), "operations": operations}
    if not given["compare"]:
        plain = PLAIN if floors == (DENSE_COPY,) else PLAIN[:1] if kind == "decode" and floors else ()
        given["compare"] = (COMPARED_ON_GPUS if on_gpus else COMPARED)[kind] + plain
    if getattr(args, "wire", None) == "fp8":
        given["compare"] += tuple(name + FP8 for name in given["compare"] if not name.endswith(FP8))
    if quant is not None:
        names = [f"{name}-{quant}" for name in given["compare"]]
        given["compare"] += tuple(name for name in names if name in COMPARABLE[kind])
    return Case(kind, floors=floors, **given)
