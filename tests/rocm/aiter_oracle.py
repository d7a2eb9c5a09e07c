"""What experts="aiter" must give, in NumPy and float64.

Rows are quantised by the rules of the scheme, activated rows as AITER's kernels do it: the largest element of
a part of a row becomes the format's largest, and int8 is cut off.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

FP8 = np.dtype(ml_dtypes.float8_e4m3fnuz)
LARGEST = {"fp8_block": 240.0, "fp8_token": 240.0, "int8_token": 127.0}
BLOCK = 128


class Gradients(NamedTuple):
    """With respect to rows and row weights."""

    rows: np.ndarray
    weights: np.ndarray


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def quantised_rows(x: np.ndarray, scheme: str) -> np.ndarray:
    """The values that are left of rows [n, H]."""
    groups = x.astype(np.float64).reshape(len(x), -1, BLOCK if scheme == "fp8_block" else x.shape[1])
    largest = np.abs(groups).max(axis=2, keepdims=True)
    if scheme == "int8_token":
        scale = largest.astype(np.float32) / np.float32(127)
        return (np.rint(groups.astype(np.float32) / scale) * scale.astype(np.float64)).reshape(x.shape)
    scale = np.exp2(np.ceil(np.log2(largest / LARGEST[scheme])))
    return ((groups / scale).astype(FP8).astype(np.float64) * scale).reshape(x.shape)


def quantised_activations(h: np.ndarray, scheme: str, tile: int) -> np.ndarray:
    """The values that are left of activated rows [n, I] in a kernel with tiles of so many columns."""
    groups = h.reshape(len(h), -1, BLOCK if scheme == "fp8_block" else tile)
    scale = np.abs(groups).max(axis=2, keepdims=True) / LARGEST[scheme]
    codes = groups / np.where(scale == 0, 1, scale)
    codes = np.trunc(codes) if scheme == "int8_token" else codes.astype(FP8).astype(np.float64)
    return (codes * scale).reshape(h.shape)


def dequantised(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Weights [L, N, D] whose N and D are multiples of 128 if a scale is for a block."""
    if scales.ndim == 2:
        return codes.astype(np.float64) * scales[..., None]
    return codes.astype(np.float64) * np.repeat(np.repeat(scales, BLOCK, 1), BLOCK, 2)


def experts(scheme, tile, block, rows, weights, sizes, w1, w2) -> np.ndarray:
    """The layer [C, H] of rows that lie by expert, weights being (codes, scales)."""
    w1, w2 = dequantised(*w1), dequantised(*w2)
    out = np.zeros(rows.shape)
    for expert, run in runs(sizes, block):
        pre = quantised_rows(rows[run], scheme) @ w1[expert].T
        gate, up = np.split(pre, 2, axis=1)
        h = quantised_activations(silu(gate) * up, scheme, tile)
        out[run] = h @ w2[expert].T * weights[run, None]
    return out


def gradients(scheme, block, rows, weights, sizes, w1, w2, d_out) -> Gradients:
    """The gradients where the forward pass was, as if nothing had been quantised on the way."""
    w1, w2 = dequantised(*w1), dequantised(*w2)
    found = Gradients(np.zeros(rows.shape), np.zeros(len(rows)))
    for expert, run in runs(sizes, block):
        gate, up = np.split(quantised_rows(rows[run], scheme) @ w1[expert].T, 2, axis=1)
        d_h = d_out[run].astype(np.float64) @ w2[expert]
        found.weights[run] = (d_h * silu(gate) * up).sum(axis=1)
        d_h *= weights[run, None]
        sigmoid = 1 / (1 + np.exp(-gate))
        d_gate = d_h * up * (sigmoid + gate * sigmoid * (1 - sigmoid))
        found.rows[run] = np.concatenate([d_gate, d_h * silu(gate)], axis=1) @ w1[expert]
    return found


def runs(sizes: np.ndarray, block: int) -> list[tuple[int, slice]]:
    """(expert, its rows) of rows that lie by expert, each one's run from a multiple of ``block`` on."""
    runs_of_all = -(-sizes // block) * block
    starts = np.cumsum(runs_of_all) - runs_of_all
    return [
        (e, slice(start, start + size))
        for e, (start, size) in enumerate(zip(starts, sizes, strict=True))
        if size
    ]
