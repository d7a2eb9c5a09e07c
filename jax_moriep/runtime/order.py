"""The order token, and the chain that links the exchanges of one program.

XLA orders two custom calls only where one's result feeds the other. Two exchanges with no data between them
could start in different orders on different ranks, so every exchange takes the token of the one traced
before it and gives its own to the next. Here is remembered which token was last, for each group and trace.

The token is a float32: as a differentiable value it also has a cotangent, and the cotangents chain the
exchanges of the backward pass in exactly the reverse order. Its value counts the calls of the chain, which
lets the native transport tell ranks apart that run different programs. Transports see it as i32[1].
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.runtime import compat

# A nested trace (a scan body, a checkpointed layer) comes and goes between two calls of its parent, so a few
# traces are remembered; those that ended never match again and fall out at the end of the list.
_REMEMBERED = 8
# Rows and columns of the weights that tell chains apart.
_SAMPLED = 16


class _Chains(threading.local):
    def __init__(self) -> None:
        self.links: list[tuple[Hashable, object, jax.Array]] = []


_chains = _Chains()


def start(weights: jax.Array | None = None) -> jax.Array:
    """The token of a chain's first exchange.

    Two chains that nothing links may meet in different orders on two ranks. Where they begin apart, at
    numbers made from some of their layers' weights, that is an error about the program and no wrong number.

    Args:
      weights: floats that are the same on all ranks, or None.

    Returns:
      f32[1], a whole number below 2^22, so that the calls counted on top of it stay exact.
    """
    if weights is None:
        return jnp.zeros((1,), jnp.float32)
    few = lax.stop_gradient(weights[tuple(slice(_SAMPLED) for _ in weights.shape)]).astype(jnp.float32)
    words = lax.bitcast_convert_type(few, jnp.int32).reshape(-1)
    odd = 2 * jnp.arange(words.size, dtype=jnp.int32) + 1
    return (jnp.sum(words * odd) >> 9 & 0x3FFFFF).astype(jnp.float32).reshape(1)


def last(key: Hashable) -> jax.Array | None:
    """The token that the last exchange of this chain left in the current trace, or None."""
    state = compat.trace_state()
    for known, where, token in reversed(_chains.links):
        if known == key and where == state and not _deleted(token):
            return token
    return None


def leave(key: Hashable, token: jax.Array) -> None:
    """Remembers a token for the next exchange of the chain."""
    # JAX's leak checker counts a remembered tracer as leaked; under it, chains are not linked.
    if jax.config.jax_check_tracer_leaks:  # pyright: ignore[reportAttributeAccessIssue]
        return
    state = compat.trace_state()
    kept = [link for link in _chains.links if not (link[0] == key and link[1] == state)]
    _chains.links = [*kept[-(_REMEMBERED - 1) :], (key, state, token)]


def forget() -> None:
    """Drops what is remembered: after an error, the tokens of the failed calls hold it still."""
    _chains.links = []


def _deleted(token: jax.Array) -> bool:
    return not compat.is_tracer(token) and token.is_deleted()
