"""``jax-moriep bench kernels``: the GPU kernels of the experts, beside the dense matmul and beside others.

One GPU, one rank's share of a published model. Every number is taken by turns with its reference, because a
GPU that works at its power limit changes its clock from second to second; programs repeat their work on the
device; and every result of an MLP is checked in the same run, on the fullest and the emptiest expert.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jax_moriep.bench.against import dense, torch_mlp
from jax_moriep.bench.against.baselines import BASELINES
from jax_moriep.bench.against.grouped import Ready, Unavailable
from jax_moriep.bench.kinds import products
from jax_moriep.bench.kinds.kernels_result import (
    BYTES_PER_S,
    PASSES,
    check_chain,
    described,
    entry,
    estimate,
    kernels_of,
)
from jax_moriep.bench.kinds.products import FORWARD
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.measure.programs import Work, on_device
from jax_moriep.bench.measure.seconds import times_for
from jax_moriep.bench.measure.turns import Call, by_turns, in_a_row
from jax_moriep.bench.problem import formats, shares
from jax_moriep.bench.problem.shares import SHARES, SIZES, Data
from jax_moriep.errors import ConfigError, rule
from jax_moriep.runtime import compat

_COPY_BYTES = 1 << 30
_BASELINE_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Step:
    """Baselines that run on a share with one kind of sizes.

    Attributes:
      names: of the baselines.
      share: name in ``SHARES``.
      kind: of sizes.
      passes: some of ``PASSES``.
    """

    names: tuple[str, ...]
    share: str
    kind: str
    passes: tuple[str, ...] = tuple(PASSES)


_BASELINE_RUNS = (
    ("deepseek-v3-ep8-decode", "uniform"),
    ("deepseek-v3-ep8", "zipf"),
    ("deepseek-v3-ep8", "uniform"),
    ("mixtral-8x7b", "uniform"),
    ("qwen3-30b-a3b-ep8", "uniform"),
)
# The fast ones first, so that no limit of time costs them; ``ragged_dot`` takes long to compile.
STEPS = (
    *(Step(("torch", "jax_hopper"), *on) for on in _BASELINE_RUNS),
    Step(("ragged_dot",), "deepseek-v3-ep8", "uniform"),
    *(Step(("ragged_dot",), *on, ("forward",)) for on in _BASELINE_RUNS if on[1] == "uniform"),
    *(Step(("tokamax",), share, "uniform") for share in ("deepseek-v3-ep8", "mixtral-8x7b")),
)
"""What the others run on, in this order; what was measured in an earlier step is not measured again."""


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program that is being compiled, and what it will run on."""

    key: tuple[str, str]
    work: Work
    times: int


@dataclasses.dataclass(frozen=True)
class _Case:
    """A share with one kind of sizes.

    Attributes:
      run: its part of the result.
      references: by kernel or pass, the program beside which it is timed.
    """

    name: str
    kind: str
    data: Data
    act: jax.Array
    pre: jax.Array
    run: dict[str, Any]
    references: dict[str, _Program]

    @property
    def title(self) -> str:
        return f"{self.name} {self.kind}"


