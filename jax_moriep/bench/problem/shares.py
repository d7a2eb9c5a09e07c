"""What ``bench kernels`` and ``tune`` compute on: one rank's share of a model, and what it must give."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep.bench.problem import oracle
from jax_moriep.bench.problem.cases import DTYPES
from jax_moriep.config import MoEConfig
from jax_moriep.experts import ExpertSpec
from jax_moriep.plan import default_block

LIMITS = {"bf16": 2e-2, "f32": 5e-3}
"""Largest relative error, in the Euclidean norm, of a result; of f32 by products that round to ten bits."""
EXACT = ("padding", "non_finite")
"""Errors that must be zero."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank holds: L experts, H, I, and how many rows it receives.

    Attributes:
      experts: L.
      hidden: H.
      inner: I.
      rows: it receives.
      activation: a name in ``config.ACTIVATIONS``, whose limit and slope are the config's own.
      biased: the experts have biases.
    """

    experts: int
    hidden: int
    inner: int
    rows: int
    activation: str = "silu"
    biased: bool = False

    @property
    def decode(self) -> bool:
        """Whether the experts have so few rows that reading the weights is most of the work."""
        return self.rows < 64 * self.experts

    @property
    def block(self) -> int:
        """As a layer whose tokens each choose one expert would choose it."""
        return default_block(self.rows, 1, self.experts)


SHARES = {
    "deepseek-v3-ep8": Share(32, 7168, 2048, 32768),
    "mixtral-8x7b": Share(8, 4096, 14336, 16384),
    "qwen3-30b-a3b-ep8": Share(16, 2048, 768, 32768),
    "deepseek-v3-ep8-decode": Share(32, 7168, 2048, 1024),
    "deepseek-v3-ep8-t1024": Share(32, 7168, 2048, 8192),
    "qwen3-30b-a3b": Share(128, 2048, 768, 32768),
    "gpt-oss-120b-ep4": Share(32, 2880, 2880, 32768, "swiglu_clamped", biased=True),
}
"""Of gpt-oss T=8192 tokens choose four each of 128 experts, on each of four ranks."""
SIZES = ("uniform", "random", "zipf")


def group_sizes(share: Share, kind: str) -> np.ndarray:
    """Rows of each expert.

    Args:
      share: the share.
      kind: "uniform", equally many; "random", what a router with random logits gives: every row is any
        expert's with the same chance; "zipf", falling as 1 / rank**0.8 in a shuffled order.

    Returns:
      i32[L].
    """
    if kind == "uniform":
        return np.full(share.experts, share.rows // share.experts, np.int32)
    rng = np.random.default_rng(0)
    if kind == "random":
        return rng.multinomial(share.rows, np.full(share.experts, 1 / share.experts)).astype(np.int32)
    chance = (np.arange(share.experts) + 1.0) ** -0.8
    return rng.multinomial(share.rows, rng.permutation(chance / chance.sum())).astype(np.int32)


def padded_rows(sizes: np.ndarray, block: int) -> int:
    """Rows of all runs, each rounded up to whole blocks: the rows that are computed."""
    return int((-(-sizes // block) * block).sum())


def capacity_of(share: Share) -> int:
    """Rows for the sizes of every kind and one block more: so every kind runs the same programs."""
    most = max(padded_rows(group_sizes(share, kind), share.block) for kind in SIZES)
    return most + share.block


def starts_of(sizes: np.ndarray, block: int = 1) -> np.ndarray:
    """The first row of every run; without ``block``, of rows that have no padding."""
    aligned = -(-sizes.astype(np.int64) // block) * block
    return np.cumsum(aligned) - aligned


@dataclasses.dataclass(frozen=True)
class Compact:
    """The real rows of ``Data`` alone, run behind run."""

    rows: jax.Array
    factors: jax.Array
    d_out: jax.Array


@dataclasses.dataclass(frozen=True)
class Data:
    """Operands of one measurement, on the device.

    Attributes:
      share: what they are of.
      spec: the static side of the experts' call.
      sizes: i32[L], rows of each expert.
      operands: rows [C, H], row weights f32[C], the sizes, w1 [L, 2*I, H] and w2 [L, H, I].
      d_out: [C, H], the gradient of the result.
      biases: b1 [L, 2*I] and b2 [L, H], where the share has them.
    """

    share: Share
    spec: ExpertSpec
    sizes: np.ndarray
    operands: tuple[jax.Array, ...]
    d_out: jax.Array
    biases: tuple[jax.Array, ...] = ()

    @classmethod
    def of(
        cls,
        share: Share,
        sizes: np.ndarray,
        block: int | None = None,
        capacity: int | None = None,
        dtype: str = "bf16",
    ) -> Data:
        """Random operands of a dtype in ``LIMITS``; every row that is no expert's is NaN."""
        block = block or share.block
        capacity = capacity or padded_rows(sizes, block) + block
        keys = jax.random.split(jax.random.key(0), 7)
        normal = functools.partial(jax.random.normal, dtype=DTYPES[dtype])
        real = real_rows(sizes, block, capacity)
        poisoned = jax.jit(lambda x: jnp.where(jnp.asarray(real)[:, None], x, jnp.nan), donate_argnums=0)
        weights = (
            normal(keys[0], (share.experts, 2 * share.inner, share.hidden)) * share.hidden**-0.5,
            normal(keys[1], (share.experts, share.hidden, share.inner)) * share.inner**-0.5,
        )
        factors = jnp.where(jnp.asarray(real), jax.random.uniform(keys[2], (capacity,), minval=0.1), jnp.nan)
        rows, d_out = (poisoned(normal(key, (capacity, share.hidden))) for key in keys[3:5])
        biases = ()
        if share.biased:
            of_both = ((share.experts, 2 * share.inner), (share.experts, share.hidden))
            biases = tuple(normal(key, of) * 0.5 for key, of in zip(keys[5:], of_both, strict=True))
        cfg = MoEConfig(share.experts, 1, share.hidden, share.inner, activation=share.activation)
        spec = ExpertSpec.of(cfg, block=block, architecture="")
        return cls(share, spec, sizes, (rows, factors, jnp.asarray(sizes), *weights), d_out, biases)

    @property
    def dtype(self) -> str:
        """Its name in ``LIMITS``."""
        return next(name for name in LIMITS if DTYPES[name] == self.d_out.dtype)

    @property
    def starts(self) -> np.ndarray:
        """The first row of every run."""
        return starts_of(self.sizes, self.spec.block)

    def compact(self) -> Compact:
        """The rows without padding."""
        rows, factors = self.operands[:2]
        index = np.flatnonzero(real_rows(self.sizes, self.spec.block, rows.shape[0])).astype(np.int32)
        return Compact(*jax.jit(lambda i, *xs: tuple(x[i] for x in xs))(index, rows, factors, self.d_out))


