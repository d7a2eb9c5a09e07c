"""``jax-moriep bench kernels --quant``: experts under a scheme, beside bf16 and torch's grouped float8.

All by turns in one run. Results are checked in it: some rows and columns of the fullest expert, in float64,
of values that NumPy rounds to codes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep import schemes
from jax_moriep.bench import products, shares
from jax_moriep.bench.products import Work
from jax_moriep.bench.programs import Programs, Timed, bound, by_turns, milliseconds, times_for
from jax_moriep.bench.shares import Data, Share
from jax_moriep.experts import ExpertSpec, ExpertWeights, pallas
from jax_moriep.experts.pallas.hopper import fp8 as hopper_fp8
from jax_moriep.experts.pallas.hopper import quantised as hopper_quantised
from jax_moriep.experts.pallas.hopper.support import ROWS, unsuited
from jax_moriep.experts.pallas.tiles import row_tiles
from jax_moriep.plan import default_block
from jax_moriep.runtime import compat

LIMIT = 3e-2
"""Largest relative error: bf16 between the steps moves codes that lie near a border of two."""
DECODE_TOKENS, DECODE_CHOICES = (8, 32, 128), 8
_ROWS, _COLS = 64, 32
_COPY_BYTES = 1 << 30


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
        sizes = shares.group_sizes(share, "uniform")
        data = Data.of(share, sizes)
        act, pre = products.of_rows(data)
        frozen = _quantised(data, self._scheme)
        dense, own = products.dense(data, act, pre), products.kernels(data, act, pre, not self._on_gpu)
        unit = 2 * share.rows * share.hidden * share.inner
        timings = []
        for kernel, flop in (("gate_up", 2 * unit), ("down", unit)):
            timings += [
                Timing(f"dense bf16 {kernel}", dense[kernel], f"dense bf16 {kernel}", flop),
                Timing(f"bf16 {kernel}", own[kernel], f"dense bf16 {kernel}", flop),
            ]
        for kernel, work in _kernels(data, frozen, self._scheme).items():
            timings.append(
                Timing(
                    f"{self._scheme} {kernel}",
                    work,
                    f"dense bf16 {kernel}",
                    2 * unit if kernel == "gate_up" else unit,
                )
            )
        for label, backward in (("forward", False), ("forward_backward", True)):
            flop = (9 if backward else 3) * unit
            timings.append(Timing(f"bf16 {label}", products.mlp(data, backward), f"bf16 {label}", flop))
        master = _of_master(data, self._scheme)
        timings += [
            Timing(
                f"{self._scheme} forward", _of_codes(data, frozen, self._scheme), "bf16 forward", 3 * unit
            ),
            Timing(f"{self._scheme} forward_backward", master, "bf16 forward_backward", 9 * unit),
        ]
        others = _of_torch(share) if self._on_gpu else {}
        errors = {
            f"{self._scheme} forward": lambda got: _forward_error(data, frozen, self._scheme, got),
            f"{self._scheme} forward_backward": lambda got: _gradient_error(data, self._scheme, got),
        }
        self._measure(name, timings, others, errors)

    def few_rows(self, name: str, share: Share, tokens: int) -> None:
        """The MLP of a step of decoding: ``tokens``, each with several of the experts."""
        rng = np.random.default_rng(0)
        choices = min(DECODE_CHOICES, share.experts)
        chosen = np.argsort(rng.random((tokens, share.experts)), axis=1)[:, :choices]
        sizes = np.bincount(chosen.ravel(), minlength=share.experts).astype(np.int32)
        data = Data.of(share, sizes, default_block(tokens, choices, share.experts))
        frozen = _quantised(data, self._scheme)
        used = int((sizes > 0).sum()) * 3 * share.inner * share.hidden
        timings = [
            Timing("bf16 forward", products.mlp(data, False), "bf16 forward", num_bytes=2 * used),
            Timing(
                f"{self._scheme} forward",
                _of_codes(data, frozen, self._scheme),
                "bf16 forward",
                num_bytes=used,
            ),
            Timing("copy", products.copy(_COPY_BYTES), "bf16 forward", num_bytes=2 * _COPY_BYTES),
        ]
        errors = {f"{self._scheme} forward": lambda got: _forward_error(data, frozen, self._scheme, got)}
        self._measure(f"{name}, {tokens} tokens", timings, {}, errors)

    def _measure(
        self,
        title: str,
        timings: Sequence[Timing],
        others: dict[str, Callable[[int], Timed]],
        errors: dict[str, Callable[[Any], dict[str, float]]],
    ) -> None:
        run: dict[str, Any] = {"title": title, "entries": {}, "errors": {}}
        self.result["runs"].append(run)
        with contextlib.closing(Programs()) as programs:
            times = {}
            for t in timings:
                guess = max(t.flop / 7e14, t.num_bytes / 3e12, 1e-5)
                times[t.label] = times_for(guess, self._seconds) if self._on_gpu else 1
                repeat = times[t.label] if times[t.label] > 1 else None
                on_gpu = t.label.startswith("dense")
                programs.start(t.label, t.work.fn, t.work.operands, repeat, on_gpu=on_gpu)
                if t.label in errors:
                    programs.start((t.label, "once"), t.work.fn, t.work.operands, None)
            programs.wait()
            calls: dict[str, Timed] = {}
            for t in timings:
                with self._guard(title, t.label):
                    call = bound(programs.get(t.label), t.work.operands, times[t.label])
                    if t.label in errors:
                        got = programs.get((t.label, "once"))(*t.work.operands)
                        found = run["errors"][t.label] = errors[t.label](got)
                        del got
                        self._say(
                            f"{title} {t.label}: errors { ({k: f'{v:.1e}' for k, v in found.items()}) }"
                        )
                        if not all(v <= LIMIT for v in found.values()):
                            self.result["wrong"].append([title, t.label, found])
                    call.run()
                    calls[t.label] = call
            for label, other in others.items():
                with self._guard(title, label):
                    calls[label] = other(8)
                    calls[label].run()
            seconds = by_turns(calls, self._rounds)
        by_label = {t.label: t for t in timings}
        for label, taken in seconds.items():
            t = by_label.get(label)
            entry: dict[str, Any] = milliseconds(taken)
            reference = t.reference if t else "dense bf16 gate_up"
            if reference in seconds:
                pairs = zip(seconds[reference], taken, strict=True)
                entry["speedup"] = statistics.median(a / b for a, b in pairs)
            if t and t.flop:
                entry["tflops"] = t.flop / entry["ms"] / 1e9
            if t and t.num_bytes:
                entry["tb_per_s"] = t.num_bytes / entry["ms"] / 1e9
            run["entries"][label] = entry
            numbers = "".join(
                f" {entry[key]:8.3f} {unit}"
                for key, unit in (("tflops", "TFLOP/s"), ("tb_per_s", "TB/s"))
                if key in entry
            )
            ratio = f", {entry['speedup']:.3f} of {reference}'s speed" if "speedup" in entry else ""
            self._say(f"{title} {label:32s} {entry['ms']:8.4f} ms{numbers}{ratio}")

    @contextlib.contextmanager
    def _guard(self, title: str, label: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001
            text = f"{type(error).__name__}: {error}"[:2000]
            self.result["failed"].append([title, label, text])
            self._say(f"{title} {label}: FAILED: {text[:300]}")


def run(
    scheme: str, names: Sequence[str], rounds: int, say: Callable[[str], None], seconds: float = 0.02
) -> dict[str, Any]:
    """Measures some of ``shares.SHARES`` under a scheme; the decoding one with several numbers of tokens."""
    bench = Bench(scheme, rounds, say, seconds)
    for name in names:
        share = shares.SHARES[name]
        for tokens in DECODE_TOKENS if share.decode else (None,):
            with bench._guard(name, f"{tokens} tokens" if tokens else ""):
                if tokens is None:
                    bench.many_rows(name, share)
                else:
                    bench.few_rows(name, share, tokens)
    return bench.result


def _spec(data: Data, scheme: str) -> ExpertSpec:
    return dataclasses.replace(data.spec, scheme=scheme, format="e4m3fn")


def _quantised(data: Data, scheme: str) -> ExpertWeights:
    """The experts' codes and scales."""
    w1, w2 = data.operands[3:]
    dtype = schemes.code_dtype(scheme, schemes.FORMATS["e4m3fn"])

    def one(w: jax.Array, parts: int) -> schemes.Quantised:
        # Expert by expert: in f32 all of a model's would not fit.
        return jax.lax.map(lambda w: schemes.quantise_weights(w, scheme, dtype, parts=parts), w)

    first, second = (jax.jit(one, static_argnums=1)(w, parts) for w, parts in ((w1, 2), (w2, 1)))
    return ExpertWeights(first.codes, second.codes, None, None, first.scales, second.scales)


