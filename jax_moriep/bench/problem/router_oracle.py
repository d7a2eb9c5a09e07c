"""What DeepSeek-V3's router must give: NumPy in float64."""

from __future__ import annotations

import numpy as np

from jax_moriep.config import MoEConfig


class Problem:
    """A router's operands, and what it chose.

    Args:
      cfg: of the layer.
      x: [T, H].
      router: [H, E].
      bias: [E], of the scores, for the choice alone.
      ids: i32[T, K], what was chosen; the weights are of these.
    """

    def __init__(
        self, cfg: MoEConfig, x: np.ndarray, router: np.ndarray, bias: np.ndarray, ids: np.ndarray
    ) -> None:
        self.cfg, self.ids = cfg, ids
        self.x, self.router = x.astype(np.float64), router.astype(np.float64)
        self.scores = 1 / (1 + np.exp(-(self.x @ self.router)))
        self._choice = self.scores + bias
        chosen = np.take_along_axis(self.scores, ids, axis=1)
        self._total = chosen.sum(axis=1, keepdims=True) if cfg.norm_topk else np.ones((len(ids), 1))
        self.weights = chosen / self._total * cfg.routed_scaling

    def other_choices(self) -> float:
        """The part of the tokens for which other experts are the best."""
        choice, groups = self._choice, self.cfg.num_groups
        if groups is not None and self.cfg.top_groups is not None:
            by_group = choice.reshape(len(choice), groups, -1)
            of_group = np.sort(by_group, axis=2)[:, :, -2:].sum(axis=2)
            kept = np.argsort(-of_group, axis=1, kind="stable")[:, : self.cfg.top_groups]
            is_kept = np.zeros(of_group.shape, bool)
            np.put_along_axis(is_kept, kept, True, axis=1)
            choice = np.where(is_kept[:, :, None], by_group, -np.inf).reshape(choice.shape)
        best = np.argsort(-choice, axis=1, kind="stable")[:, : self.ids.shape[1]]
        return float(np.mean((np.sort(best, axis=1) != np.sort(self.ids, axis=1)).any(axis=1)))

    def d_logits(self, d_weights: np.ndarray) -> np.ndarray:
        """f64[T, E], of weights' gradients [T, K]."""
        d_chosen = d_weights.astype(np.float64) * self.cfg.routed_scaling / self._total
        if self.cfg.norm_topk:
            shares = self.weights / self.cfg.routed_scaling
            d_chosen -= (d_chosen * shares).sum(axis=1, keepdims=True)
        scores = np.take_along_axis(self.scores, self.ids, axis=1)
        d_logits = np.zeros(self.scores.shape)
        np.put_along_axis(d_logits, self.ids, d_chosen * scores * (1 - scores), axis=1)
        return d_logits
