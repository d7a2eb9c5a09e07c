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

from jax_moriep.runtime import compat

# A nested trace (a scan body, a checkpointed layer) comes and goes between two calls of its parent, so a few
# traces are remembered; those that ended never match again and fall out at the end of the list.
_REMEMBERED = 8


class _Chains(threading.local):
    def __init__(self) -> None:
        self.links: list[tuple[Hashable, object, jax.Array]] = []


_chains = _Chains()


def start() -> jax.Array:
    """The token of a chain's first exchange."""
    return jnp.zeros((1,), jnp.float32)


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


def _deleted(token: jax.Array) -> bool:
    return not compat.is_tracer(token) and token.is_deleted()
