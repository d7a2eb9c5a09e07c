"""What ``bench host`` measures: its options, the numbers of ranks, and the cases of each of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jax_moriep import config
from jax_moriep.bench.kinds.exchange import routes_of
from jax_moriep.bench.kinds.table import KINDS, new_case
from jax_moriep.bench.problem import patterns
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import DENSE_COPY, FP8, PUT
from jax_moriep.bench.run.devices import Devices, cpus, of_host
from jax_moriep.bench.run.runner import link_of
from jax_moriep.errors import ConfigError, MoriepError, TransportError, rule

ROUTINGS = ("uniform", "zipf")
HOST_KINDS = ("exchange", "layer", "train")
TRANSPORTS = ("native", "mori", "collective")
"""What is measured where it can run, unless some are named."""
_OURS = ("native", "mori")
_CAPACITY_STEPS = 64
_MODEL_ON_GPUS = {"hidden": 1024, "intermediate": 4096, "experts": 16, "layers": 8}
"""Of the training step, which is not bound by its launches: 1.6e9 weights of experts."""
_MODEL_ON_CPUS = {"hidden": 128, "intermediate": 128, "experts": 8, "layers": 4, "dtype": "f32"}
"""The demo's."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
      ranks: how many ranks, one set of processes each; () for 1, 2, 4, ... and all devices.
      tokens: per rank, of the exchange; the layer has the most of them.
      routings: of the exchange, names in ``patterns.PATTERNS``.
      hidden: H.
      intermediate: I.
      experts: E of the exchange.
      experts_per_rank: L of the layer.
      top_k: K.
      train_tokens: per rank, of a training step.
      link_mib: bytes of the link's measure, in MiB.
      iters: timed iterations.
      one_process: one process holds all devices of a set, instead of one each.
      kinds: some of ``HOST_KINDS``.
      transports: which to measure; () for those of ``TRANSPORTS`` that can run.
      minutes: after which no further case begins.
      case_seconds: after which a case counts as hanging; on GPUs one takes a third of it, compiling included.
      platform: value for JAX_PLATFORMS; None leaves it as it is.
    """

    ranks: tuple[int, ...] = ()
    tokens: tuple[int, ...] = (128, 1024, 4096)
    routings: tuple[str, ...] = ROUTINGS
    hidden: int = 7168
    intermediate: int = 2048
    experts: int = 256
    experts_per_rank: int = 32
    top_k: int = 8
    train_tokens: int = 8192
    link_mib: int = 256
    iters: int = 10
    one_process: bool = False
    kinds: tuple[str, ...] = HOST_KINDS
    transports: tuple[str, ...] = ()
    minutes: float = 9.0
    case_seconds: float = 120.0
    platform: str | None = None

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens"):
            if any(value < 1 for value in getattr(self, name)):
                raise ConfigError(
                    rule(name, getattr(self, name), "be positive numbers", f"correct --{name}, as in 1,2,4")
                )
        if not self.kinds or set(self.kinds) - set(HOST_KINDS):
            raise ConfigError(rule("kinds", self.kinds, f"be some of {HOST_KINDS}", "correct --kinds"))
        if set(self.transports) - set(config.TRANSPORTS):
            raise ConfigError(
                rule("transports", self.transports, f"be some of {config.TRANSPORTS}", "correct --transports")
            )
        if not self.routings or set(self.routings) - set(patterns.PATTERNS):
            raise ConfigError(
                rule(
                    "routings", self.routings, f"be some of {tuple(patterns.PATTERNS)}", "correct --routings"
                )
            )
        if not self.tokens:
            raise ConfigError(
                rule("tokens", self.tokens, "have at least one number", "pass --tokens 128,4096")
            )


def devices_of(options: Options) -> Devices:
    """The host's devices.

    Raises:
      MoriepError: jax cannot start there, or has fewer devices than asked for.
      TransportError: a transport that is named cannot run there.
    """
    if options.platform == "cpu":
        found = cpus(max(options.ranks, default=2))
    else:
        found = of_host(options.platform, options.one_process)
    if found.gpus and max(options.ranks, default=1) > found.count:
        raise MoriepError(
            rule(
                "ranks", options.ranks, f"be at most the {found.count} devices of this host", "lower --ranks"
            )
        )
    for name in options.transports:
        if (why := found.reasons[name]) is not None:
            raise TransportError(f"transport={name!r} cannot run here: {why}")
    return found


def ranks_of(options: Options, devices: Devices) -> list[int]:
    """The sets, the most telling first: all devices, then one, then those between."""
    asked = options.ranks or tuple(
        sorted({*(1 << i for i in range(devices.count.bit_length())), devices.count})
    )
    most, *others = sorted(set(asked), reverse=True)
    return [most, *sorted(others)]


def transports_of(options: Options, devices: Devices) -> list[str]:
    """The transports that are measured, the one that others are compared with first."""
    return [name for name in options.transports or TRANSPORTS if devices.reasons[name] is None]


def cases_of(ranks: int, options: Options, devices: Devices) -> list[Case]:
    """What one set of processes works through."""
    most = ranks == max(ranks_of(options, devices))
    exchanges = _exchanges(ranks, options, devices) if ranks > 1 and "exchange" in options.kinds else []
    whole = [
        make(ranks, options, devices)
        for kind, make in (("layer", _layer), ("train", _step))
        if kind in options.kinds
    ]
    # The exchange of fewer ranks is the least telling of all.
    return [*exchanges, *whole] if most else [*whole, *exchanges]


def _exchanges(ranks: int, options: Options, devices: Devices) -> list[Case]:
    """The measure of the links, and an exchange for each number of tokens and routing."""
    ours = _ours(options, devices)
    both = {"native": ["native", "native" + PUT]} if devices.gpus else {}
    wires = [
        delivered + wire
        for name in transports_of(options, devices)
        for delivered in both.get(name, [name])
        for wire in (("", FP8) if name in ours else ("",))
    ]
    cases = [
        _fitted(
            _case(
                "exchange",
                ranks,
                options,
                devices,
                tokens=tokens,
                experts=options.experts,
                routing=routing,
                iters=options.iters,
                warmup=2,
                compare=tuple(wires),
                operations=("dispatch", "combine"),
                floors=("nccl",),
            )
        )
        for tokens in sorted(options.tokens, reverse=True)
        for routing in options.routings
    ]
    link = link_of(cases[0], options.link_mib)
    return [dataclasses.replace(link, repeats=_repeats("link", devices)), *cases]


def _layer(ranks: int, options: Options, devices: Devices) -> Case:
    experts = "triton" if devices.gpus else "blocked"
    case = _case(
        "layer",
        ranks,
        options,
        devices,
        tokens=max(options.tokens),
        experts=options.experts_per_rank * ranks,
        iters=_few(options),
        warmup=1,
        compare=tuple(f"{name}+{experts}" for name in _ours(options, devices)),
        floors=(DENSE_COPY,) if ranks == 1 else (),
    )
    return _fitted(case)


def _step(ranks: int, options: Options, devices: Devices) -> Case:
    """A training step."""
    names = tuple(transports_of(options, devices))
    fields = {"tokens": options.train_tokens, "compare": names, "iters": _few(options), "warmup": 1}
    model = _MODEL_ON_GPUS if devices.gpus else _MODEL_ON_CPUS
    return _case("train", ranks, options, devices, **{**fields, "top_k": 2, **model})


def _case(kind: str, ranks: int, options: Options, devices: Devices, **fields: Any) -> Case:
    common = {
        "ranks": ranks,
        "processes": 1 if options.one_process else ranks,
        "repeats": _repeats(kind, devices),
        "dtype": "bf16",
        "hidden": options.hidden,
        "intermediate": options.intermediate,
        "top_k": options.top_k,
    }
    return new_case(kind, **{**common, **fields})


def _repeats(kind: str, devices: Devices) -> int:
    return KINDS[kind].repeats_on_gpus if devices.gpus else 2


def _few(options: Options) -> int:
    """Iterations of what is long."""
    return max(2, options.iters // 2)


def _ours(options: Options, devices: Devices) -> list[str]:
    """Those of the package's own transports that are measured, all if there are none of these.

    The others are there to be compared with, and XLA's passes that pack float8 for them are not theirs.
    """
    names = transports_of(options, devices)
    return [name for name in names if name in _OURS] or names


def _fitted(case: Case) -> Case:
    """With as little capacity as holds every route, so that none is dropped and few rows are padding."""
    ids, _ = routes_of(case)
    rows = np.bincount(ids.ravel() // case.shape.num_local_experts, minlength=case.ranks).max()
    share = rows / (case.tokens * case.top_k)
    return dataclasses.replace(case, capacity_factor=math.ceil(share * _CAPACITY_STEPS) / _CAPACITY_STEPS)