def _of_codes(data: Data, frozen: ExpertWeights, scheme: str) -> Work:
    """The MLP of codes."""
    spec = _spec(data, scheme)

    def fn(rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any, s1: Any, s2: Any) -> tuple[jax.Array]:
        of = ExpertWeights(w1, w2, None, None, s1, s2)
        return (pallas.expert_mlp(rows, factors, sizes, of, spec),)

    weights = (frozen.w1, frozen.w2, frozen.w1_scale, frozen.w2_scale)
    return Work(fn, (*data.operands[:3], *weights))


def _of_master(data: Data, scheme: str) -> Work:
    """The MLP of master weights, and its gradients."""
    spec = _spec(data, scheme)

    def forward(rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any) -> jax.Array:
        return pallas.expert_mlp(rows, factors, sizes, ExpertWeights(w1, w2), spec)

    return Work(products.with_gradients(forward, True), (data.d_out, *data.operands))


def _kernels(data: Data, frozen: ExpertWeights, scheme: str) -> dict[str, Work]:
    """The Hopper kernels alone, where they run."""
    rows, factors, sizes = data.operands[:3]
    spec, capacity = _spec(data, scheme), rows.shape[0]
    if not compat.has_hopper_kernels() or unsuited(spec, rows, frozen) is not None:
        return {}

    def tiles(sizes: jax.Array) -> Any:
        return row_tiles(sizes, spec.block, capacity, ROWS)

    def gate_up(s: Any, c: Any, cs: Any, w: Any, ws: Any, f: Any) -> list[jax.Array]:
        of_rows, of_weights = schemes.Quantised(c, cs), schemes.Quantised(w, ws)
        return hopper_fp8.gate_up(of_rows, of_weights, f, tiles(s), spec, saved_rows=0, dtype=rows.dtype)

    def down(s: Any, c: Any, cs: Any, w: Any, ws: Any) -> jax.Array:
        return hopper_fp8.product(schemes.Quantised(c, cs), schemes.Quantised(w, ws), tiles(s), rows.dtype)

    def quantised(s: Any, x: Any) -> schemes.Quantised:
        return hopper_quantised.quantised_rows(x, spec, s, False)

    codes, scales = jax.jit(quantised)(sizes, rows)
    real = jnp.asarray(shares.real_rows(data.sizes, spec.block, capacity))
    operands = (sizes, codes, scales, frozen.w1, frozen.w1_scale, jnp.where(real, factors, 0))
    act, act_scales = jax.jit(gate_up)(*operands)
    return {
        "gate_up": Work(gate_up, operands),
        "down": Work(down, (sizes, act, act_scales, frozen.w2, frozen.w2_scale)),
    }


