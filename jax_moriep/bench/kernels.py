"""``jax-moriep bench kernels``: the GPU kernels of the experts, beside the dense matmul.

One GPU, one rank's share of a published model. Every number is taken by turns with the dense matmul, because
a GPU that works at its power limit changes its clock from second to second, and every result is checked in
the same run, on the fullest and the emptiest expert.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep.bench import oracle, ragged
from jax_moriep.errors import ConfigError, rule
from jax_moriep.experts import ExpertSpec, triton
from jax_moriep.experts.triton import hopper, passes, products, tuning
from jax_moriep.experts.triton.tiles import row_tiles
from jax_moriep.plan import default_block, run_starts
from jax_moriep.runtime import compat

LIMIT = 2e-2
"""Largest relative error, in the Euclidean norm, of a bf16 result."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank holds: L experts, H, I, and how many rows it receives."""

    experts: int
    hidden: int
    inner: int
    rows: int


SHARES = {
    "deepseek-v3-ep8": Share(32, 7168, 2048, 32768),
    "mixtral-8x7b": Share(8, 4096, 14336, 16384),
    "qwen3-30b-a3b-ep8": Share(16, 2048, 768, 32768),
    "deepseek-v3-ep8-decode": Share(32, 7168, 2048, 1024),
}
SIZES = ("uniform", "zipf")


