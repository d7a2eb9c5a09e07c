"""The adapter between the two formats: a row-major transport made of any token-major one.

A token-major transport delivers one copy of a token to each rank that has an expert for it, in no order, and
takes one row per delivered token back. ``expanded`` puts what came into the order of rows, and adds the rows
of a token before they go back; both are local to a rank (``transports.arrivals``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
from jax import lax

from jax_moriep.config import MoEConfig
from jax_moriep.errors import LibraryError
from jax_moriep.plan import ExchangeShape, Link, Opened
from jax_moriep.runtime import library, targets
from jax_moriep.runtime.place import Place
from jax_moriep.transports import arrivals as local
from jax_moriep.transports.arrivals import Arrivals

_GPUS = ("cuda", "rocm")


class TokenTransport(Protocol):
    """What a token-major transport does; ``order``, ``words`` and ``own`` as in ``transports.Transport``."""

    def unavailable_reason(self, place: Place) -> str | None:
        """See ``transports.Transport.unavailable_reason``."""
        ...

    def open(
        self,
        place: Place,
        cfg: MoEConfig | None,
        shape: ExchangeShape | None,
        dtype: str,
        *,
        again: bool = False,
    ) -> Opened:
        """See ``transports.Transport.open``."""
        ...

    def send(
        self,
        link: Link,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        *,
        words: jax.Array,
        order: jax.Array,
    ) -> tuple[Arrivals, Any, jax.Array, jax.Array]:
        """x [T, H] (or opaque bytes, u8[T, B]), ids i32[T, K], weights f32[T, K], words i32[W] -> arrivals,
        own, all_words i32[R, W], order. A token goes once to each rank that has an expert for it; ids that
        are no expert are passed on as they are, or as -1."""
        ...

    def resend(self, link: Link, x: jax.Array, own: Any, *, order: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [T, H] -> tokens [N, H], order. Each token arrives where it did in the send that gave ``own``."""
        ...

    def give_back(
        self, link: Link, tokens: jax.Array, own: Any, *, order: jax.Array, scalars: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """tokens [N, H], placed as that send's arrivals and undefined from their count on -> y [T, H], the
        sum of what all ranks give back for a token, in f32 and in the order of the ranks; token_scalars
        f32[T, K], the same sum of ``scalars`` f32[N, K], of which one rank's alone is not 0; order."""
        ...


class Own(NamedTuple):
    """What a plan keeps."""

    own: Any
    """The token-major transport's own."""
    sources: jax.Array
    """i32[N]: where each arrival is from; see ``Arrivals``."""
    count: jax.Array
    """i32[1]: how many tokens arrived."""
    routes: jax.Array
    """i32[R, T, K]: row on this rank of the route (source rank, token, k); -1: not this rank's; -2: dropped
    here for want of capacity."""


@dataclasses.dataclass(frozen=True)
class Expanded:
    """A ``transports.Transport``; made by ``expanded``."""

    tokens: TokenTransport

    def unavailable_reason(self, place: Place) -> str | None:
        """See ``transports.Transport.unavailable_reason``."""
        why = self.tokens.unavailable_reason(place)
        if why is None and place.backend in _GPUS:
            try:
                library.load(place.backend)
            except LibraryError as e:
                return str(e)
        return why

    def open(
        self,
        place: Place,
        cfg: MoEConfig | None,
        shape: ExchangeShape | None,
        dtype: str,
        *,
        again: bool = False,
    ) -> Opened:
        """See ``transports.Transport.open``."""
        if place.backend in _GPUS:
            targets.register_expand(place.backend)
        return self.tokens.open(place, cfg, shape, dtype, again=again)

    def describe(self, place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str) -> str | None:
        """See ``transports.Describes.describe``."""
        tell = getattr(self.tokens, "describe", None)
        return None if tell is None else tell(place, cfg, shape, dtype)

    def dispatch(
        self,
        link: Link,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        words: jax.Array,
        order: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Own, jax.Array]:
        """See ``transports.Transport.dispatch``."""
        arrivals, own, all_words, order = self.tokens.send(link, x, ids, weights, words=words, order=order)
        here = local.expand(arrivals, lax.axis_index(link.ep_axis), link.shape, link.platform)
        own = Own(own, arrivals.sources, arrivals.count, here.routes)
        return here.rows, here.row_weights, here.group_sizes, all_words, own, order

    def replay(
        self, link: Link, x: jax.Array, ids: jax.Array, own: Own, order: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See ``transports.Transport.replay``."""
        del ids
        tokens, order = self.tokens.resend(link, x, own.own, order=order)
        along = (own.sources, own.count, own.routes, link.shape, link.platform)
        return local.reexpand(tokens, *along), order

    def combine(
        self,
        link: Link,
        rows: jax.Array,
        ids: jax.Array,
        own: Own,
        order: jax.Array,
        row_scalars: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """See ``transports.Transport.combine``."""
        del ids
        along = (own.sources, own.count, own.routes, link.shape, link.platform)
        tokens, scalars = local.gather(rows, *along, row_scalars=row_scalars)
        return self.tokens.give_back(link, tokens, own.own, order=order, scalars=scalars)


def expanded(tokens: TokenTransport) -> Expanded:
    """A row-major transport of a token-major one.

    Args:
      tokens: the token-major transport.

    Returns:
      A ``transports.Transport``.
    """
    return Expanded(tokens)
