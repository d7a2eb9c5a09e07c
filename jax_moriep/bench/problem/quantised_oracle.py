"""What quantised experts must give: some rows and columns of the fullest one, of values that NumPy rounds."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep import schemes
from jax_moriep.bench.problem import shares
from jax_moriep.bench.problem.shares import Data
from jax_moriep.experts import ExpertWeights

LIMIT = 3e-2
"""Largest relative error: bf16 between the steps moves codes that lie near a border of two."""
_ROWS, _COLS = 64, 32


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


def forward_errors(data: Data, frozen: ExpertWeights, scheme: str, got: Any) -> dict[str, float]:
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


def gradient_errors(data: Data, scheme: str, got: Any) -> dict[str, float]:
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
