"""The routing of few tokens in one kernel: scores, the choice, weights, and what is measured of them.

A server that decodes has few tokens, and then a layer's time is that of reading its experts' weights, and
of starting kernels. Of a router and its statistics XLA makes a dozen. On an H200 most took 1 to 4 us, and the
one that puts the statistics side by side 80 us, with 8 tokens and 128 experts.

The kernel is the formula of ``routing`` and ``stats`` once more, in what Triton knows: no sort and no gather,
but masks and reductions over a tile of tokens and all experts. A program that is differentiated runs XLA's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_moriep.balance import RouterSums
from jax_moriep.config import MoEConfig
from jax_moriep.experts.pallas.launch import (
    Span,
    Tile,
    call,
    load,
    load_vector,
    span,
    store,
    store_vector,
)
from jax_moriep.routing import divide, weights_of

MOST_EXPERTS, MOST_CHOSEN, MOST_GROUPS = 512, 16, 16
"""What fits a program's registers, and is worth a loop that is written out."""
MOST_TOKENS = 512
"""Above it the layer is bound by its products, and nothing was measured."""
_VALUES = 4096
"""Scores of a program: 16 in each of 256 threads. With 128 experts that are 32 tokens. Not tuned."""
_NO_KEY = jnp.iinfo(jnp.int32).min


def unsuited(cfg: MoEConfig, num_tokens: int) -> str | None:
    """Why the kernel cannot route tokens by a config; None if it can."""
    if callable(cfg.router):
        return "the router is a function of the user's"
    if not 0 < num_tokens <= MOST_TOKENS:
        return f"{num_tokens} tokens are none, or more than {MOST_TOKENS}"
    if cfg.num_experts > MOST_EXPERTS or cfg.top_k > MOST_CHOSEN:
        return f"E={cfg.num_experts} or K={cfg.top_k} is above {MOST_EXPERTS} or {MOST_CHOSEN}"
    if cfg.num_groups is not None and cfg.num_groups > MOST_GROUPS:
        return f"num_groups={cfg.num_groups} is above {MOST_GROUPS}"
    return None


