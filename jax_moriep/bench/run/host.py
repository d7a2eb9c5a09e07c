"""``bench host``: one table for a whole host, of exchange, layer and training step at 1, 2, ... devices.

Starting jax and compiling costs more than measuring, so there is one set of processes for each number of
ranks, and it works through a list of cases. What fails is recorded and the rest goes on, in new processes if
one has died or hangs; each case and each set has a deadline; the file is written after each case.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_moriep import config
from jax_moriep.bench.kinds import exchange
from jax_moriep.bench.problem import patterns
from jax_moriep.bench.problem.cases import DENSE_COPY, REPEATS_ON_GPUS, Case, is_baseline
from jax_moriep.bench.problem.names import FP8, PUT
from jax_moriep.bench.run import runner
from jax_moriep.bench.run.devices import Devices, cpus, of_host
from jax_moriep.bench.run.worker import EVERYTHING, Job
from jax_moriep.errors import ConfigError, MoriepError, TransportError, rule

FORMAT = "jax-moriep bench host 2"
"""Of the result."""
ROUTINGS = ("uniform", "zipf")
KINDS = ("exchange", "layer", "train")
TRANSPORTS = ("native", "mori", "collective")
"""What is measured where it can run, unless some are named."""
_OURS = ("native", "mori")
_GRACE_SECONDS = 45
"""What a set may take beyond the moment from which it begins no case."""
_LEAST_SECONDS = 30
"""With less than this left, a set is not begun."""
_FIRST_SHARE = 0.6
"""Of the time, for the set with the most ranks."""
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
      kinds: some of ``KINDS``.
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
    kinds: tuple[str, ...] = KINDS
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
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ConfigError(rule("kinds", self.kinds, f"be some of {KINDS}", "correct --kinds"))
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
    names = transports_of(options, devices)
    # The others are there to be compared with, and XLA's passes that pack float8 for them are not theirs.
    ours = [name for name in names if name in _OURS] or names
    gpus = devices.gpus
    both = {"native": ["native", "native" + PUT]} if gpus else {}
    wires = [
        delivered + wire
        for name in names
        for delivered in both.get(name, [name])
        for wire in (("", FP8) if name in ours else ("",))
    ]
    processes = 1 if options.one_process else ranks
    most = ranks == max(ranks_of(options, devices))

    def case(kind: str, **fields: Any) -> Case:
        repeats = REPEATS_ON_GPUS[kind] if gpus else 2
        sizes = {"hidden": options.hidden, "intermediate": options.intermediate, "top_k": options.top_k}
        common = {"ranks": ranks, "processes": processes, "repeats": repeats, "dtype": "bf16", **sizes}
        made = Case(kind, **{**common, **fields})
        return _fitted(made) if kind in ("exchange", "layer") else made

    of_exchange: list[Case] = []
    for tokens in sorted(options.tokens, reverse=True):
        for routing in options.routings:
            if ranks == 1 or "exchange" not in options.kinds:
                continue
            of_exchange.append(
                case(
                    "exchange",
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
    if of_exchange:
        link = runner.link_of(of_exchange[0], options.link_mib)
        of_exchange.insert(0, dataclasses.replace(link, repeats=REPEATS_ON_GPUS["link"] if gpus else 2))
    few = max(2, options.iters // 2)
    layer = case(
        "layer",
        tokens=max(options.tokens),
        experts=options.experts_per_rank * ranks,
        iters=few,
        warmup=1,
        compare=tuple(f"{name}+{'triton' if gpus else 'blocked'}" for name in ours),
        floors=(DENSE_COPY,) if ranks == 1 else (),
    )
    model = _MODEL_ON_GPUS if gpus else _MODEL_ON_CPUS
    step = case(
        "train", tokens=options.train_tokens, compare=tuple(names), iters=few, warmup=1, top_k=2, **model
    )
    whole = [layer, step]
    # The exchange of fewer ranks is the least telling of all.
    cases = [*of_exchange, *whole] if most else [*whole, *of_exchange]
    return [made for made in cases if made.kind in (*options.kinds, "link")]


def _fitted(case: Case) -> Case:
    """With as little capacity as holds every route, so that none is dropped and few rows are padding."""
    ids, _ = exchange.routes_of(case)
    rows = np.bincount(ids.ravel() // case.shape.num_local_experts, minlength=case.ranks).max()
    share = rows / (case.tokens * case.top_k)
    return dataclasses.replace(case, capacity_factor=math.ceil(share * _CAPACITY_STEPS) / _CAPACITY_STEPS)


def path_of(folder: Path, devices: Devices, count: int, ending: str) -> Path:
    """``host-KIND-xN.ENDING``."""
    kind = re.sub(r"[^a-z0-9]+", "-", devices.kind.lower()).strip("-")
    return folder / f"host-{kind}-x{count}.{ending}"


def run(options: Options, command: str, out: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Measures, and writes the result after each case.

    Args:
      options: what.
      command: the command line, kept in the result.
      out: folder for the file.
      say: takes lines that tell how it goes.

    Returns:
      The result and its file.

    Raises:
      MoriepError: see ``devices_of``.
      ConfigError: the sizes break a rule.
    """
    deadline = time.monotonic() + 60 * options.minutes
    devices = devices_of(options)
    order = ranks_of(options, devices)
    plans = [cases_of(ranks, options, devices) for ranks in order]
    path = path_of(out, devices, max(order), "json")
    result: dict[str, Any] = {
        "format": FORMAT,
        "command": command,
        "versions": runner.versions(),
        "machine": {**runner.machine(), "device": devices.kind, "devices": devices.count},
        "options": dataclasses.asdict(options),
        "sets": [],
    }

    def save(of_set: dict[str, Any]) -> None:
        part = path.with_suffix(".part")
        part.write_text(json.dumps({**result, "sets": [*result["sets"], of_set]}, indent=1) + "\n")
        part.replace(path)

    for i, (ranks, cases) in enumerate(zip(order, plans, strict=True)):
        left = deadline - time.monotonic()
        # A set may take longer than its equal share, and leaves the rest to those behind it.
        share = left if i == len(order) - 1 else left * (_FIRST_SHARE if i == 0 else 0.75)
        if left < _LEAST_SECONDS or not cases:
            of_set = {"ranks": ranks, "seconds": 0.0, "errors": [], "not_run": True, "cases": []}
            say(f"{ranks} ranks: not run, for there is no time left or nothing to do")
        else:
            say(f"{ranks} ranks: {len(cases)} cases, at most {share + _GRACE_SECONDS:.0f} s")
            of_set = _run_set(ranks, cases, share, options, devices, say, save)
        save(of_set)
        result["sets"].append(of_set)
    return result, path


