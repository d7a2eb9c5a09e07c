"""What a layer of ``bench layer --phase decode`` must give: NumPy in float64, also with quantised experts."""

from __future__ import annotations

import functools

import numpy as np

from jax_moriep.bench.problem import formula, layer_oracle, oracle
from jax_moriep.bench.problem.cases import Case

BLOCK = 128
"""Rows of a matrix that are turned together, and the side of the schemes' blocks."""
_MOST = {"e4m3fn": 448.0, "e4m3fnuz": 240.0}
_LEAST_EXPONENT = {"e4m3fn": -6, "e4m3fnuz": -7}
"""Of the numbers that have all four bits."""


def rounded(values: np.ndarray, axes: tuple[int, ...], format: str) -> np.ndarray:
    """What codes of groups leave of finite values.

    Args:
      values: f64.
      axes: along which the values of a group lie.
      format: of the codes, "e4m3fn", "e4m3fnuz" or "int8".
    """
    largest = np.abs(values).max(axis=axes, keepdims=True, initial=0.0)
    used = largest >= 2.0**-100
    if format == "int8":
        # In f32, as the scheme has it: the quotient of half the largest is all but a half, and rounds to one.
        scale = np.where(used, largest.astype(np.float32) / np.float32(127), np.float32(1))
        codes = np.rint(values.astype(np.float32) / scale).astype(np.float64)
        return np.where(used, codes * scale.astype(np.float64), 0.0)
    fraction, exponent = np.frexp(np.where(used, largest, 1.0) / _MOST[format])
    scale = np.ldexp(1.0, exponent - (fraction == 0.5))
    scaled = values / scale
    step = np.ldexp(1.0, np.maximum(np.frexp(scaled)[1] - 1, _LEAST_EXPONENT[format]) - 3)
    return np.where(used, np.rint(scaled / step) * step * scale, 0.0)


def rounded_columns(x: np.ndarray, group: int, format: str) -> np.ndarray:
    """Rows [..., W] with a scale for every ``group`` columns."""
    *lead, width = x.shape
    padded = np.pad(x, [(0, 0)] * len(lead) + [(0, -width % group)])
    return rounded(padded.reshape(*lead, -1, group), (-1,), format).reshape(padded.shape)[..., :width]


def rounded_weights(w: np.ndarray, scheme: str, parts: int, format: str) -> np.ndarray:
    """A matrix [N, D] of ``parts`` whose blocks do not mix."""
    if scheme != "fp8_block":
        return rounded_columns(w, w.shape[1], format)
    height, width = w.shape[0] // parts, w.shape[1]
    padded = np.pad(w.reshape(parts, height, width), [(0, 0), (0, -height % BLOCK), (0, -width % BLOCK)])
    blocks = padded.reshape(parts, padded.shape[1] // BLOCK, BLOCK, -1, BLOCK)
    return rounded(blocks, (2, 4), format).reshape(padded.shape)[:, :height, :width].reshape(w.shape)


class Weights:
    """The first expert's matrices as a scheme reads them, from which all others' results follow.

    Args:
      case: the case.
      scheme: None for experts that are not quantised.
      format: of the scheme's codes.
    """

    def __init__(self, case: Case, scheme: str | None, format: str) -> None:
        self.case, self.scheme, self.format = case, scheme, format
        shares = np.exp(layer_oracle.chosen_logits(case).astype(case.numpy_dtype).astype(np.float64))
        self.shares = shares / shares.sum()

    @functools.cached_property
    def _matrices(self) -> tuple[np.ndarray, np.ndarray]:
        inner, hidden = self.case.intermediate, self.case.hidden
        made = []
        for what, out, fan_in in ((formula.W1, 2 * inner, hidden), (formula.W2, hidden, inner)):
            w = formula.matrix(what, np.arange(out), fan_in, formula.exponent_for(fan_in)).astype(np.float64)
            if self.scheme is not None:
                w = rounded_weights(w, self.scheme, 2 if what == formula.W1 else 1, self.format)
            made.append(w)
        return made[0], made[1]

    def result(self, x: np.ndarray, ids: np.ndarray, layer: int) -> np.ndarray:
        """y f64[n, H] of tokens x f64[n, H] with the experts i32[n, K] of a layer."""
        case, scheme = self.case, self.scheme
        w1, w2 = self._matrices
        if scheme is not None:
            x = rounded_columns(x, BLOCK if scheme == "fp8_block" else case.hidden, self.format)
        gate_up = np.split(x @ w1.T, 2, axis=1)
        y = np.zeros(x.shape)
        for k, share in enumerate(self.shares):
            number = (layer * case.experts + ids[:, k]).astype(np.uint32)[:, None]
            pre = [_of_matrix(part, formula.W1, 2 * number + half) for half, part in enumerate(gate_up)]
            _, h = oracle.gated(np.concatenate(pre, axis=1), np.zeros(pre[0].shape))
            if scheme is not None:
                h = rounded_columns(h, BLOCK, self.format)
            y += share * _of_matrix(h @ w2.T, formula.W2, number)
        return y


def _of_matrix(product: np.ndarray, what: int, number: np.ndarray) -> np.ndarray:
    """Products with the first matrix, f64[n, out], as those with the matrices u32[n, 1]."""
    row = np.arange(product.shape[1], dtype=np.uint32)[None]
    source, factor = formula.by_blocks(what, number, row, product.shape[1], BLOCK)
    return np.take_along_axis(product, source.astype(np.int64), axis=1) * factor
