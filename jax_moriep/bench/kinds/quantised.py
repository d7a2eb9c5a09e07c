"""``jax-moriep bench kernels --quant``: experts under a scheme, beside bf16 and torch's grouped float8.

All by turns in one run. Results are checked in it: some rows and columns of the fullest expert, in float64,
of values that NumPy rounds to codes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jax_moriep.bench.against import dense, torch_float8
from jax_moriep.bench.kinds import products
from jax_moriep.bench.kinds.quantised_work import kernels, of_codes, of_master, quantised
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.measure.programs import Work, on_device
from jax_moriep.bench.measure.seconds import milliseconds, times_for
from jax_moriep.bench.measure.turns import Call, by_turns
from jax_moriep.bench.problem import shares
from jax_moriep.bench.problem.quantised_oracle import LIMIT, forward_errors, gradient_errors
from jax_moriep.bench.problem.shares import Data, Share
from jax_moriep.plan import default_block
from jax_moriep.runtime import compat

DECODE_TOKENS, DECODE_CHOICES = (8, 32, 128), 8
_COPY_BYTES = 1 << 30
_OTHERS_TIMES = 8
"""How often torch's product is run in a call."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What is timed as ``label``, beside ``reference``; the work and the bytes that it cannot do without."""

    label: str
    work: Work
    reference: str
    flop: int = 0
    num_bytes: int = 0