def group_sizes(share: Share, kind: str) -> np.ndarray:
    """Rows of each expert: equally many, or falling as 1 / rank**0.8 in a shuffled order."""
    if kind == "uniform":
        return np.full(share.experts, share.rows // share.experts, np.int32)
    rng = np.random.default_rng(0)
    chance = (np.arange(share.experts) + 1.0) ** -0.8
    return rng.multinomial(share.rows, rng.permutation(chance / chance.sum())).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Data:
    """Operands of one measurement, on the device."""

    share: Share
    spec: ExpertSpec
    sizes: np.ndarray
    operands: tuple[jax.Array, ...]
    d_out: jax.Array

    @classmethod
    def of(cls, share: Share, sizes: np.ndarray, block: int | None = None) -> Data:
        """Random operands; every row that is no expert's is NaN."""
        # As a layer whose tokens each choose one expert would choose it.
        block = block or default_block(share.rows, 1, share.experts)
        capacity = int((-(-sizes // block) * block).sum()) + block
        keys = jax.random.split(jax.random.key(0), 6)
        normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
        real = np.zeros(capacity, bool)
        for start, size in zip(np.asarray(run_starts(jnp.asarray(sizes), block)), sizes, strict=True):
            real[start : start + size] = True
        poisoned = jax.jit(lambda x: jnp.where(jnp.asarray(real)[:, None], x, jnp.nan), donate_argnums=0)
        weights = (
            normal(keys[0], (share.experts, 2 * share.inner, share.hidden)) * share.hidden**-0.5,
            normal(keys[1], (share.experts, share.hidden, share.inner)) * share.inner**-0.5,
        )
        factors = jnp.where(jnp.asarray(real), jax.random.uniform(keys[2], (capacity,), minval=0.1), jnp.nan)
        rows, d_out = (poisoned(normal(key, (capacity, share.hidden))) for key in keys[3:5])
        spec = ExpertSpec("silu", 7.0, 1.702, False, block)
        return cls(share, spec, sizes, (rows, factors, jnp.asarray(sizes), *weights), d_out)


def mlp(data: Data, name: str, backward: bool) -> Callable[..., Any]:
    """fn(d_out, *operands) of one implementation: the result, and with ``backward`` the gradients."""

    def forward(rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any) -> jax.Array:
        if name == "ragged_dot":
            return ragged.expert_mlp(rows, factors, sizes, w1, w2, data.spec.block, int(data.sizes.sum()))
        return triton.expert_mlp(rows, factors, sizes, w1, w2, None, None, data.spec)

    def both(d_out: Any, rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any) -> Any:
        out, pull = jax.vjp(lambda r, f, a, b: forward(r, f, sizes, a, b), rows, factors, w1, w2)
        return out, *pull(d_out)

    return both if backward else lambda d_out, *operands: (forward(*operands),)


def kernels(data: Data) -> dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...], int]]:
    """Each kernel that runs for ``data``: fn, its operands, and its FLOPs in units of w2's product."""
    rows, factors, sizes, w1, w2 = data.operands
    spec, capacity, inner = data.spec, rows.shape[0], data.share.inner
    starts = run_starts(sizes, spec.block)
    keys = jax.random.split(jax.random.key(1), 2)
    act = jax.random.normal(keys[0], (capacity, inner), rows.dtype)
    pre = jax.random.normal(keys[1], (capacity, 2 * inner), rows.dtype)
    if compat.has_hopper_kernels() and hopper.covers(spec, rows, w1, w2, False):
        tiles = functools.partial(row_tiles, block=spec.block, capacity=capacity, size=hopper.ROWS)
        made: dict[str, Any] = {
            "gate_up": (
                lambda s, x, w, f: hopper.gate_up(x, w, f, tiles(s), spec, saved_rows=0, act=True),
                (rows, w1, factors),
            ),
            "down": (lambda s, x, w: hopper.product(x, w, tiles(s), by_column=False), (act, w2)),
            "d_act": (lambda s, x, w: hopper.product(x, w, tiles(s), by_column=True), (data.d_out, w2)),
            "d_rows": (lambda s, x, w: hopper.product(x, w, tiles(s), by_column=True), (pre, w1)),
            "dw1": (lambda s, a, b: hopper.weight_gradient(a, b, starts, s, unclean="right"), (pre, rows)),
            "dw2": (
                lambda s, a, b: hopper.weight_gradient(a, b, starts, s, unclean="left"),
                (data.d_out, act),
            ),
        }
    else:
        kind, table = compat.device_kind("cuda"), tuning.table()

        def tile(kernel: str) -> Any:
            return tuning.lookup(table, kind, "cuda", kernel, spec.block, rows.dtype.itemsize)

        made = {name: of_triton(data, name, tile(name), act, pre) for name in tuning.KERNELS}
    units = {"gate_up": 2, "down": 1, "d_act": 1, "d_rows": 2, "dw1": 2, "dw2": 1}
    return {name: (fn, (sizes, *operands), units[name]) for name, (fn, operands) in made.items()}


def of_triton(
    data: Data, name: str, tile: Any, act: jax.Array, pre: jax.Array
) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
    """One Triton kernel: fn(group sizes, *operands), and the operands."""
    rows, factors, _, w1, w2 = data.operands
    spec, capacity = data.spec, rows.shape[0]
    gradient = functools.partial(
        products.weight_gradient, dtype=w1.dtype, tile=tile, name="moriep_" + name, interpret=False
    )

    def dw(s: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
        return gradient(left, right, run_starts(s, spec.block), s)

    match name:
        case "gate_up":
            fn = lambda s, x, f, a, b: passes.gate_up(spec, tile, False, (x, f, s, a, b))  # noqa: E731
            return fn, (rows, factors, w1, w2)
        case "down":
            fn = lambda s, h, x, f, a, b: passes.down(spec, tile, False, h, (x, f, s, a, b))  # noqa: E731
            return fn, (act, rows, factors, w1, w2)
        case "d_act":

            def d_act(s: Any, d: Any, p: Any, x: Any, f: Any, a: Any, b: Any) -> Any:
                return passes.d_activations(spec, tile, capacity, False, d, (p,), (x, f, s, a, b))

            return d_act, (data.d_out, pre, rows, factors, w1, w2)
        case "d_rows":
            fn = lambda s, p, x, f, a, b: passes.d_rows(spec, tile, False, p, (x, f, s, a, b))  # noqa: E731
            return fn, (pre, rows, factors, w1, w2)
        case "dw1":
            return dw, (pre, rows)
        case _:
            return dw, (data.d_out, act)


def by_turns(
    first: Callable[[], Any], second: Callable[[], Any], calls: int, rounds: int
) -> list[list[float]]:
    """Seconds per call of both, one list each; each round makes some calls of one, then of the other."""
    for call in (first, second):
        jax.block_until_ready(call())
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for call, taken in zip((first, second), seconds, strict=True):
            began = time.perf_counter()
            result = None
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
            taken.append((time.perf_counter() - began) / calls)
    return seconds


def checked_experts(data: Data) -> dict[int, tuple[np.ndarray, ...]]:
    """What the fullest and the emptiest expert give in float64: result and gradients."""
    rows, factors, _, w1, w2 = data.operands
    starts = np.asarray(run_starts(jnp.asarray(data.sizes), data.spec.block))
    used = [int(e) for e in np.argsort(data.sizes, kind="stable") if data.sizes[e] > 0]
    wanted = {}
    for expert in {used[0], used[-1]}:
        at = slice(int(starts[expert]), int(starts[expert] + data.sizes[expert]))
        weight, d_y = (np.asarray(x[at], np.float64) for x in (factors, data.d_out))
        want = oracle.mlp(
            np.asarray(rows[at]), np.asarray(w1[expert]), np.asarray(w2[expert]), weight[:, None] * d_y
        )
        d_weight = (want.y * d_y).sum(axis=1)
        wanted[expert] = (weight[:, None] * want.y, want.d_x, d_weight, want.d_w1, want.d_w2)
    return wanted


def errors(
    data: Data, wanted: dict[int, tuple[np.ndarray, ...]], results: tuple[jax.Array, ...]
) -> dict[str, float]:
    """The largest relative errors of the experts in ``wanted``; and the largest value in padding."""
    starts = np.asarray(run_starts(jnp.asarray(data.sizes), data.spec.block))
    real = np.zeros(results[0].shape[0], bool)
    for start, size in zip(starts, data.sizes, strict=True):
        real[start : start + size] = True
    padding = [jnp.max(jnp.abs(jnp.where(jnp.asarray(real)[:, None], 0, x))) for x in results[:2]]
    worst = {"padding": float(jnp.max(jnp.stack(padding)))}
    names = ("out", "d_rows", "d_row_weights", "dw1", "dw2")
    for expert, want in wanted.items():
        at = slice(int(starts[expert]), int(starts[expert] + data.sizes[expert]))
        for i, (name, a, b) in enumerate(zip(names, results, want, strict=False)):
            got = np.asarray(a[at] if i < 3 else a[expert], np.float64)
            error = float(np.linalg.norm(got - b) / np.linalg.norm(b))
            worst[name] = max(worst.get(name, 0.0), error)
    return worst


def measure(share_name: str, kind: str, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """All numbers of one share and one kind of group sizes; see ``run`` for what they mean."""
    share = SHARES[share_name]
    data = Data.of(share, group_sizes(share, kind))
    rows, _, _, w1, w2 = data.operands
    flops = 2 * share.rows * share.hidden * share.inner
    dense_rows = jax.random.normal(jax.random.key(2), (share.rows, share.hidden), rows.dtype)
    dense = jax.jit(lambda x, w: x @ w.T).lower(dense_rows, w1[0]).compile()
    dense_weight = w1[0]
    result: dict[str, Any] = {
        "share": share_name,
        "sizes": kind,
        "experts": share.experts,
        "hidden": share.hidden,
        "intermediate": share.inner,
        "rows": share.rows,
        "block": data.spec.block,
        "capacity": rows.shape[0],
        "group_sizes": data.sizes.tolist(),
        "kernels": {},
        "mlp": {},
        "errors": {},
    }
    decode = share.rows < 64 * share.experts
    wanted = checked_experts(data)
    copied = jax.random.normal(jax.random.key(3), (1 << 29,), jnp.bfloat16)
    copy = jax.jit(lambda x: x * 2).lower(copied).compile()
    reference = (lambda: copy(copied)) if decode else (lambda: dense(dense_rows, dense_weight))
    used_bytes = int((data.sizes > 0).sum()) * 2 * share.hidden * share.inner

    def record(into: dict[str, Any], name: str, call: Callable[[], Any], units: int, calls: int) -> None:
        base, taken = by_turns(reference, call, calls, rounds)
        seconds, base_seconds = statistics.median(taken), statistics.median(base)
        entry = {"ms": seconds * 1e3, "ms_min": min(taken) * 1e3, "ms_max": max(taken) * 1e3}
        if decode:
            entry["copy_tb_per_s"] = 2 * copied.nbytes / base_seconds / 1e12
            entry["weights_tb_per_s"] = units * used_bytes / seconds / 1e12
            entry["of_copy"] = entry["weights_tb_per_s"] / entry["copy_tb_per_s"]
        else:
            entry["tflop_per_s"] = units * flops / seconds / 1e12
            entry["dense_tflop_per_s"] = 2 * flops / base_seconds / 1e12
            entry["of_dense"] = entry["tflop_per_s"] / entry["dense_tflop_per_s"]
        into[name] = entry
        say(f"{share_name} {kind} {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in entry.items()))

    for name, (fn, operands, units) in kernels(data).items():
        if decode and name not in ("gate_up", "down"):
            continue
        compiled = jax.jit(fn).lower(*operands).compile()
        record(result["kernels"], name, functools.partial(compiled, *operands), units, 5)
    for name, calls in (("triton", 5), ("ragged_dot", 1)):
        for backward in (False, True):
            if backward and (decode or (name == "ragged_dot" and share_name != "deepseek-v3-ep8")):
                continue
            label = name + (" forward+backward" if backward else " forward")
            operands = (data.d_out, *data.operands)
            compiled = jax.jit(mlp(data, name, backward)).lower(*operands).compile()
            record(result["mlp"], label, functools.partial(compiled, *operands), 9 if backward else 3, calls)
            if name == "triton":
                found = errors(data, wanted, compiled(*operands))
                result["errors"][label] = found
                say(
                    f"{share_name} {kind} {label}: errors "
                    + ", ".join(f"{k} {v:.1e}" for k, v in found.items())
                )
    return result


def run(
    shares: Sequence[str], kinds: Sequence[str], rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures.

    A rate counts the real rows' FLOPs only. ``of_dense`` is the rate over that of one dense matmul
    [rows, H] x [H, 2*I], taken by turns; ``of_copy``, for few rows, the bytes of the used experts' weights
    per second over the bytes that an elementwise pass reads and writes per second.

    Args:
      shares: names in ``SHARES``.
      kinds: names in ``SIZES``.
      rounds: turns of each pair.
      say: takes a line for each number.

    Returns:
      A JSON-able dict; ``wrong`` lists the results whose error is over ``LIMIT``.

    Raises:
      ConfigError: a name is unknown, or there is no GPU.
    """
    for name, value, known in (("shares", shares, SHARES), ("sizes", kinds, SIZES)):
        if set(value) - set(known):
            raise ConfigError(rule(name, value, f"be some of {tuple(known)}", "pick some of these"))
    if jax.default_backend() != "gpu":
        raise ConfigError(rule("platform", jax.default_backend(), "be a GPU", "run it on one"))
    runs = [measure(share, kind, rounds, say) for share in shares for kind in kinds]
    wrong = [
        [run["share"], run["sizes"], label, name, error]
        for run in runs
        for label, found in run["errors"].items()
        for name, error in found.items()
        if not error <= (0 if name == "padding" else LIMIT)
    ]
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "hopper_kernels": compat.has_hopper_kernels(),
        "dtype": "bf16",
        "limit": LIMIT,
        "wrong": wrong,
        "runs": runs,
    }