def _of_torch(share: Share) -> dict[str, Callable[[int], Timed]]:
    """torch's grouped product of float8 rows and weights with a scale each, of gate_up's shape."""
    try:
        torch: Any = importlib.import_module("torch")
        product = torch._scaled_grouped_mm
    except (ImportError, AttributeError):
        return {}

    def timed(fast: bool, times: int) -> Timed:
        device, code = "cuda", torch.float8_e4m3fn
        x = torch.randn(share.rows, share.hidden, device=device, dtype=torch.bfloat16).to(code)
        w = torch.randn(share.experts, 2 * share.inner, share.hidden, device=device, dtype=torch.bfloat16)
        w = w.to(code).transpose(1, 2)
        of_x, of_w = torch.ones(share.rows, device=device), torch.ones(w.shape[0], w.shape[2], device=device)
        count = share.rows // share.experts
        ends = torch.arange(1, share.experts + 1, device=device, dtype=torch.int32) * count

        def run() -> None:
            for _ in range(times):
                product(x, w, of_x, of_w, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=fast)
            torch.cuda.synchronize()

        return Timed(run, times)

    return {
        "torch grouped float8 gate_up": lambda times: timed(False, times),
        "torch grouped float8 gate_up, fast sums": lambda times: timed(True, times),
    }


# --- What must come out -----------------------------------------------------------------------------------