class Bench:
    """One run; ``result`` is what is known so far."""

    def __init__(self, scheme: str, rounds: int, say: Callable[[str], None], seconds: float = 0.02) -> None:
        self._scheme, self._rounds, self._say, self._seconds = scheme, rounds, say, seconds
        self._on_gpu = jax.default_backend() == "gpu"
        self.result: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "hopper_kernels": compat.has_hopper_kernels(),
            "scheme": scheme,
            "limit": LIMIT,
            "rounds": rounds,
            "wrong": [],
            "failed": [],
            "runs": [],
        }

    def many_rows(self, name: str, share: Share) -> None:
        """Kernels, the MLP and its gradients, with equal runs."""
        scheme = self._scheme
        data = Data.of(share, shares.group_sizes(share, "uniform"))
        act, pre = products.of_rows(data)
        frozen = quantised(data, scheme)
        matmuls, own = dense.dense(data, act, pre), products.kernels(data, act, pre, not self._on_gpu)
        unit = 2 * share.rows * share.hidden * share.inner
        flops = {"gate_up": 2 * unit, "down": unit, "forward": 3 * unit, "forward_backward": 9 * unit}
        timings = []
        for kernel in ("gate_up", "down"):
            reference = f"dense bf16 {kernel}"
            timings += [
                Timing(reference, matmuls[kernel], reference, flops[kernel]),
                Timing(f"bf16 {kernel}", own[kernel], reference, flops[kernel]),
            ]
        for kernel, work in kernels(data, frozen, scheme).items():
            timings.append(Timing(f"{scheme} {kernel}", work, f"dense bf16 {kernel}", flops[kernel]))
        for label, backward in (("forward", False), ("forward_backward", True)):
            timings.append(
                Timing(f"bf16 {label}", products.mlp(data, backward), f"bf16 {label}", flops[label])
            )
        for label, work in (
            ("forward", of_codes(data, frozen, scheme)),
            ("forward_backward", of_master(data, scheme)),
        ):
            timings.append(Timing(f"{scheme} {label}", work, f"bf16 {label}", flops[label]))
        errors = {
            f"{scheme} forward": lambda got: forward_errors(data, frozen, scheme, got),
            f"{scheme} forward_backward": lambda got: gradient_errors(data, scheme, got),
        }
        self._measure(name, timings, torch_float8.gate_up(share) if self._on_gpu else {}, errors)

    def few_rows(self, name: str, share: Share, tokens: int) -> None:
        """The MLP of a step of decoding: ``tokens``, each with several of the experts."""
        scheme = self._scheme
        rng = np.random.default_rng(0)
        choices = min(DECODE_CHOICES, share.experts)
        chosen = np.argsort(rng.random((tokens, share.experts)), axis=1)[:, :choices]
        sizes = np.bincount(chosen.ravel(), minlength=share.experts).astype(np.int32)
        data = Data.of(share, sizes, default_block(tokens, choices, share.experts))
        frozen = quantised(data, scheme)
        used = int((sizes > 0).sum()) * 3 * share.inner * share.hidden
        reference, label = "bf16 forward", f"{scheme} forward"
        timings = [
            Timing(reference, products.mlp(data, False), reference, num_bytes=2 * used),
            Timing(label, of_codes(data, frozen, scheme), reference, num_bytes=used),
            Timing("copy", dense.copy(_COPY_BYTES)[0], reference, num_bytes=2 * _COPY_BYTES),
        ]
        errors = {label: lambda got: forward_errors(data, frozen, scheme, got)}
        self._measure(f"{name}, {tokens} tokens", timings, {}, errors)

    def _measure(
        self,
        title: str,
        timings: Sequence[Timing],
        others: dict[str, Callable[[int], Callable[[], Any]]],
        errors: dict[str, Callable[[Any], dict[str, float]]],
    ) -> None:
        """Compiles, checks and times a share's entries and, with how many times, ``others``'."""
        run: dict[str, Any] = {"title": title, "entries": {}, "errors": {}}
        self.result["runs"].append(run)
        calls = []
        with contextlib.closing(Pool()) as pool:
            times = {t.label: self._start(pool, t, t.label in errors) for t in timings}
            pool.wait()
            for t in timings:
                with self._guard(title, t.label):
                    if t.label in errors:
                        got = pool.get((t.label, "once"))(*t.work.operands)
                        run["errors"][t.label] = self._checked(title, t.label, errors[t.label](got))
                        del got
                    program = functools.partial(pool.get(t.label), *t.work.operands)
                    calls.append(_tried(Call(t.label, "", program, repeats=times[t.label])))
            for label, other in others.items():
                with self._guard(title, label):
                    calls.append(_tried(Call(label, "", other(_OTHERS_TIMES), repeats=_OTHERS_TIMES)))
        seconds = by_turns(calls, self._rounds)
        by_label = {t.label: t for t in timings}
        for label in seconds:
            run["entries"][label] = self._entry(title, label, by_label.get(label), seconds)

    def _start(self, pool: Pool, timing: Timing, is_checked: bool) -> int:
        """Begins to compile a program, and one more that is checked; gives how often it does its work."""
        guess = max(timing.flop / 7e14, timing.num_bytes / 3e12, 1e-5)
        times = times_for(guess, self._seconds) if self._on_gpu else 1
        work, alone = timing.work, timing.label.startswith("dense")
        pool.start(timing.label, on_device(work.fn, work.operands, times, alone=alone))
        if is_checked:
            pool.start((timing.label, "once"), on_device(work.fn, work.operands))
        return times

    def _checked(self, title: str, label: str, errors: dict[str, float]) -> dict[str, float]:
        self._say(f"{title} {label}: errors { ({k: f'{v:.1e}' for k, v in errors.items()}) }")
        if not all(v <= LIMIT for v in errors.values()):
            self.result["wrong"].append([title, label, errors])
        return errors

    def _entry(
        self, title: str, label: str, timing: Timing | None, seconds: dict[str, list[float]]
    ) -> dict[str, Any]:
        """Times and rates of what is timed as ``label``; ``timing`` is None for others' products."""
        entry: dict[str, Any] = milliseconds(seconds[label])
        reference = timing.reference if timing else "dense bf16 gate_up"
        if reference in seconds:
            pairs = zip(seconds[reference], seconds[label], strict=True)
            entry["speedup"] = statistics.median(a / b for a, b in pairs)
        if timing and timing.flop:
            entry["tflops"] = timing.flop / entry["ms"] / 1e9
        if timing and timing.num_bytes:
            entry["tb_per_s"] = timing.num_bytes / entry["ms"] / 1e9
        numbers = "".join(
            f" {entry[key]:8.3f} {unit}"
            for key, unit in (("tflops", "TFLOP/s"), ("tb_per_s", "TB/s"))
            if key in entry
        )
        ratio = f", {entry['speedup']:.3f} of {reference}'s speed" if "speedup" in entry else ""
        self._say(f"{title} {label:32s} {entry['ms']:8.4f} ms{numbers}{ratio}")
        return entry

    @contextlib.contextmanager
    def _guard(self, title: str, label: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}"[:2000]
            self.result["failed"].append([title, label, text])
            self._say(f"{title} {label}: FAILED: {text[:300]}")


def _tried(call: Call) -> Call:
    """The call, once it has run: one that cannot must not end the turns of the others."""
    call.run()
    return call


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to measure.

    Args:
      scheme: of the experts.
      names: names in ``shares.SHARES``; the decoding one with several numbers of tokens.
      rounds: turns of each.
      seconds: how long a program takes at each turn.
    """

    scheme: str
    names: Sequence[str]
    rounds: int
    seconds: float = 0.02


def run(asked: Asked, say: Callable[[str], None], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures; see ``Study``.

    Returns:
      A JSON-able dict; ``wrong`` lists results whose error is over the limit, ``failed`` what met an error.
    """
    bench = Bench(asked.scheme, asked.rounds, say, asked.seconds)
    for name in asked.names:
        share = shares.SHARES[name]
        for tokens in DECODE_TOKENS if share.decode else (None,):
            with bench._guard(name, f"{tokens} tokens" if tokens else ""):
                if tokens is None:
                    bench.many_rows(name, share)
                else:
                    bench.few_rows(name, share, tokens)
        save(bench.result)
    return bench.result
