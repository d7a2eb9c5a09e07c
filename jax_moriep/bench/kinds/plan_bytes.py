"""What an exchange moves over which link, what it needs in memory, and how long it takes at least: on paper.

Formulas in NumPy alone, of sizes and of where tokens go. Bytes are those of one layer's exchange on each
rank, out and in apart, inside the node and between nodes. They are what the transports' formats require,
which ``tests/unit/test_bench_plan.py`` and ``tests/nodes`` hold against bytes that were counted; headers of
networks are not among them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jax_moriep.bench.problem.destinations import Destinations

_WORD = 4
_SIGNAL = 24
"""Bytes that a step of native and mori says to each peer: its number, what it exchanges, and its order."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one layer's exchange, and of the model.

    Attributes:
      ranks: R.
      per_node: P.
      tokens: T.
      top_k: K.
      experts: E.
      hidden: H.
      inner: I.
      shared: the shared expert's inner width, or 0.
      layers: MoE layers.
      row_bytes: of a token as dispatch sends it.
      value_bytes: of one value of x.
      weight_bytes: of one of the experts' weights.
      capacity: C.
      words: W, what a dispatch carries from each rank to each.
      to_every_node: MORI's kernel for few tokens sends each of them to every other node, and back.
    """

    ranks: int
    per_node: int
    tokens: int
    top_k: int
    experts: int
    hidden: int
    inner: int
    shared: int
    layers: int
    row_bytes: int
    value_bytes: int
    weight_bytes: float
    capacity: int
    words: int
    to_every_node: bool = False

    @property
    def nodes(self) -> int:
        """N."""
        return self.ranks // self.per_node

    @property
    def sum_bytes(self) -> int:
        """Of a row that combine sends."""
        return self.hidden * self.value_bytes

    @property
    def routing_bytes(self) -> int:
        """Of a token's ids and weights."""
        return 2 * _WORD * self.top_k

    @property
    def block_bytes(self) -> int:
        """What a rank gives a dispatch of gathered tokens: tokens, routing and words."""
        return self.tokens * (self.row_bytes + self.routing_bytes) + _WORD * self.words


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes of one exchange on each rank, f64[R]; ``spread``: libraries may share what crosses between nodes
    among a node's ranks, so that their mean counts for the time and not the rank with the most."""

    inside_out: np.ndarray
    inside_in: np.ndarray
    between_out: np.ndarray
    between_in: np.ndarray
    spread: bool = False

    def seconds(self, inside: float, between: float) -> float:
        """The least time, at bytes per second of a rank in each direction inside and between nodes."""
        inner = max(self.inside_out.max(), self.inside_in.max()) / inside
        outer = [
            values.mean() if self.spread else values.max() for values in (self.between_out, self.between_in)
        ]
        return float(max(inner, max(outer) / between))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Both ways of an exchange, and the bytes of memory of a rank beside weights and rows."""

    dispatch: Moved
    combine: Moved
    buffers: int

    def seconds(self, inside: float, between: float, *, training: bool = False) -> float:
        """The least time of a layer's exchanges; a backward pass moves the sums' bytes twice more."""
        back = self.combine.seconds(inside, between)
        return self.dispatch.seconds(inside, between) + (3 if training else 1) * back


def native(sizes: Sizes, to: Destinations) -> Exchange:
    """One machine: each rank reads what it needs of the others' tokens and routing, and writes back sums."""
    return two_level(sizes, to)


def two_level(sizes: Sizes, to: Destinations) -> Exchange:
    """Tokens and routing are gathered over the nodes, rank by rank; inside a node it is native."""
    others, nodes = sizes.per_node - 1, sizes.nodes
    out, into = (sizes.tokens * share for share in to.to_other_places(to.to_rank))
    rows_out, rows_in = (sizes.tokens * share for share in to.to_other_places(to.routes))
    signals = others * _SIGNAL
    routing = others * nodes * _WORD * (sizes.tokens * sizes.top_k + sizes.words)
    gathered = np.full(sizes.ranks, float((nodes - 1) * sizes.block_bytes))
    given_back = np.full(sizes.ranks, float((nodes - 1) * sizes.tokens * sizes.sum_bytes))
    held = 0 if nodes == 1 else nodes * (sizes.block_bytes + sizes.tokens * sizes.sum_bytes)
    return Exchange(
        Moved(
            out * sizes.row_bytes + rows_out * _WORD + routing + signals,
            into * sizes.row_bytes + rows_in * _WORD + routing + signals,
            *(gathered, gathered),
        ),
        Moved(into * sizes.sum_bytes + signals, out * sizes.sum_bytes + signals, given_back, given_back),
        held + _arena(sizes, nodes * sizes.tokens, sizes.per_node),
    )


