"""What the compared results must be: NumPy loops in float64 that share no code with what they check."""

from __future__ import annotations

import dataclasses

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
    """A gated MLP ``y = w2 @ (silu(w1_gate @ x) * (w1_up @ x))`` of some rows, and its gradients.

    Attributes:
      y: f64[N, H].
      d_x: f64[N, H], of ``sum(y * d_y)``, as the two others.
      d_w1: f64[2*I, H].
      d_w2: f64[H, I].
    """

    y: np.ndarray
    d_x: np.ndarray
    d_w1: np.ndarray
    d_w2: np.ndarray


def mlp(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, d_y: np.ndarray) -> Mlp:
    """Evaluates the MLP of one expert in float64.

    Args:
      x: [N, H].
      w1: [2*I, H], gate rows, then up rows.
      w2: [H, I].
      d_y: [N, H].

    Returns:
      Its result and gradients.
    """
    x, w1, w2, d_y = (a.astype(np.float64) for a in (x, w1, w2, d_y))
    d_hidden, inner = gated(x @ w1.T, d_y @ w2)
    return Mlp(inner @ w2.T, d_hidden @ w1, d_hidden.T @ x, d_y.T @ inner)


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


def largest_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest absolute difference; NaN where either is NaN, 0 for empty arrays."""
    return float(np.max(np.abs(np.asarray(got).astype(np.float64) - want), initial=0.0))