def _run_set(
    ranks: int,
    cases: list[Case],
    seconds: float,
    options: Options,
    devices: Devices,
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Runs the cases; when the processes end too early, new ones go on behind the case that ended them."""
    began = time.monotonic()
    until = began + seconds
    threads = max(1, len(os.sched_getaffinity(0)) // cases[0].processes)
    env = {"JAX_MORIEP_TIMEOUT": "60", "OPENBLAS_NUM_THREADS": str(threads)}
    env = {name: value for name, value in env.items() if name not in os.environ}
    if devices.gpus:
        env.update(runner.environment(cases))
    found: list[list[Any] | None] = []
    errors: list[str] = []

    def of_set(seen: list[list[Any] | None]) -> dict[str, Any]:
        entries = [_entry(case, of_case) for case, of_case in zip(cases, seen, strict=False)]
        return {
            "ranks": ranks,
            "processes": cases[0].processes,
            "seconds": time.monotonic() - began,
            "errors": errors,
            "not_run": False,
            "cases": entries,
        }

    def progress(line: str, seen: list[list[Any] | None]) -> None:
        say(line)
        through = next((i for i, of_case in enumerate(seen) if of_case is None), len(seen))
        save(of_set([*found, *seen[:through]]))

    while len(found) < len(cases):
        job = Job(cases[len(found) :], lenient=True, until=until, case_seconds=options.case_seconds)
        left = until + _GRACE_SECONDS - time.monotonic()
        seen, begun, error = runner.run_set(job, left, options.platform, env, progress)
        if error is not None:
            errors.append(error)
            say(f"{ranks} ranks: processes failed: {error}")
        # Without time for more, or where not even a case could begin, what was not reached is lost.
        again = error is not None and begun > 0 and until - time.monotonic() > _LEAST_SECONDS
        found += seen[:begun] if again else seen
    return of_set(found)


def _entry(case: Case, seen: Sequence[Any] | None) -> dict[str, Any]:
    """One case of the result."""
    fields = {"case": dataclasses.asdict(case), "title": case.title()}
    if seen is None:
        lost = {"name": EVERYTHING, "operation": "", "error": "its processes ended before it was through"}
        return {**fields, "calls": [], "checks": 0, "wrong": [], "failed": [lost]}
    # A case that fell over in one process only has no numbers in it.
    same = len({len(of_process["calls"]) for of_process in seen}) == 1
    calls = runner.joined(list(seen)) if same else []
    failed = [failure for of_process in seen for failure in of_process["failed"]]
    checks = [check for of_process in seen for check in of_process["checks"]]
    return {
        **fields,
        "device": seen[0]["device"],
        "seconds": max(of_process["seconds"] for of_process in seen),
        "bytes": runner.moved_bytes(case) if case.kind == "exchange" else None,
        "calls": [{key: value for key, value in call.items() if key != "spans"} for call in calls],
        "checks": len(checks),
        "wrong": [check for check in checks if not check["ok"]],
        "failed": list({(f["name"], f["operation"]): f for f in reversed(failed)}.values()),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What makes the run a failed one: wrong values, failed sets and failed entries that are no baselines."""
    lines = []
    for of_set in result["sets"]:
        for error in of_set["errors"]:
            lines.append(f"processes of {of_set['ranks']} ranks failed: {error}")
        for entry in of_set["cases"]:
            for check in entry["wrong"]:
                if not is_baseline(check["name"]):
                    lines.append(f"WRONG: {entry['title']}: {describe(check)}")
            for failure in entry["failed"]:
                if not (failure.get("not_run") or is_baseline(failure["name"])):
                    lines.append(
                        f"FAILED: {entry['title']}: {failure['name']} {failure['operation']}: "
                        f"{failure['error']}"
                    )
    return lines


def describe(check: dict[str, Any]) -> str:
    """A wrong value in a line."""
    return (
        f"{check['name']} {check['operation']}, {check['what']}: error {check['error']:.3g}, at most "
        f"{check['limit']:.3g} is right"
    )