class Bench:
    """One run; ``result`` is what is known so far."""

    def __init__(
        self,
        rounds: int,
        say: Callable[[str], None],
        save: Callable[[dict[str, Any]], None],
        *,
        seconds: float = 0.02,
        copy_bytes: int = _COPY_BYTES,
        minutes: float = math.inf,
        dtype: str = "bf16",
    ) -> None:
        """``seconds`` is how long a program takes at each turn; see ``run`` for the others."""
        self._dtype = dtype
        self._rounds, self._say, self._save, self._seconds = rounds, say, save, seconds
        self._until = time.perf_counter() + 60 * minutes
        self._copy_bytes = copy_bytes
        self._on_gpu = jax.default_backend() == "gpu"
        self._pool = Pool()
        self._wanted: dict[tuple[str, str], concurrent.futures.Future[dict[int, shares.Wanted]]] = {}
        self._runs: dict[tuple[str, str], dict[str, Any]] = {}
        config: Any = jax.config
        self.result: dict[str, Any] = {
            "format": formats.KERNELS,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "hopper_kernels": compat.has_hopper_kernels(),
            "dtype": dtype,
            "matmul_precision": str(config.jax_default_matmul_precision),
            "limit": shares.LIMITS[dtype],
            "rounds": rounds,
            "wrong": [],
            "inaccurate": [],
            "failed": [],
            "not_run": [],
            "unavailable": {},
            "runs": [],
        }

    def measure(self, names: Sequence[str], kinds: Sequence[str], baselines: Sequence[str]) -> None:
        """Everything: the package's own first, so that no failure of another costs their numbers."""
        with contextlib.closing(self._pool):
            for name in names:
                for kind in kinds:
                    with self._guard(f"{name} {kind}"):
                        self._own(self._case(name, kind))
                    self._save(self.result)
            for step in STEPS:
                asked = [name for name in step.names if name in baselines]
                if asked and (step.share, step.kind) in self._runs:
                    with self._guard(f"{step.share} {step.kind} {', '.join(asked)}"):
                        self._others(self._case(step.share, step.kind), asked, step.passes)
                    self._save(self.result)

    @contextlib.contextmanager
    def _guard(self, title: str, entries: dict[str, Any] | None = None, key: str = "") -> Iterator[None]:
        """An error inside is recorded, also as ``entries[key]``, and ends nothing else."""
        try:
            yield
        except Exception as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}"[:2000]
            self.result["failed"].append([title, text])
            if entries is not None:
                entries[key] = {"error": text}
            self._say(f"{title}: FAILED: {text[:300]}")

    def _case(self, name: str, kind: str) -> _Case:
        share = SHARES[name]
        sizes = shares.group_sizes(share, kind)
        data = Data.of(share, sizes, capacity=shares.capacity_of(share), dtype=self._dtype)
        if (name, kind) not in self._runs:
            self._runs[name, kind] = described(name, kind, data)
            self.result["runs"].append(self._runs[name, kind])
            check = functools.partial(shares.checked_experts, data)
            self._wanted[name, kind] = self._pool.in_background(check)
        act, pre = products.of_rows(data)
        references = self._references(name, data, act, pre)
        return _Case(name, kind, data, act, pre, self._runs[name, kind], references)

    def _references(self, name: str, data: Data, act: jax.Array, pre: jax.Array) -> dict[str, _Program]:
        if data.share.decode:
            seconds = 2 * self._copy_bytes / BYTES_PER_S
            work, self.result["copy"] = dense.copy(self._copy_bytes)
            copy = self._start("any", "copy", work, seconds, alone=True)
            return dict.fromkeys([*FORWARD, "forward"], copy)
        matmuls = dense.dense(data, act, pre)
        works = {**matmuls, **{p: dense.chain([matmuls[k] for k in kernels_of(p)]) for p in PASSES}}
        return {
            label: self._start(name, f"dense {label}", work, estimate(data, label), alone=True)
            for label, work in works.items()
        }

    def _start(self, name: str, label: str, work: Work, seconds: float, *, alone: bool = False) -> _Program:
        times = times_for(seconds, self._seconds)
        self._pool.start((name, label), on_device(work.fn, work.operands, times, alone=alone))
        return _Program((name, label), work, times)

    def _call(self, title: str, label: str, program: _Program) -> Call:
        run = functools.partial(self._pool.get(program.key), *program.work.operands)
        return Call(title, label, run, repeats=program.times)

    def _own(self, case: _Case) -> None:
        """The package's kernels one by one, and the whole MLP."""
        began = time.perf_counter()
        name, data, run = case.name, case.data, case.run
        passes = {p: products.mlp(data, backward) for p, backward in PASSES.items() if p in case.references}
        works = products.kernels(data, case.act, case.pre, not self._on_gpu)
        started = {
            label: self._start(name, label, work, estimate(data, label))
            for label, work in {**works, **passes}.items()
            if label in case.references
        }
        once = {
            label: (name, label, "once") if started[label].times > 1 else (name, label) for label in passes
        }
        for label, work in passes.items():
            self._pool.start(once[label], on_device(work.fn, work.operands))
        self._pool.wait()
        concurrent.futures.wait([self._wanted[name, case.kind]])
        self._say(f"{case.title}: compiled after {time.perf_counter() - began:.0f} s")
        for label, program in started.items():
            entries, key = (run["mlp"], f"triton {label}") if label in PASSES else (run["kernels"], label)
            with self._guard(f"{case.title} {key}", entries, key):
                if label in PASSES:
                    result = self._pool.get(once[label])(*program.work.operands)
                    self._check(case, key, result)
                    del result
                calls = [
                    self._call("reference", label, case.references[label]),
                    self._call(key, label, program),
                ]
                seconds = by_turns(calls, self._rounds)
                entries[key] = entry(data, label, seconds[key], seconds["reference"], self._copy_bytes)
                self._say_entry(f"{case.title} {key}", entries[key])
                if label in PASSES and self._on_gpu:
                    check_chain(run, label, entries[key])
        run["seconds"] = time.perf_counter() - began

    def _others(self, case: _Case, baselines: Sequence[str], passes: Sequence[str]) -> None:
        """Some other implementations, by turns with the package's and the reference."""
        compact = case.data.compact()
        own = {
            p: self._start(case.name, p, products.mlp(case.data, backward), estimate(case.data, p))
            for p, backward in PASSES.items()
            if p in case.references and p in passes
        }
        for baseline in baselines:
            began = time.perf_counter()
            entries: dict[str, Any] = case.run["baselines"].setdefault(baseline, {})
            new = {label: program for label, program in own.items() if label not in entries}
            if not new:
                continue
            if began > self._until:
                self.result["not_run"].append([f"{case.title} {baseline}", "no time was left"])
                self._say(f"{case.title} {baseline}: not run, for no time was left")
                continue
            with self._guard(f"{case.title} {baseline}", case.run["baselines"], baseline):
                try:
                    ready = BASELINES[baseline](case.name, case.data, compact, self._pool)
                except Unavailable as error:
                    entries["unavailable"] = self.result["unavailable"][baseline] = str(error)
                    self._say(f"{case.title} {baseline}: cannot run: {error}")
                    continue
                entries["settings"] = ready.settings
                for label, program in new.items():
                    with self._guard(f"{case.title} {baseline} {label}", entries, label):
                        self._other(case, ready, baseline, label, program, entries)
                entries["seconds"] = entries.get("seconds", 0.0) + time.perf_counter() - began
                del ready
                if baseline == "torch":
                    torch_mlp.release()
            self._save(self.result)

    def _other(
        self,
        case: _Case,
        ready: Ready,
        baseline: str,
        label: str,
        own: _Program,
        entries: dict[str, Any],
    ) -> None:
        backward, title = PASSES[label], f"{baseline} {label}"
        inaccurate = self._check(case, title, ready.results(ready.run(backward)), others=True)
        times = times_for(in_a_row(lambda: ready.run(backward), 1), self._seconds)
        rounds = min(self._rounds, _BASELINE_ROUNDS)
        calls = [
            self._call("reference", label, case.references[label]),
            self._call("own", label, own),
            Call(title, label, ready.repeated(backward, times), repeats=times),
        ]
        seconds = by_turns(calls, rounds)
        found: dict[str, Any] = entry(
            case.data, label, seconds[title], seconds["reference"], self._copy_bytes, compact=True
        )
        found["rounds"] = rounds
        found["own_ms"] = statistics.median(seconds["own"]) * 1e3
        found["own_times_faster"] = found["ms"] / found["own_ms"]
        self._say_entry(f"{case.title} {title}", found)
        entries[label] = {**found, "inaccurate": inaccurate}

    def _check(
        self, case: _Case, title: str, results: Sequence[jax.Array], *, others: bool = False
    ) -> list[str]:
        """Notes the errors, and gives the names of those over the limit; ``others`` have no padding."""
        wanted = self._wanted[case.name, case.kind].result()
        found = shares.errors(case.data, wanted, results, compact=others)
        case.run["errors"][title] = found
        over = shares.wrong(found, self._dtype)
        said = "inaccurate" if others else "wrong"
        self.result[said] += [[case.title, title, what, found[what]] for what in over]
        text = ", ".join(f"{k} {v:.1e}" for k, v in found.items())
        self._say(f"{case.title} {title}: errors {text}" + (f": {said}: {', '.join(over)}" if over else ""))
        return over

    def _say_entry(self, title: str, found: dict[str, Any]) -> None:
        self._say(f"{title}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to measure.

    Args:
      names: names in ``SHARES``.
      kinds: names in ``SIZES``.
      rounds: turns of each pair; a baseline has three at most.
      baselines: names in ``BASELINES``; they run as ``STEPS`` says.
      minutes: after which no baseline begins.
      dtype: of rows and weights, a name in ``shares.LIMITS``. Products of f32 have the precision that
        ``jax.default_matmul_precision`` says, those of the dense matmuls too.

    Raises:
      ConfigError: a name is unknown, there are no rounds, or others are to multiply f32.
    """

    names: Sequence[str]
    kinds: Sequence[str]
    rounds: int
    baselines: Sequence[str]
    minutes: float = math.inf
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for option, value, known in (
            ("shares", self.names, SHARES),
            ("sizes", self.kinds, SIZES),
            ("baselines", self.baselines, BASELINES),
            ("dtype", [self.dtype], shares.LIMITS),
        ):
            if set(value) - set(known):
                must = f"be some of {tuple(known)}"
                raise ConfigError(rule(option, list(value), must, "pick some of these"))
        if self.rounds < 1:
            raise ConfigError(rule("rounds", self.rounds, "be at least 1", "pass a positive number"))
        if self.baselines and self.dtype != "bf16":
            must = "be none but with dtype bf16, which is all that others take"
            raise ConfigError(rule("baselines", list(self.baselines), must, "pass --baselines none"))


def run(asked: Asked, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures; see ``Study``.

    A rate counts the real rows' FLOPs only. ``of_dense`` is the rate over that of the dense matmul of the
    same shape, for a pass over that of the chain of these; ``of_padded`` counts the rows that are computed,
    runs rounded up to blocks. ``of_copy``, for few rows, is the bytes of the used experts' weights per second
    over the bytes that an elementwise pass reads and writes per second.

    Returns:
      A JSON-able dict; ``wrong`` lists the package's results whose error is over the limit, ``inaccurate``
      those of baselines, ``failed`` what ended with an error, ``not_run`` the baselines for which no time was
      left, ``unavailable`` those that are not installed or do not run here.

    Raises:
      ConfigError: there is no GPU.
    """
    if jax.default_backend() != "gpu":
        raise ConfigError(rule("platform", jax.default_backend(), "be a GPU", "run it on one"))
    bench = Bench(asked.rounds, say, save, minutes=asked.minutes, dtype=asked.dtype)
    bench.measure(asked.names, asked.kinds, asked.baselines)
    return bench.result
