"""A token-major transport for tests, of jax.lax collectives, that keeps no promise that it has not made.

Tokens arrive in an order that differs from call to call, from rank to rank and with ``salt``; behind them lie
NaN, and ids and sources that would be taken for real ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jax_moriep import config, transports
from jax_moriep.plan import Opened
from jax_moriep.transports.arrivals import Arrivals
from jax_moriep.transports.expand import expanded

NAME = "token_major"


def install(patch: pytest.MonkeyPatch, name: str = NAME, salt: int = 0) -> None:
    """Makes a layer's config take it by name, as long as the patch lasts."""
    patch.setattr(config, "TRANSPORTS", (*config.TRANSPORTS, name))
    patch.setitem(transports.IMPLEMENTATIONS, name, expanded(TokenMajor(salt)))


@dataclasses.dataclass(frozen=True)
class TokenMajor:
    """See ``transports.expand.TokenTransport``. What it keeps: the token at each place, and the count."""

    salt: int

    def unavailable_reason(self, place: Any) -> str | None:
        del place
        return None

    def open(self, place: Any, cfg: Any, shape: Any, dtype: str, *, again: bool = False) -> Opened:
        del place, cfg, shape, dtype, again
        return Opened()

    def send(self, link, x, ids, weights, *, words, order):
        shape = link.shape
        all_ids, all_weights = (gathered(a, link) for a in (ids, weights))
        me = lax.axis_index(link.ep_axis)
        first = me * shape.num_local_experts
        end = jnp.minimum(first + shape.num_local_experts, shape.num_experts)
        here = ((all_ids >= first) & (all_ids < end)).any(1)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.salt), me), order[0])
        shuffled = jnp.argsort(jax.random.uniform(key, here.shape))
        token = shuffled[jnp.argsort(~here[shuffled])].astype(jnp.int32)
        own = (token, here.sum(dtype=jnp.int32).reshape(1))
        came = came_of(own)[:, None]
        arrivals = Arrivals(
            arriving(x, link, own),
            jnp.where(came, all_ids[token], first),
            jnp.where(came, all_weights[token], jnp.nan),
            token,
            own[1],
        )
        return arrivals, own, lax.all_gather(words, link.ep_axis, to="invarying"), order + 1

    def resend(self, link, x, own, *, order):
        return arriving(x, link, own), order + 1

    def give_back(self, link, tokens, own, *, order, scalars):
        y = summed(tokens.astype(jnp.float32), link, own).astype(tokens.dtype)
        return y, None if scalars is None else summed(scalars, link, own), order + 1


def gathered(array, link):
    """[T, ...] of each rank -> [R * T, ...]."""
    size = link.shape.num_ranks * link.shape.num_tokens
    return lax.all_gather(array, link.ep_axis).reshape(size, array.shape[1])


def came_of(own):
    return jnp.arange(own[0].size) < own[1][0]


def arriving(x, link, own):
    rubbish = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 255
    return jnp.where(came_of(own)[:, None], gathered(x, link)[own[0]], jnp.asarray(rubbish, x.dtype))


def summed(values, link, own):
    """[N, ...] by place -> [T, ...] by token, added over the ranks in their order."""
    shape = (link.shape.num_ranks, link.shape.num_tokens, values.shape[1])
    clean = jnp.where(came_of(own)[:, None], values, 0)
    by_token = clean[jnp.argsort(own[0])].reshape(shape)
    parts = lax.all_to_all(by_token, link.ep_axis, 0, 0)
    total = parts[0]
    for rank in range(1, link.shape.num_ranks):
        total = total + parts[rank]
    return total
