"""What the compared results must be: NumPy loops in float64 that share no code with what they check."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from jax_moriep.plan import ExchangeShape

DROPPED = -1


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where an exchange puts every route.

    Attributes:
      row_of_route: i64[R*T, K], the row on the rank of the route's expert, or ``DROPPED``.
      counts: i64[R*L], rows that each expert keeps.
    """

    row_of_route: np.ndarray
    counts: np.ndarray

    def on(
        self, rank: int, ids: np.ndarray, shape: ExchangeShape
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token, k, row) of all rows that a rank receives, each i64[rows]."""
        here = (ids // shape.num_local_experts == rank) & (self.row_of_route != DROPPED)
        token, k = np.nonzero(here)
        return token, k, self.row_of_route[token, k]

    def counts_on(self, rank: int, shape: ExchangeShape) -> np.ndarray:
        """i64[L], rows of each expert of a rank."""
        return self.counts[rank * shape.num_local_experts :][: shape.num_local_experts]


def place_routes(ids: np.ndarray, shape: ExchangeShape) -> Rows:
    """Gives routes their rows: by local expert, then source rank, then source token.

    Args:
      ids: i32[R*T, K], valid expert ids of all tokens in rank order.
      shape: the sizes; every expert's run starts at a multiple of ``block``, rows from ``capacity`` on drop.

    Returns:
      The rows.
    """
    row_of_route = np.full(ids.shape, DROPPED, np.int64)
    counts = np.zeros(shape.num_ranks * shape.num_local_experts, np.int64)
    for rank in range(shape.num_ranks):
        row = 0
        for expert in range(rank * shape.num_local_experts, (rank + 1) * shape.num_local_experts):
            while row % shape.block:
                row += 1
            for token, k in np.argwhere(ids == expert):
                if row < shape.capacity:
                    row_of_route[token, k] = row
                    counts[expert] += 1
                row += 1
    return Rows(row_of_route, counts)


@dataclasses.dataclass(frozen=True)
class Mlp:
    """A gated MLP ``y = w2 @ (silu(w1_gate @ x + b1_gate) * (w1_up @ x + b1_up)) + b2`` of some rows, and its
    gradients.

    Attributes:
      y: f64[N, H].
      d_x: f64[N, H], of ``sum(y * d_y)``, as all others.
      d_w1: f64[2*I, H].
      d_w2: f64[H, I].
      d_b1: f64[2*I].
      d_b2: f64[H].
    """

    y: np.ndarray
    d_x: np.ndarray
    d_w1: np.ndarray
    d_w2: np.ndarray
    d_b1: np.ndarray
    d_b2: np.ndarray


Between = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""What is between an MLP's two products, as ``gated`` is."""


def mlp(
    x: np.ndarray,
    w1: np.ndarray,
    w2: np.ndarray,
    d_y: np.ndarray,
    b1: np.ndarray | None = None,
    b2: np.ndarray | None = None,
    *,
    between: Between | None = None,
) -> Mlp:
    """Evaluates the MLP of one expert in float64.

    Args:
      x: [N, H].
      w1: [2*I, H], gate rows, then up rows.
      w2: [H, I].
      d_y: [N, H].
      b1: [2*I]; None for zeros.
      b2: [H]; None for zeros.
      between: the activation; None for ``gated``.

    Returns:
      Its result and gradients.
    """
    x, w1, w2, d_y = (a.astype(np.float64) for a in (x, w1, w2, d_y))
    hidden, added = (0.0 if b is None else b.astype(np.float64) for b in (b1, b2))
    d_hidden, inner = (between or gated)(x @ w1.T + hidden, d_y @ w2)
    by_bias = d_hidden.sum(axis=0), d_y.sum(axis=0)
    return Mlp(inner @ w2.T + added, d_hidden @ w1, d_hidden.T @ x, d_y.T @ inner, *by_bias)


def between(activation: str, limit: float, alpha: float) -> Between:
    """What the experts of an activation compute between their products.

    Args:
      activation: "silu" or "swiglu_clamped".
      limit: of the clamp.
      alpha: the slope of its sigmoid.
    """
    return {"silu": gated, "swiglu_clamped": functools.partial(_clamped, limit, alpha)}[activation]


def gated(hidden: np.ndarray, d_inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is between the MLP's two products.

    Args:
      hidden: f64[N, 2*I], gates, then ups.
      d_inner: f64[N, I], the gradient of the second product's operand.

    Returns:
      The gradient of ``hidden``, and the second product's operand f64[N, I].
    """
    gate, up = np.split(hidden, 2, axis=1)
    sigmoid = 1 / (1 + np.exp(-gate))
    silu = gate * sigmoid
    d_gate = d_inner * up * (sigmoid + silu * (1 - sigmoid))
    return np.concatenate([d_gate, d_inner * silu], axis=1), silu * up


def _clamped(
    limit: float, alpha: float, hidden: np.ndarray, d_inner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """As ``gated``: ``(up + 1) * gate * sigmoid(alpha * gate)``, the gate at most and the up within limit."""
    raw_gate, raw_up = np.split(hidden, 2, axis=1)
    gate, up = np.minimum(raw_gate, limit), np.clip(raw_up, -limit, limit)
    sigmoid = 1 / (1 + np.exp(-alpha * gate))
    d_gate = d_inner * (up + 1) * (sigmoid + alpha * gate * sigmoid * (1 - sigmoid)) * (raw_gate <= limit)
    d_up = d_inner * gate * sigmoid * (np.abs(raw_up) <= limit)
    return np.concatenate([d_gate, d_up], axis=1), (up + 1) * gate * sigmoid


def largest_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference; NaN where either is NaN, 0 for empty arrays."""
    return float(np.max(np.abs(np.asarray(got).astype(np.float64) - want), initial=0.0))
