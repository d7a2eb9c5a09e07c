"""What ``bench floor`` measures: models' layers on one GPU, each beside its floor and others'."""

from __future__ import annotations

import dataclasses
import math

from jax_moriep.bench.kinds.route import ROUTE
from jax_moriep.bench.kinds.table import new_case
from jax_moriep.bench.problem.cases import DECODED_TOKENS, Case
from jax_moriep.bench.problem.names import (
    DENSE_COPY,
    DENSE_COPY_READ,
    READ,
    TOKAMAX,
    TORCH,
)
from jax_moriep.errors import ConfigError, rule

OURS = "native+triton"
PARTS = ("layer", "route", "decode", "train", "kernels")
"""What is measured, in this order."""
_SIZES = {
    "deepseek-v3": {"hidden": 7168, "intermediate": 2048, "experts": 32, "top_k": 8},
    "qwen3-30b-a3b": {"hidden": 2048, "intermediate": 768, "experts": 128, "top_k": 8},
    "mixtral-8x7b": {"hidden": 4096, "intermediate": 14336, "experts": 8, "top_k": 2},
}
"""Of layers: DeepSeek-V3's is the share of one of eight ranks, the others are whole."""
_TRAINED = {"hidden": 1024, "intermediate": 4096, "experts": 16, "layers": 8, "top_k": 2, "tokens": 8192}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A run of ``bench kernels`` without baselines: its shares, sizes and dtype."""

    shares: tuple[str, ...]
    sizes: str = "random"
    dtype: str = "bf16"

    @property
    def argv(self) -> list[str]:
        """Options of the command line."""
        given = {"shares": ",".join(self.shares), "sizes": self.sizes, "dtype": self.dtype}
        given |= {"baselines": "none", "rounds": "5"}
        return [word for name, value in given.items() for word in (f"--{name}", value)]


KERNELS = (
    Kernels(("deepseek-v3-ep8", "deepseek-v3-ep8-t1024", "gpt-oss-120b-ep4", "qwen3-30b-a3b")),
    Kernels(("qwen3-30b-a3b-ep8",), dtype="f32"),
    Kernels(("mixtral-8x7b", "deepseek-v3-ep8-decode")),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
      parts: some of ``PARTS``.
      minutes: after which no further case begins.
      case_seconds: after which a case counts as hanging.
      platform: value for JAX_PLATFORMS; None leaves it as it is.

    Raises:
      ConfigError: a name is unknown, or there is no time.
    """

    parts: tuple[str, ...] = PARTS
    minutes: float = 8.0
    case_seconds: float = 150.0
    platform: str | None = None

    def __post_init__(self) -> None:
        if not self.parts or set(self.parts) - set(PARTS):
            raise ConfigError(rule("parts", self.parts, f"be some of {PARTS}", "correct --parts"))
        if not 0 < self.minutes < math.inf:
            raise ConfigError(rule("minutes", self.minutes, "be a positive number", "correct --minutes"))


def cases_of(options: Options) -> list[Case]:
    """The cases of all parts but "kernels"; those whose rows have aims come first."""
    made = [
        _layer("deepseek-v3", (OURS, TORCH, "plain_hopper", TOKAMAX), (DENSE_COPY,), model_experts=256),
        _layer("qwen3-30b-a3b", (OURS, TORCH, "plain_hopper", TOKAMAX), (DENSE_COPY, DENSE_COPY_READ)),
        _one("route", compare=(ROUTE,), tokens=4096, hidden=7168, experts=256, top_k=8, repeats=20),
        _decoding("qwen3-30b-a3b", 4),
        # Weights of two layers are more than any cache holds.
        _decoding("deepseek-v3", 2),
        _one("train", compare=("native",), iters=5, warmup=1, repeats=5, **_TRAINED),
        _layer("deepseek-v3", (OURS, TORCH), (DENSE_COPY,), model_experts=256, routing="zipf"),
        _layer("mixtral-8x7b", (OURS, TORCH, "plain_hopper"), (DENSE_COPY,)),
    ]
    return [case for case in made if case.kind in options.parts]


def kernels_of(options: Options) -> tuple[Kernels, ...]:
    """The runs of ``bench kernels``."""
    return KERNELS if "kernels" in options.parts else ()


def model_of(case: Case) -> str:
    """The model whose sizes a case has; "" if it has none's."""
    fields = dataclasses.asdict(case)
    return next((name for name, sizes in _SIZES.items() if sizes.items() <= fields.items()), "")


def _layer(model: str, compare: tuple[str, ...], floors: tuple[str, ...], **fields: object) -> Case:
    # Short layers are repeated more often, so that the host's part of a call is as small.
    repeats = 10 if model == "qwen3-30b-a3b" else 3
    given = {"tokens": 4096, "iters": 5, "warmup": 1, "repeats": repeats, **_SIZES[model], **fields}
    return _one("layer", compare=compare, floors=floors, **given)


def _decoding(model: str, layers: int) -> Case:
    operations = tuple(f"T={count}" for count in DECODED_TOKENS)
    return _one(
        "decode",
        compare=(OURS,),
        floors=(READ,),
        operations=operations,
        tokens=max(DECODED_TOKENS),
        layers=layers,
        repeats=10,
        **_SIZES[model],
    )


def _one(kind: str, **fields: object) -> Case:
    """A case of one rank."""
    return new_case(kind, ranks=1, processes=1, dtype="bf16", **fields)
