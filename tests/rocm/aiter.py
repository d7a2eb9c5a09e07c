"""A mixture of experts laid out as AITER's fused kernels want it, and what they must make of it, in NumPy.

M is the number of tokens, K of experts for each, E of experts, H the hidden and I the intermediate size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

BLOCK_ROWS = 32  # rows of a block, all of one expert
QUANTISATION_BLOCK = 128  # side of a block of weights that shares a scale
LARGEST = {np.dtype(np.int8): 127.0, np.dtype(ml_dtypes.float8_e4m3fnuz): 240.0}


@dataclass(frozen=True)
class Problem:
    """Tokens, their experts and weights, and the experts' matrices; gate and up are one, gate first."""

    tokens: np.ndarray  # float32 [M, H]
    experts: np.ndarray  # int32 [M, K]
    weights: np.ndarray  # float32 [M, K]
    w1: np.ndarray  # float32 [E, 2I, H], or [E, I, H] without a gate
    w2: np.ndarray  # float32 [E, H, I]

    @property
    def top_k(self) -> int:
        return self.experts.shape[1]

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2]


def draw(*, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, gated: bool) -> Problem:
    """A problem in which the first expert has most tokens and the last one none, if top_k allows that."""
    rng = np.random.default_rng([tokens, hidden, intermediate, experts, top_k])
    scores = rng.normal(size=(tokens, experts)) + np.linspace(1, 0, experts)
    scores[:, -1] = -np.inf
    weights = rng.random((tokens, top_k), dtype=np.float32) + 0.1
    rows = 2 * intermediate if gated else intermediate
    return Problem(
        rng.normal(size=(tokens, hidden)).astype(np.float32),
        np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32),
        weights / weights.sum(axis=1, keepdims=True),
        (rng.normal(size=(experts, rows, hidden)) / np.sqrt(hidden)).astype(np.float32),
        (rng.normal(size=(experts, hidden, intermediate)) / np.sqrt(intermediate)).astype(np.float32),
    )


@dataclass(frozen=True)
class Quantised:
    """values * scale, where a scale belongs to `block` elements of each axis."""

    values: np.ndarray
    scale: np.ndarray  # float32
    block: tuple[int, ...]

    def dequantised(self) -> np.ndarray:
        scale = self.scale.astype(np.float64)
        for axis, size in enumerate(self.block):
            scale = np.repeat(scale, size, axis)
        return self.values.astype(np.float64) * scale