def _rounded(x: np.ndarray, group: int, scheme: str) -> np.ndarray:
    """Values as codes leave them, ``group`` columns of a row with one scale."""
    by_group = x.reshape(x.shape[0], -1, group)
    largest = np.abs(by_group).max(axis=2, keepdims=True)
    if scheme == "int8_token":
        scale = np.maximum(largest, 1e-300) / 127
        return (np.rint(by_group / scale) * scale).reshape(x.shape)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(largest, 1e-300) / 448))
    codes = (by_group / scale).astype(np.float32).astype(jnp.float8_e4m3fn)
    return (codes.astype(np.float64) * scale).reshape(x.shape)


def _rounded_weights(w: np.ndarray, scheme: str) -> np.ndarray:
    if scheme != "fp8_block":
        return _rounded(w, w.shape[1], scheme)
    tall, wide = w.shape
    blocks = w.reshape(tall // 128, 128, wide // 128, 128).swapaxes(1, 2).reshape(-1, 128 * 128)
    blocks = _rounded(blocks, 128 * 128, scheme).reshape(tall // 128, wide // 128, 128, 128)
    return blocks.swapaxes(1, 2).reshape(tall, wide)


def _silu(pre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations and their derivatives by gate and up."""
    gate, up = np.split(pre, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    return gate * s * up, (s + gate * s * (1 - s)) * up, gate * s


def _fullest(data: Data) -> tuple[int, slice]:
    expert = int(np.argmax(data.sizes))
    start = int(data.starts[expert])
    return expert, slice(start, start + int(data.sizes[expert]))


def _error(got: Any, want: np.ndarray) -> float:
    error = np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want)
    return float(error) if np.isfinite(error) else float("inf")


def _forward_error(data: Data, frozen: ExpertWeights, scheme: str, got: Any) -> dict[str, float]:
    expert, run = _fullest(data)
    at = slice(run.start, min(run.stop, run.start + _ROWS))
    x, q = (np.asarray(a[at]).astype(np.float64) for a in data.operands[:2])
    spread = [
        np.asarray(schemes.dequantise_weights(codes[expert], scales[expert], scheme, parts=parts), np.float64)
        for codes, scales, parts in ((frozen.w1, frozen.w1_scale, 2), (frozen.w2, frozen.w2_scale, 1))
    ]
    seen = _rounded(x, 128 if scheme == "fp8_block" else x.shape[1], scheme)
    h = _rounded(_silu(seen @ spread[0].T)[0], 128, scheme)
    real = jnp.asarray(shares.real_rows(data.sizes, data.spec.block, got[0].shape[0]))
    padding = bool(jnp.any(jnp.where(real[:, None], 0, got[0]) != 0))
    return {"out": _error(got[0][at], q[:, None] * (h @ spread[1].T)), "padding": float(padding)}


def _gradient_error(data: Data, scheme: str, got: Any) -> dict[str, float]:
    """Of d_rows, d_row_weights, and some columns of dw1 and dw2."""
    expert, run = _fullest(data)
    rows, factors, _, w1, w2 = data.operands
    x, q, d_y = (np.asarray(a[run]).astype(np.float64) for a in (rows, factors, data.d_out))
    v1, v2 = (_rounded_weights(np.asarray(w[expert]).astype(np.float64), scheme) for w in (w1, w2))
    back, inner = scheme == "fp8_block", v2.shape[1]
    seen = _rounded(x, 128 if back else x.shape[1], scheme)
    d_seen = _rounded(d_y, 128, scheme) if back else d_y
    few, cols = slice(0, _ROWS), slice(0, _COLS)
    h, by_gate, by_up = _silu(seen[few] @ v1.T)
    d_h = d_seen[few] @ v2
    d_weight = np.sum(d_h * _rounded(h, 128, scheme), axis=1)
    d_pre = np.concatenate([d_h * by_gate, d_h * by_up], axis=1) * q[few, None]
    d_row = (_rounded(d_pre, 128, scheme) if back else d_pre) @ v1
    both = np.concatenate([np.arange(inner)[cols], inner + np.arange(inner)[cols]])
    h, by_gate, by_up = _silu(seen @ v1[both].T)
    d_h = (d_seen @ v2[:, cols]) * q[:, None]
    dw1 = np.concatenate([d_h * by_gate, d_h * by_up], axis=1).T @ x
    dw2 = (d_y * q[:, None]).T @ h
    at = slice(run.start, min(run.stop, run.start + _ROWS))
    return {
        "d_rows": _error(got[1][at], d_row),
        "d_row_weights": _error(got[2][at], d_weight),
        "dw1": _error(got[3][expert][both], dw1),
        "dw2": _error(got[4][expert][:, cols], dw2),
    }