def mori(sizes: Sizes, to: Destinations) -> Exchange:
    """A token with its routing and source to each rank, between nodes once to each node; rows come back so.

    Nodes are those that have an expert for it, or all (``Sizes.to_every_node``). On one machine the ranks
    also tell each other the words and signal; between nodes only tokens and what is beside them are counted.
    """
    parcel = sizes.row_bytes + sizes.routing_bytes + _WORD
    out, into = (sizes.tokens * share for share in to.to_other_places(to.to_rank))
    away, arriving = (sizes.tokens * share for share in to.to_other_nodes())
    if sizes.to_every_node:
        away = arriving = np.full(sizes.ranks, float((sizes.nodes - 1) * sizes.tokens))
    alone = sizes.nodes == 1
    meeting = (sizes.ranks - 1) * _SIGNAL if alone else 0
    words = (sizes.ranks - 1) * _WORD * sizes.words if alone else 0
    return Exchange(
        Moved(
            out * parcel + meeting + words, into * parcel + meeting + words, away * parcel, arriving * parcel
        ),
        Moved(
            into * sizes.sum_bytes + meeting,
            out * sizes.sum_bytes + meeting,
            arriving * sizes.sum_bytes,
            away * sizes.sum_bytes,
        ),
        # The wheel's own formula is ``mori.limits.heap_bytes``, which the report takes.
        0,
    )


def collective(sizes: Sizes, to: Destinations) -> Exchange:
    """Everything is gathered by every rank, along a ring; sums go from each rank to each."""
    del to
    ranks, last = np.arange(sizes.ranks), sizes.per_node - 1
    ring = float((sizes.ranks - 1) * sizes.block_bytes)
    leaves = np.where((ranks % sizes.per_node == last) & (sizes.nodes > 1), ring, 0.0)
    enters = np.where((ranks % sizes.per_node == 0) & (sizes.nodes > 1), ring, 0.0)
    dispatch = Moved(ring - leaves, ring - enters, leaves, enters, spread=True)
    sums = float(sizes.tokens * sizes.sum_bytes)
    inside = np.full(sizes.ranks, (sizes.per_node - 1) * sums)
    between = np.full(sizes.ranks, (sizes.ranks - sizes.per_node) * sums)
    # The sums of all tokens are added in f32 before they are sent.
    held = sizes.ranks * (sizes.block_bytes + sizes.tokens * (4 * sizes.hidden + sizes.sum_bytes))
    return Exchange(dispatch, Moved(inside, inside, between, between), held)


TRANSPORTS: dict[str, Callable[[Sizes, Destinations], Exchange]] = {
    "native": native,
    "mori": mori,
    "collective": collective,
    "two_level": two_level,
}


def weight_bytes(sizes: Sizes) -> float:
    """Of all MoE layers on one rank: its experts, the router, the shared expert."""
    local = -(-sizes.experts // sizes.ranks)
    values = 3 * sizes.hidden * sizes.inner * local + 3 * sizes.hidden * sizes.shared
    return sizes.layers * (values * sizes.weight_bytes + sizes.hidden * sizes.experts * sizes.value_bytes)


def expert_seconds(sizes: Sizes, to: Destinations, flops: float, *, training: bool = False) -> float:
    """The least time of a layer's experts, on the rank with the most rows: three products, each twice more in
    a backward pass."""
    rows = sizes.tokens * float(to.rows().max())
    shared = sizes.tokens * sizes.shared
    return (3 if training else 1) * 6 * sizes.hidden * (rows * sizes.inner + shared) / flops


def _arena(sizes: Sizes, tokens: int, ranks: int) -> int:
    """The two halves of native's arena, for ``tokens`` of each of ``ranks``."""

    def aligned(count: int) -> int:
        return -(-count // 64) * 64

    routes = aligned(tokens * sizes.top_k * _WORD)
    dispatch = 2 * routes + aligned(sizes.words * _WORD) + tokens * aligned(sizes.row_bytes)
    fanout = tokens * min(sizes.top_k, ranks)
    combine = routes + fanout * aligned(sizes.sum_bytes)
    return 2 * max(dispatch, combine)