def real_rows(sizes: np.ndarray, block: int, capacity: int) -> np.ndarray:
    """bool[C]: whether a row is an expert's."""
    real = np.zeros(capacity, bool)
    for start, size in zip(starts_of(sizes, block), sizes, strict=True):
        real[start : start + size] = True
    return real


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Some of what one expert gives, in float64.

    Attributes:
      rows: which rows of its run.
      cols: which of its I columns.
      of_rows: out, d_rows and d_row_weights of those rows.
      of_cols: dw1 and dw2 of those columns, over all rows: [2*cols, H] and [H, cols]; with biases also
        db1 [2*cols] and db2 [H].
    """

    rows: np.ndarray
    cols: np.ndarray
    of_rows: tuple[np.ndarray, ...]
    of_cols: tuple[np.ndarray, ...]


def checked_experts(data: Data, most_rows: int = 64, most_cols: int = 32) -> dict[int, Wanted]:
    """What the fullest and the emptiest expert give: some rows whole, some columns over all rows.

    A model's whole expert in float64 takes the host up to a minute.
    """
    rows, factors, _, w1, w2 = data.operands
    spec = data.spec
    between = oracle.between(spec.activation, spec.activation_limit, spec.activation_alpha)
    used = [int(e) for e in np.argsort(data.sizes, kind="stable") if data.sizes[e] > 0]
    wanted = {}
    for expert in {used[0], used[-1]}:
        start, size = int(data.starts[expert]), int(data.sizes[expert])
        at = slice(start, start + size)
        x, up, down = (np.asarray(a) for a in (rows[at], w1[expert], w2[expert]))
        weight, d_y = (np.asarray(a[at], np.float64) for a in (factors, data.d_out))
        b1, b2 = (np.asarray(b[expert]) for b in data.biases) if data.biases else (None, None)
        some = _spread(size, most_rows)
        whole = oracle.mlp(x[some], up, down, weight[some, None] * d_y[some], b1, b2, between=between)
        d_weight = (whole.y * d_y[some]).sum(axis=1)
        cols = _spread(data.share.inner, most_cols)
        both = np.concatenate([cols, data.share.inner + cols])
        narrow_b1 = None if b1 is None else b1[both]
        narrow = oracle.mlp(x, up[both], down[:, cols], weight[:, None] * d_y, narrow_b1, b2, between=between)
        of_cols = (narrow.d_w1, narrow.d_w2, *((narrow.d_b1, narrow.d_b2) if data.biases else ()))
        wanted[expert] = Wanted(some, cols, (weight[some, None] * whole.y, whole.d_x, d_weight), of_cols)
    return wanted


def _spread(size: int, most: int) -> np.ndarray:
    """Up to ``most`` indices below ``size``, evenly, with the first and the last."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int32))


