"""To how many ranks and nodes a token goes: expected of a popularity, or counted in routes.

A token chooses K distinct experts, each next one in proportion to the popularity of those that are left. That
is the race of independent clocks, expert e's of rate p_e: the K that ring first. A set of experts is chosen
from if its first clock rings before the K-th of the others, so the chance is

    integral over t of p_A exp(-p_A t) P(fewer than K of the others have rung at t)

with p_A the sum of the set's rates; that probability is a recurrence over the others (Poisson-binomial). It
is exact but for the quadrature, which is far below the digits that are shown.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jax_moriep.errors import ConfigError, rule

_NODES = 160
"""Points of the quadrature."""
_FEW_NODES = 48
_FITS = 12
_ENOUGH = 1e-3
"""Relative error at which a fit ends; the bench's own numbers are held to 1%."""
_SAMPLED = 1 << 16
_COUNTED = 1 << 22
"""Tokens times ranks that are counted at once."""


@dataclasses.dataclass(frozen=True)
class Destinations:
    """Where tokens go, of S sources: each rank, or one that stands for all.

    Attributes:
      to_rank: f64[S, R], the share of a source's tokens that goes to a rank, to however many experts there.
      to_node: f64[S, N], the same for nodes.
      routes: f64[S, R], routes of one token to a rank: rows that it makes there.
    """

    to_rank: np.ndarray
    to_node: np.ndarray
    routes: np.ndarray

    @property
    def ranks(self) -> int:
        """R."""
        return self.to_rank.shape[1]

    @property
    def per_node(self) -> int:
        """P."""
        return self.ranks // self.to_node.shape[1]

    def to_other_places(self, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What goes inside nodes, as each rank brings the tokens of its place, from all nodes, to its node.

        Args:
          of: ``to_rank`` or ``routes``.

        Returns:
          f64[R] out: of all sources at this rank's place in their nodes, what is for other ranks of its node.
          f64[R] in: of all sources at other places, what is for this rank. With one node a place is a rank.
        """
        nodes, places = self.to_node.shape[1], self.per_node
        if len(of) == 1:
            by_place = of.reshape(nodes, places)
            out = nodes * (by_place.sum(1, keepdims=True) - by_place)
            into = (self.ranks - nodes) * by_place
            return out.reshape(-1), into.reshape(-1)
        each = of.reshape(nodes, places, nodes, places)
        same = np.einsum("mpnp->np", each)
        out = each.sum((0, 3)).T - same
        return out.reshape(-1), (each.sum((0, 1)) - same).reshape(-1)

    def to_other_nodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens between nodes, one for each node: f64[R] out, and f64[R] in, at the place of the source."""
        nodes, places = self.to_node.shape[1], self.per_node
        if len(self.to_node) == 1:
            here = self.to_node[0]
            out = np.repeat(here.sum() - here, places)
            return out, np.repeat((nodes - 1) * here, places)
        each = self.to_node.reshape(nodes, places, nodes)
        own = np.einsum("npn->np", each)
        return (each.sum(2) - own).reshape(-1), (each.sum(0).T - own).reshape(-1)

    def rows(self) -> np.ndarray:
        """f64[R], rows that a rank computes for one token of every rank."""
        return self.routes.sum(0) * (self.ranks / len(self.routes))


def zipf(num_experts: int) -> np.ndarray:
    """f64[E]: popularity n falls as 1/n; popular experts are dealt over the ranks in a fixed shuffle."""
    return np.random.default_rng(0).permutation(1.0 / np.arange(1, num_experts + 1))


def of_popularity(
    popularity: np.ndarray, top_k: int, ranks: int, per_node: int, chosen: np.ndarray
) -> Destinations:
    """What a popularity f64[E] makes of a token's K routes, on all ranks alike.

    ``chosen`` f64[E] is the chance of each expert, ``chosen_from`` of sets of one, which no R changes.
    """
    local = -(-len(popularity) // ranks)
    experts = np.arange(len(popularity))
    every = np.zeros(ranks)
    every[: experts[-1] // local + 1] = chosen_from(popularity, top_k, experts // local)
    nodes = np.zeros(ranks // per_node)
    of_node = experts // (local * per_node)
    nodes[: of_node[-1] + 1] = chosen_from(popularity, top_k, of_node)
    routes = np.zeros(ranks)
    np.add.at(routes, experts // local, chosen)
    return Destinations(every[None], nodes[None], routes[None])


def of_ids(ids: np.ndarray, num_experts: int, ranks: int, per_node: int, *, of_all: bool) -> Destinations:
    """Counts routes, some tokens at a time: the memory that it takes does not grow with their number.

    Args:
      ids: i32[N, K]; what is no expert leads nowhere.
      num_experts: E.
      ranks: R.
      per_node: P.
      of_all: they are all tokens in rank order, R times T; else of tokens that stand for those of any rank.
    """
    local = -(-num_experts // ranks)
    # Of whole nodes that have experts: of many ranks few may.
    nodes = -(-num_experts // (local * per_node))
    used = nodes * per_node
    sources = ranks if of_all else 1
    tokens = len(ids) // sources
    to_rank, routes = np.zeros((2, sources, ranks))
    to_node = np.zeros((sources, ranks // per_node))
    some = max(1, _COUNTED // used)
    for source in range(sources):
        for first in range(source * tokens, (source + 1) * tokens, some):
            part = ids[first : min(first + some, (source + 1) * tokens)]
            rank = np.where((part >= 0) & (part < num_experts), part // local, used)
            by_rank = np.zeros((len(part), used + 1), np.int32)
            np.add.at(by_rank, (np.arange(len(part))[:, None], rank), 1)
            by_rank = by_rank[:, :used]
            routes[source, :used] += by_rank.sum(0)
            to_rank[source, :used] += (by_rank > 0).sum(0)
            to_node[source, :nodes] += by_rank.reshape(-1, nodes, per_node).any(-1).sum(0)
    return Destinations(to_rank / tokens, to_node / tokens, routes / tokens)


def evened(to: Destinations, num_experts: int) -> Destinations:
    """The same for experts that are equally popular: ranks and nodes with equally many get their mean.

    Of sampled routes the rank with the most would else be the one that the sample favours.
    """
    local = -(-num_experts // to.ranks)
    experts = np.arange(num_experts)

    def even(of: np.ndarray, each: int) -> np.ndarray:
        held = np.bincount(experts // each, minlength=of.shape[1])
        return (np.bincount(held, of.mean(0))[held] / np.bincount(held)[held])[None]

    return Destinations(
        even(to.to_rank, local), even(to.to_node, local * to.per_node), even(to.routes, local)
    )


def chosen_from(popularity: np.ndarray, top_k: int, sets: np.ndarray, points: int = _NODES) -> np.ndarray:
    """The chance that a token chooses at least one expert of a set.

    Args:
      popularity: f64[E], all positive.
      top_k: K.
      sets: i32[E], the set that each expert is in, from 0 on, none empty.
      points: of the quadrature.

    Returns:
      f64[number of sets].
    """
    count = int(sets.max()) + 1
    if top_k >= len(popularity):
        return np.ones(count)
    if np.ptp(popularity) == 0:
        every = math.comb(len(popularity), top_k)
        others = len(popularity) - np.bincount(sets)
        return np.array([1 - math.comb(int(n), top_k) / every for n in others])
    # t = tau v / (1 - v) for v in (0, 1), where tau is about when the K-th clock rings.
    v, weight = np.polynomial.legendre.leggauss(points)
    v, weight = (v + 1) / 2, weight / 2
    tau = _when(popularity, top_k)
    t, weight = tau * v / (1 - v), weight * tau / (1 - v) ** 2
    rung = -np.expm1(-popularity[:, None] * t)
    rate = np.bincount(sets, popularity, count)
    # [set, t, k]: the chance that k of the experts outside the set have rung, for k below K.
    chance = np.zeros((count, len(t), top_k))
    chance[:, :, 0] = 1
    for e, q in enumerate(rung):
        moved = chance * q[:, None]
        moved[sets[e]] = 0
        chance -= moved
        chance[:, :, 1:] += moved[:, :, :-1]
    return ((rate[:, None] * np.exp(-rate[:, None] * t)) * chance.sum(2)) @ weight


def fitted(counts: np.ndarray, top_k: int) -> np.ndarray:
    """The popularity f64[E] under which experts are chosen as often as they were counted.

    None is taken for a hundredth of a time, always for nearly so.

    Raises:
      ConfigError: they cannot be counts of routes.
    """
    if not (counts >= 0).all() or counts.max() * top_k > counts.sum():
        cure = f"give how often each expert was chosen, by tokens that choose {top_k} each"
        must = "have no negative count, and no expert that is chosen more often than there are tokens"
        raise ConfigError(rule("counts", counts.tolist(), must, cure))
    wanted = np.maximum(counts.astype(np.float64), 0.01)
    wanted *= top_k / wanted.sum()
    wanted = np.minimum(wanted, 0.999)
    # Had all clocks the same time, and not until the K-th rings, this would be the answer.
    popularity = -np.log1p(-wanted)
    every = np.arange(len(counts))
    for _ in range(_FITS):
        chosen = chosen_from(popularity, top_k, every, _FEW_NODES)
        if np.abs(wanted / chosen - 1).max() < _ENOUGH:
            break
        popularity *= np.log1p(-wanted) / np.log1p(-np.minimum(chosen, 1 - 1e-9))
    return popularity


def sampled(
    popularity: np.ndarray, top_k: int, groups: int, top_groups: int, *, two_best: bool
) -> np.ndarray:
    """i32[N, K]: routes that keep to some groups of experts, as DeepSeek's routers do.

    Args:
      popularity: f64[E].
      top_k: K.
      groups: of equally many experts.
      top_groups: how many of them a token's experts are in.
      two_best: a group counts by its two best experts (DeepSeek-V3), not by its best (V2).
    """
    rng = np.random.default_rng(0)
    scores = popularity / rng.exponential(size=(_SAMPLED, len(popularity)))
    best = np.sort(scores.reshape(_SAMPLED, groups, -1), axis=-1)[..., -2 if two_best else -1 :].sum(-1)
    kept = np.argsort(-best, axis=1)[:, :top_groups]
    mask = np.zeros((_SAMPLED, groups), bool)
    np.put_along_axis(mask, kept, True, axis=1)
    scores *= np.repeat(mask, len(popularity) // groups, axis=1)
    return np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)


def _when(popularity: np.ndarray, top_k: int) -> float:
    """The time at which K clocks have rung in expectation."""
    low, high = 0.0, 1.0
    while -np.expm1(-popularity * high).sum() < top_k:
        high *= 2
        if high > 1e9 / popularity.min():
            break
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-popularity * middle).sum() < top_k else (low, middle)
    return high
