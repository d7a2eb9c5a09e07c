"""Routing patterns: where a run's tokens go, the same on every machine for one seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Pattern = Callable[[np.random.Generator, int, int, int], np.ndarray]


def uniform(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """Every expert is as likely as any other."""
    return _draw(rng, num_tokens, np.ones(num_experts), top_k)


def zipf(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """The expert of popularity n is drawn in proportion to 1/n; the popular ones lie anywhere."""
    return _draw(rng, num_tokens, rng.permutation(1.0 / np.arange(1, num_experts + 1)), top_k)


def one_hot(rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int) -> np.ndarray:
    """Every token goes to experts 0 to K-1, which lie on one rank, or on few."""
    del rng, num_experts
    return np.tile(np.arange(top_k, dtype=np.int32), (num_tokens, 1))


PATTERNS: dict[str, Pattern] = {"uniform": uniform, "zipf": zipf, "one-hot": one_hot}
"""Each gives i32[num_tokens, top_k], the experts of a token being distinct."""


def _draw(rng: np.random.Generator, num_tokens: int, popularity: np.ndarray, top_k: int) -> np.ndarray:
    """Draws without replacement, with probabilities in proportion to ``popularity``.

    The k first arrivals of independent exponential clocks, each as fast as its expert is popular, are such a
    draw.
    """
    arrivals = rng.exponential(size=(num_tokens, popularity.size)) / popularity
    return np.argsort(arrivals, axis=1, kind="stable")[:, :top_k].astype(np.int32)