def errors(
    data: Data, wanted: dict[int, Wanted], results: Sequence[jax.Array], *, compact: bool = False
) -> dict[str, float]:
    """What is wrong with a result and, if there are more than one, its gradients.

    Args:
      data: what it was computed from.
      wanted: what it must be.
      results: out, and d_rows, d_row_weights, dw1, dw2, with biases db1 and db2.
      compact: the results have no padding.

    Returns:
      The largest relative error of the experts in ``wanted`` for each result; how many values of real rows
      and of weights are not finite; and the largest value in padding.
    """
    starts = starts_of(data.sizes) if compact else data.starts
    rows = int(results[0].shape[0])
    real = np.ones(rows, bool) if compact else real_rows(data.sizes, data.spec.block, rows)
    padding, bad = _whole(tuple(results), jnp.asarray(real))
    found = {"padding": float(padding), "non_finite": float(bad)}
    for expert, want in wanted.items():
        both = np.concatenate([want.cols, data.share.inner + want.cols])
        at_rows = (starts[expert] + want.rows).astype(np.int32)
        got = _parts(tuple(results), jnp.int32(expert), at_rows, both, want.cols)
        names = ("out", "d_rows", "d_row_weights", "dw1", "dw2", "db1", "db2")
        for name, a, b in zip(names, got, (*want.of_rows, *want.of_cols), strict=False):
            error = np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
            # np.maximum keeps a NaN, which max would lose.
            found[name] = float(np.maximum(found.get(name, 0.0), error))
    return found


def wrong(found: dict[str, float], dtype: str = "bf16") -> list[str]:
    """The names of errors that are too large for results of a dtype; NaN is."""
    return [name for name, error in found.items() if not error <= (0 if name in EXACT else LIMITS[dtype])]


@jax.jit
def _whole(results: tuple[jax.Array, ...], real: jax.Array) -> tuple[jax.Array, jax.Array]:
    # XLA's maximum on CPUs may lose a NaN.
    padding = [
        jnp.max(jnp.where(real[:, None], 0, jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf)))
        for x in results[:2]
    ]
    masks = [real.reshape(-1, *(1,) * (x.ndim - 1)) if i < 3 else True for i, x in enumerate(results)]
    bad = [
        jnp.sum((~jnp.isfinite(x)) & mask, dtype=jnp.float32) for x, mask in zip(results, masks, strict=True)
    ]
    return jnp.max(jnp.stack(padding)), sum(bad, jnp.float32(0))


@jax.jit
def _parts(
    results: tuple[jax.Array, ...], expert: jax.Array, rows: jax.Array, both: jax.Array, cols: jax.Array
) -> tuple[jax.Array, ...]:
    of_rows = [x[rows] for x in results[:3]]
    of_cols = [] if len(results) < 5 else [results[3][expert][both], results[4][expert][:, cols]]
    if len(results) > 5:
        of_cols += [results[5][expert][both], results[6][expert]]
    return (*of_rows, *of_cols)
