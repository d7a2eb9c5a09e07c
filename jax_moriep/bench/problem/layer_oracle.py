"""What ``bench layer`` must give: NumPy in float64, of a few tokens and of a part of a weight's gradient."""

from __future__ import annotations

import numpy as np

from jax_moriep.bench.problem import formula, oracle
from jax_moriep.bench.problem.cases import Case


def chosen_logits(case: Case) -> np.ndarray:
    """f32[K], the logits of a token's experts: above all others, and no rounding changes their order."""
    return np.linspace(3, 2, case.top_k, dtype=np.float32)


class Problem:
    """The layer's operands, made again where they are needed.

    Args:
      case: the case.
      ids: i32[R*T, K].
    """

    def __init__(self, case: Case, ids: np.ndarray) -> None:
        self.case, self.ids = case, ids
        self.kept = oracle.place_routes(ids, case.shape).row_of_route != oracle.DROPPED
        self.chosen = chosen_logits(case).astype(case.numpy_dtype).astype(np.float64)
        # softmax_topk's weights, normalised, are a softmax over the chosen logits.
        shares = np.exp(self.chosen - self.chosen.max())
        self.weights = shares / shares.sum()
        inner, hidden = case.intermediate, case.hidden

        def first(what: int, out: int, fan_in: int) -> np.ndarray:
            made = formula.matrix(what, np.arange(out), fan_in, formula.exponent_for(fan_in))
            return made.astype(np.float64)

        self.w1 = first(formula.W1, 2 * inner, hidden)
        self.w2 = first(formula.W2, hidden, inner)

    def x(self, tokens: np.ndarray) -> np.ndarray:
        """f64[n, H]."""
        x = formula.matrix(formula.TOKENS, tokens, self.case.hidden).astype(np.float64)
        np.put_along_axis(x, self.ids[tokens], self.chosen[None], axis=1)
        return x

    def d_y(self, tokens: np.ndarray) -> np.ndarray:
        """f64[n, H]."""
        return formula.matrix(formula.COTANGENTS, tokens, self.case.hidden).astype(np.float64)

    def of_tokens(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y and d_x of some tokens, each f64[n, H]."""
        x, d_y = self.x(tokens), self.d_y(tokens)
        at, k = np.nonzero(self.kept[tokens])
        expert, weight = self.ids[tokens[at], k], self.weights[k, None]
        d_hidden, inner = self._inside(expert, x[at], weight * d_y[at])
        of_expert = _turned(inner @ self.w2.T, expert * formula.STEPS[formula.W2])
        y, d_x = np.zeros_like(x), np.zeros_like(x)
        np.add.at(y, at, weight * of_expert)
        np.add.at(d_x, at, _turned(d_hidden, -expert * formula.STEPS[formula.W1]) @ self.w1)
        d_route = np.zeros((tokens.size, self.case.top_k))
        d_route[at, k] = (d_y[at] * of_expert).sum(axis=1)
        d_logits = self.weights * (d_route - d_route @ self.weights[:, None])
        for i, token in enumerate(tokens):
            d_x[i, self.ids[token]] += d_logits[i]
        return y, d_x

    def weight_gradients(
        self, expert: int, columns1: np.ndarray, columns2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Columns of the gradients of an expert's w1 and w2, f64[2*I, n] and f64[H, m]."""
        token, k = np.nonzero((self.ids == expert) & self.kept)
        x, d_y = self.x(token), self.weights[k, None] * self.d_y(token)
        d_hidden, inner = self._inside(np.full(token.size, expert), x, d_y)
        return d_hidden.T @ x[:, columns1], d_y.T @ inner[:, columns2]

    def _inside(self, expert: np.ndarray, x: np.ndarray, d_y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``oracle.gated`` of rows whose experts are given.

        An expert's product is the first expert's, turned: no matrix is made for it.
        """
        hidden = _turned(x @ self.w1.T, expert * formula.STEPS[formula.W1])
        d_inner = _turned(d_y, -expert * formula.STEPS[formula.W2]) @ self.w2
        return oracle.gated(hidden, d_inner)


def _turned(rows: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Each row rolled by a number of its own."""
    size = rows.shape[1]
    return np.take_along_axis(rows, (np.arange(size) - by[:, None]) % size, axis=1)