def routed(
    cfg: MoEConfig,
    logits: jax.Array,
    score_bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Routes tokens and measures the routes.

    Args:
      cfg: a layer that ``unsuited`` has nothing against.
      logits: f32[T, E].
      score_bias: f32[E] or None.
      mask: bool[T] or None; see ``stats.counted``.
      interpret: see ``launch.call``.

    Returns:
      ids i32[T, K], -1 for masked tokens; weights f32[T, K]; and ``stats.as_words`` of the tokens, i32[W].
    """
    num_tokens, experts = logits.shape
    width, chosen = _power_of_two(experts), _power_of_two(cfg.top_k)
    height = min(_VALUES // width, _power_of_two(num_tokens))
    programs = -(-num_tokens // height)
    given = [a for a in (score_bias, None if mask is None else mask.astype(jnp.int32)) if a is not None]

    def kernel(logits_ref: Any, *refs: Any) -> None:
        *given_refs, ids_ref, weights_ref, words_ref = refs
        tokens = span(pl.program_id(0) * height, height, num_tokens)
        all_experts, all_chosen = span(0, width, experts), span(0, chosen, cfg.top_k)
        logits = load(logits_ref, tokens, all_experts)
        real = jnp.ones((height,), jnp.bool_) if tokens.mask is None else tokens.mask
        if mask is not None:
            real &= load_vector(given_refs.pop(), tokens) != 0
        bias = load_vector(given_refs[0], all_experts)[None, :] if given_refs else None
        tile = _Router(cfg, logits, bias)
        ids, weights, taken = tile.choice()
        ids = jnp.where(real[:, None], ids, -1)
        store(ids_ref, tokens, all_chosen, ids)
        store(weights_ref, tokens, all_chosen, weights)
        _store_words(words_ref, pl.program_id(0), tile, taken, real)

    results = [
        ((num_tokens, cfg.top_k), jnp.int32),
        ((num_tokens, cfg.top_k), jnp.float32),
        ((programs * (2 * experts + 3),), jnp.int32),
    ]
    # Only warps and stages are of the tile's fields that a call reads.
    tile = Tile(rows=height, cols=width, depth=width, warps=8, stages=1)
    ids, weights, words = call(kernel, "moriep_route", (logits, *given), results, programs, tile, interpret)
    return ids, weights, words if programs == 1 else _sum_of_words(words.reshape(programs, -1), experts)


def sums_of(words: jax.Array, experts: int) -> RouterSums:
    """The sums that the words hold."""
    sums = lax.bitcast_convert_type(words[experts:], jnp.float32)
    return RouterSums(sums[:experts], *(sums[experts + i] for i in range(3)))


def _sum_of_words(words: jax.Array, experts: int) -> jax.Array:
    """The words of all programs together."""
    counts = jnp.sum(words[:, :experts], axis=0, dtype=jnp.int32)
    sums = jnp.sum(lax.bitcast_convert_type(words[:, experts:], jnp.float32), axis=0)
    return jnp.concatenate([counts, lax.bitcast_convert_type(sums, jnp.int32)])


class _Router:
    """A router's formula for a tile of tokens; what lies behind the last expert counts nowhere.

    Attributes:
      cfg: the layer.
      logits: f32[tokens, width].
      bias: f32[1, width] or None.
      col: i32[1, width], the experts' ids.
      valid: bool[1, width], whether there is such an expert.
      scores: f32[tokens, width], what the losses average; zeros where there is no expert.
    """

    def __init__(self, cfg: MoEConfig, logits: jax.Array, bias: jax.Array | None) -> None:
        self.cfg, self.logits, self.bias = cfg, logits, bias
        self.col = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
        self.valid = self.col < cfg.num_experts
        if cfg.router in ("sigmoid_topk", "deepseek_v3", "llama4"):
            self.scores = jnp.where(self.valid, jax.nn.sigmoid(logits), 0)
        else:
            shifted = jnp.exp(logits - self._largest(logits)[:, None])
            shifted = jnp.where(self.valid, shifted, 0)
            self.scores = shifted / jnp.sum(shifted, axis=1)[:, None]

    def choice(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """ids i32[tokens, chosen], weights f32[tokens, chosen], and who was chosen, bool[tokens, width]."""
        cfg = self.cfg
        by_logits = cfg.router in ("topk_softmax", "gpt_oss", "llama4")
        by, values = (self.logits, self.logits) if by_logits else (self.scores, self.scores)
        if self.bias is not None and not by_logits:
            by = by + self.bias
        if cfg.num_groups is not None and cfg.top_groups is not None:
            if cfg.router == "deepseek_v3":
                by = self._of_best_groups(by, True, -jnp.inf)
            elif cfg.router == "deepseek_v2":
                by = values = self._of_best_groups(by, False, 0.0)
        ids, chosen, taken = self._top(by, self.scores if cfg.router == "llama4" else values)
        column = jnp.arange(_power_of_two(cfg.top_k), dtype=jnp.int32)[None, :]
        shape = (self.logits.shape[0], column.shape[1])
        all_ids, all_weights = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
        for k, (at, weight) in enumerate(zip(ids, self._weights(chosen), strict=True)):
            all_ids = jnp.where(column == k, at[:, None], all_ids)
            all_weights = jnp.where(column == k, weight[:, None], all_weights)
        return all_ids, all_weights, taken

    def shares(self, real: jax.Array) -> jax.Array:
        """The scores of real tokens over their sums; see ``balance.router_sums``."""
        scores = jnp.where(real[:, None], self.scores, 0)
        return divide(scores, jnp.sum(scores, axis=1)[:, None])

    def logsumexp(self, real: jax.Array) -> jax.Array:
        """Of each token's logits, f32[tokens]; of a token that is not real that of zeros."""
        logits = jnp.where(real[:, None], self.logits, 0)
        largest = self._largest(logits)
        # As jax.nn.logsumexp: what is not finite is subtracted from nothing.
        largest = jnp.where(jnp.abs(largest) < jnp.inf, largest, 0)
        shifted = jnp.where(self.valid, jnp.exp(logits - largest[:, None]), 0)
        return jnp.log(jnp.sum(shifted, axis=1)) + largest

    def _largest(self, values: jax.Array) -> jax.Array:
        return jnp.max(jnp.where(self.valid, values, -jnp.inf), axis=1)

    def _top(self, by: jax.Array, values: jax.Array) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
        """The ids of the K largest, in falling order, ``values`` there, and who they are.

        The order is that of ``lax.top_k``: all bits count, so that NaN comes first. Zeros of both signs are
        equal, and of equals the lower id comes first.
        """
        bits = _bits(jnp.where(by == 0, 0.0, by))
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        behind = jnp.int32(keys.shape[1])
        left = jnp.broadcast_to(self.valid, keys.shape)
        ids, chosen = [], []
        for _ in range(self.cfg.top_k):
            largest = jnp.max(jnp.where(left, keys, _NO_KEY), axis=1)
            candidates = left & (keys == largest[:, None])
            at = jnp.min(jnp.where(candidates, self.col, behind), axis=1)
            here = self.col == at[:, None]
            ids.append(at)
            chosen.append(jnp.sum(jnp.where(here, values, 0), axis=1))
            left &= ~here
        return ids, chosen, self.valid & ~left

    def _weights(self, chosen: list[jax.Array]) -> list[jax.Array]:
        cfg = self.cfg
        if cfg.router in ("topk_softmax", "gpt_oss"):
            # The first is the largest.
            shifted = [jnp.exp(value - chosen[0]) for value in chosen]
            total = _sum(shifted)
            return [value / total * cfg.routed_scaling for value in shifted]
        if cfg.router == "llama4":
            return [value * cfg.routed_scaling for value in chosen]
        total = _sum(chosen)
        if cfg.router == "deepseek_v3":
            total = total + 1e-20
        elif cfg.router == "ernie45":
            total = jnp.where(total < 1e-12, 1e-12, total)
        return [weights_of(value, total, cfg) for value in chosen]

    def _of_best_groups(self, by: jax.Array, two: bool, fill: float) -> jax.Array:
        """``by``, and ``fill`` in all groups but the best; a group's score is its largest, or two's sum."""
        count, best = self.cfg.num_groups, self.cfg.top_groups
        assert count is not None
        assert best is not None
        if best >= count:
            return by
        size = self.cfg.num_experts // count
        group = lax.div(self.col, jnp.int32(size))
        scores = [self._group_score(by, group == g, two and size > 1) for g in range(count)]
        kept = jnp.zeros(by.shape, jnp.bool_)
        for g, mine in enumerate(scores):
            # A NaN comes before every number, as by ``lax.top_k``.
            first = [other >= mine if h < g else other > mine for h, other in enumerate(scores) if h != g]
            before = _sum([is_first.astype(jnp.int32) for is_first in first])
            kept |= (group == g) & (before < best)[:, None]
        return jnp.where(kept, by, fill)

    def _group_score(self, by: jax.Array, mine: jax.Array, two: bool) -> jax.Array:
        of_group = jnp.where(mine, by, -jnp.inf)
        largest = jnp.max(of_group, axis=1)
        score = largest
        if two:
            at = jnp.min(jnp.where(mine & (by == largest[:, None]), self.col, by.shape[1]), axis=1)
            score = largest + jnp.max(jnp.where(self.col == at[:, None], -jnp.inf, of_group), axis=1)
        is_nan = jnp.max(jnp.where(mine & (by != by), 1, 0), axis=1) > 0
        return jnp.where(is_nan, jnp.inf, score)


def _store_words(ref: Any, program: Any, tile: _Router, taken: jax.Array, real: jax.Array) -> None:
    """See ``stats.as_words``: counts, and the bits of the sums in the order of ``RouterSums``."""
    experts = tile.cfg.num_experts
    shares = tile.shares(real)
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    z = tile.logsumexp(real)
    sums = (
        jnp.sum(jnp.where(real, z * z, 0)),
        -jnp.sum(jnp.sum(shares * logs, axis=1)),
        jnp.sum(real.astype(jnp.float32)),
    )
    i = jnp.arange(4, dtype=jnp.int32)
    last = jnp.where(i == 0, sums[0], jnp.where(i == 1, sums[1], sums[2]))
    counts = jnp.sum((taken & real[:, None]).astype(jnp.int32), axis=0)
    first = program * (2 * experts + 3)
    for values, count in ((counts, experts), (_bits(jnp.sum(shares, axis=0)), experts), (_bits(last), 3)):
        store_vector(ref, Span(first, values.size, first + count), values)
        first = first + count


def _bits(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.int32)


def _sum(values: list[jax.Array]) -> jax.Array:
    """From the first on, as a sum along a short dimension runs."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