def round_to(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """To the nearest value of the type; halves go to even ones."""
    return np.rint(array).astype(dtype) if dtype == np.int8 else array.astype(dtype)


def quantise(array: np.ndarray, dtype: object, block: tuple[int, ...]) -> Quantised:
    """Scales each block so that its largest element becomes the type's largest."""
    dtype = np.dtype(dtype)
    shape = [n for size, length in zip(block, array.shape, strict=True) for n in (length // size, size)]
    largest = np.abs(array.reshape(shape)).max(axis=tuple(range(1, len(shape), 2)))
    scale = (largest / LARGEST[dtype]).astype(np.float32)
    unit = Quantised(np.ones_like(array), scale, block).dequantised()
    return Quantised(round_to(array / unit, dtype), scale, block)


def per_row(array: np.ndarray, dtype: object) -> Quantised:
    return quantise(array, dtype, (1,) * (array.ndim - 1) + array.shape[-1:])


def shuffle(weights: np.ndarray) -> np.ndarray:
    """Tiles of 16 rows and 32 columns, in each the 16 bytes that a lane loads at once next to each other."""
    count, rows, columns = weights.shape
    lane = 16 // weights.dtype.itemsize
    tiles = weights.reshape(count, rows // 16, 16, columns // 32, 32 // lane, lane)
    return np.ascontiguousarray(tiles.transpose(0, 1, 3, 4, 2, 5)).reshape(weights.shape)


@dataclass(frozen=True)
class Sorted:
    """The (token, k) pairs in the order of their experts, each expert's padded to whole blocks of rows."""

    pairs: np.ndarray  # uint32: k << 24 | token
    weights: np.ndarray  # float32
    experts: np.ndarray  # int32, one for each block
    valid: np.ndarray  # int32: padded pairs, tokens

    @classmethod
    def of(cls, problem: Problem) -> "Sorted":
        tokens, top_k = problem.experts.shape
        experts = len(problem.w1)
        padding = top_k << 24 | tokens
        pairs, weights, blocks = [], [], []
        for expert in range(experts):
            token, k = np.nonzero(problem.experts == expert)
            missing = -len(token) % BLOCK_ROWS
            pairs += [*(k << 24 | token), *[padding] * missing]
            weights += [*problem.weights[token, k], *[0.0] * missing]
            blocks += [expert] * ((len(token) + missing) // BLOCK_ROWS)
        # The launch is as large as the routing that needs most blocks; the kernel must leave the rest alone.
        most = -(-(tokens * top_k + experts * BLOCK_ROWS - top_k) // BLOCK_ROWS)
        unused = most - len(blocks)
        return cls(
            np.array(pairs + [padding] * (unused * BLOCK_ROWS), np.uint32),
            np.array(weights + [np.nan] * (unused * BLOCK_ROWS), np.float32),
            np.array(blocks + [experts] * unused, np.int32),
            np.array([len(pairs), tokens], np.int32),
        )


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def reference(
    problem: Problem,
    rows: np.ndarray,
    w1: np.ndarray,
    w2: np.ndarray,
    activate: Callable[[np.ndarray], np.ndarray],
    between: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """What the layer makes of the pairs' rows [K, M, H] with these weights, in float64.

    Args:
        activate: Of the first product's columns, one activated row.
        between: Of an activated row and its expert, what the second product is made of.
    """
    result = np.zeros(problem.tokens.shape)
    for token, k in np.ndindex(problem.experts.shape):
        expert = problem.experts[token, k]
        row = between(activate(w1[expert] @ rows[k, token]), expert)
        result[token] += problem.weights[token, k] * (w2[expert] @ row)
    return result


@dataclass(frozen=True)
class Arguments:
    """The arguments of a fused kernel by the names in its code object. The output array is O."""

    arrays: dict[str, np.ndarray]
    values: dict[str, int]

    @classmethod
    def of(
        cls,
        problem: Problem,
        tokens: np.ndarray,
        w1: np.ndarray,
        w2: np.ndarray,
        scales: Sequence[np.ndarray] = (),
        smooth: np.ndarray | None = None,
    ) -> "Arguments":
        """Shuffles, sorts, and counts strides in bytes.

        Args:
            tokens: What the kernel reads as rows, [M, H], or [K * M, H] where each pair has a row of its own.
            w1: [E, 2I, H] or [E, I, H], in its storage type.
            w2: [E, H, I], likewise.
            scales: Those of tokens, w1 and w2, or none.
            smooth: float32 [E, I], multiplied with the activated rows.
        """
        order = Sorted.of(problem)
        count, hidden = problem.tokens.shape
        arrays = {
            "O": np.zeros((count, hidden), ml_dtypes.bfloat16),
            "X": tokens,
            "G": shuffle(w1),
            "U": order.valid,
            "D": shuffle(w2),
            "STP": order.pairs,
            "SW": order.weights,
            "SEP": order.experts,
        }
        values = {
            "dim": hidden,
            "hdim": problem.intermediate,
            "batch": count,
            "eprt": len(w1),
            "Xs": tokens.strides[0],
            "GUs": w1.strides[1],
            "Ds": w2.strides[1],
            "Os": hidden * 2,
            "eGUs": w1.strides[0],
            "eDs": w2.strides[0],
            "eGUQs": 0,
            "eDQs": 0,
            "eSMQs": problem.intermediate * 4,
            "topk": problem.top_k,
        }
        if scales:
            arrays.update(zip(("XQ", "GQ", "DQ"), scales, strict=True))
            values.update(eGUQs=scales[1].strides[0], eDQs=scales[2].strides[0])
        if smooth is not None:
            arrays["SMQ"] = smooth
        null = {name: 0 for name in ("XQ", "GQ", "DQ", "SMQ") if name not in arrays}
        return cls(arrays, values | null)
