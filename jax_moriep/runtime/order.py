"""The order, and the chain that links the exchanges of one program.

XLA orders two custom calls only where one's result feeds the other. Two exchanges with no data between them
could start in different orders on different ranks, so every exchange takes the order of the one traced
before it and gives its own to the next. Here is remembered which was last, for each group and trace.

The order is a float32: as a differentiable value it also has a cotangent, and the cotangents chain the
exchanges of the backward pass in exactly the reverse order. Its value counts the calls of the chain, which
lets the native transport tell ranks apart that run different programs. Transports see it as i32[1].
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.runtime import compat

# A nested trace (a scan body, a checkpointed layer) comes and goes between two calls of its parent, so a few
# traces are remembered; those that ended never match again and fall out at the end of the list.
_REMEMBERED = 8
# Rows and columns of the weights that tell chains apart.
_SAMPLED = 16


class _Remembered(threading.local):
    def __init__(self) -> None:
        self.chains: list[tuple[Hashable, object, jax.Array]] = []


_remembered = _Remembered()


def start(weights: jax.Array | None = None) -> jax.Array:
    """The order that a chain's first exchange takes.

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


class Chain:
    """The chain at one place of a trace.

    Attributes:
      order: what the last exchange left; whoever adds exchanges replaces it by what theirs left.
    """

    def __init__(self, order: jax.Array) -> None:
        self.order = order


@contextlib.contextmanager
def chained(key: Hashable, first: Callable[[], jax.Array] = start) -> Iterator[Chain]:
    """Links the exchanges in its body behind those before it in the current trace, and the next behind them.

    Args:
      key: of the chain: who takes part, and over which axes the order varies.
      first: makes the order of a chain that begins here.
    """
    before = _last(key)
    here = Chain(first() if before is None else before)
    yield here
    _leave(key, here.order)


def as_count(order: jax.Array) -> jax.Array:
    """The order, or its cotangent, as transports take it: i32[1]."""
    return order.astype(jnp.int32)


def of_count(count: jax.Array) -> jax.Array:
    """The order, or its cotangent, from what a transport gave back: f32[1]."""
    return count.astype(jnp.float32)


def _last(key: Hashable) -> jax.Array | None:
    state = compat.trace_state()
    for known, where, order in reversed(_remembered.chains):
        if known == key and where == state and not _deleted(order):
            return order
    return None


def _leave(key: Hashable, order: jax.Array) -> None:
    # JAX's leak checker counts a remembered tracer as leaked; under it, chains are not linked.
    if jax.config.jax_check_tracer_leaks:  # pyright: ignore[reportAttributeAccessIssue]
        return
    state = compat.trace_state()
    others = [entry for entry in _remembered.chains if not (entry[0] == key and entry[1] == state)]
    _remembered.chains = [*others[-(_REMEMBERED - 1) :], (key, state, order)]


def forget() -> None:
    """Drops what is remembered: after an error, the orders of the failed calls hold it still."""
    _remembered.chains = []


def _deleted(order: jax.Array) -> bool:
    return not compat.is_tracer(order) and order.is_deleted()
