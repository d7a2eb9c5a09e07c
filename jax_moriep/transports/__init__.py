"""What moves rows between ranks. Each module here is one transport with the functions of ``Transport``.

Everything is local to one rank, inside shard_map, and nothing syncs with the host. The order of rows is
fixed: by local expert, then source rank, then source token. Padding rows are zero. A new transport is one
file here and one entry in ``IMPLEMENTATIONS``; ``tests/contract`` then runs on it unchanged.

| file | |
|---|---|
| `native.py`, `mori.py`, `two_level.py`, `collective.py`, `reference.py` | the transports |
| `delivery.py` | pull or put, for native |
| `rows.py` | where rows go, in pure JAX |
| `expand.py`, `arrivals.py` | a transport made of one that brings tokens, and tokens to rows |
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jax_moriep.config import MoEConfig
from jax_moriep.errors import TransportError
from jax_moriep.plan import ExchangeShape, Link, Opened
from jax_moriep.runtime import library, settings
from jax_moriep.runtime.place import Place
from jax_moriep.transports import collective, mori, native, reference, two_level
from jax_moriep.transports.expand import expanded


class Transport(Protocol):
    """The contract. ``order``, i32[1], goes in and out of every call. ``own`` is what
    the transport keeps in a plan: any pytree of arrays."""

    def unavailable_reason(self, place: Place) -> str | None:
        """Why it cannot run at a place, with the cure; None if it can."""
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
        """Opens whatever the exchanges at a place need, and names the attributes of its custom calls; called
        while a program is traced, in the same order in every process. ``again``: begin anew what has failed,
        and wait for all ranks. dtype is the name of the tokens'. cfg and shape are None where
        ``jm.initialize`` was not told of any layer."""
        ...

    def dispatch(
        self,
        link: Link,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        words: jax.Array,
        order: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Any, jax.Array]:
        """x [T, H], ids i32[T, K], weights f32[T, K], words i32[W] -> rows [C, H], row_weights f32[C],
        group_sizes i32[L], all_words i32[R, W], own, order. x may also be opaque bytes, u8[T, B]. Ids that
        are no expert are dropped. The words of every rank come to every rank, so that a layer's statistics
        need no collective beside the exchange; all_words is typed as equal on all ranks. W may be 0."""
        ...

    def replay(
        self, link: Link, x: jax.Array, ids: jax.Array, own: Any, order: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Dispatches x [T, H] again along a known plan -> rows [C, H], order. The transpose of combine."""
        ...

    def combine(
        self,
        link: Link,
        rows: jax.Array,
        ids: jax.Array,
        own: Any,
        order: jax.Array,
        row_scalars: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """rows [C, H] -> y [T, H], the sum of each token's rows in f32: on each rank in the order of k, then
        over the ranks in their order. The transpose of dispatch. ``row_scalars`` f32[C], if given, come back
        to their routes as f32[T, K] (the router's gradient)."""
        ...


@runtime_checkable
class Describes(Protocol):
    """What a transport may offer besides, if it chooses what it runs by more than its name."""

    def describe(self, place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str) -> str | None:
        """What it would run for an exchange of x of a dtype, and why, or what it refuses it for; in lines for
        people. None: nothing to tell. Opens nothing."""
        ...


@runtime_checkable
class RunsExperts(Protocol):
    """What a token-major transport may offer besides: exchange and experts in one custom call, which keeps no
    plan and has no gradient."""

    BACKEND: str
    """The library that has the call."""

    def run_experts(
        self,
        link: Link,
        x: jax.Array,
        ids: jax.Array,
        weights: jax.Array,
        *,
        operands: tuple[jax.Array, ...],
        attributes: tuple[tuple[str, int | str], ...],
        scratch: tuple[int, int, int],
        words: jax.Array,
        order: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """x [T, H], ids i32[T, K], weights f32[T, K], words i32[W] -> y [T, H], all_words i32[R, W], order;
        the experts being those of ``experts.spec.TokenExperts``, its sizes ``scratch``."""
        ...


def with_experts(name: str) -> RunsExperts | None:
    """The transport as one that runs experts too; None if it does not."""
    tokens = getattr(IMPLEMENTATIONS[name], "tokens", None)
    return tokens if isinstance(tokens, RunsExperts) else None


IMPLEMENTATIONS: dict[str, Transport] = {
    "native": native,
    "mori": expanded(mori),
    "two_level": two_level,
    "collective": collective,
    "reference": reference,
}
"""In the order in which "auto" tries them."""


def opened(
    name: str,
    place: Place,
    cfg: MoEConfig | None,
    shape: ExchangeShape | None,
    dtype: str,
    *,
    again: bool = False,
) -> Opened:
    """Opens a transport, see ``Transport.open``, where all settings keep their rules.

    Also those that steer nothing here: the same job may run over another transport, or on GPUs, next.

    Raises:
      TransportError: an environment variable breaks its rule, or the transport cannot be opened.
    """
    settings.check()
    return IMPLEMENTATIONS[name].open(place, cfg, shape, dtype, again=again)


def reasons(place: Place) -> dict[str, str | None]:
    """For each transport why it cannot run at a place, or None if it can."""
    return {name: transport.unavailable_reason(place) for name, transport in IMPLEMENTATIONS.items()}


def describe(name: str, place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str) -> str | None:
    """What a transport tells of an exchange, see ``Describes``; None if it tells nothing."""
    transport = IMPLEMENTATIONS[name]
    return transport.describe(place, cfg, shape, dtype) if isinstance(transport, Describes) else None


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def chosen(name: str, reasons: Mapping[str, str | None]) -> str | None:
    """The transport that ``choose`` would take, None where the named one or none can run.

    Args:
      name: "auto" or a transport's name.
      reasons: as ``reasons`` gives them.

    Raises:
      TransportError: "auto" needs a setting that is wrong.
    """
    if name != "auto":
        return name if reasons[name] is None else None
    for candidate, why in reasons.items():
        if why is None:
            return candidate
        _check_passed_over(candidate)
    return None


def _check_passed_over(candidate: str) -> None:
    """A wrong setting is no reason to take what is slower, beside processes with a right one."""
    if candidate == "two_level":
        settings.RANKS_PER_NODE.value()


def choose(name: str, place: Place) -> str:
    """The transport to use: the named one, or for "auto" the first that can run.

    Where "auto" takes a slower one because a library of this package does not load, it warns once.

    Args:
      name: "auto" or a transport's name.
      place: where.

    Raises:
      TransportError: the named transport cannot run, or "auto" needs a setting that is wrong; the text says
        why and the cure.
    """
    if name == "auto":
        broken: set[str] = set()
        for candidate, transport in IMPLEMENTATIONS.items():
            why = transport.unavailable_reason(place)
            if why is None:
                return candidate
            _check_passed_over(candidate)
            # Of several that need the library, the first is the best of them.
            if place.backend is not None and why == library.why_broken(place.backend) and why not in broken:
                broken.add(why)
                _warn(
                    f"transport='auto' passes over {candidate!r}, and what it takes instead is slower: {why}"
                )
    why = IMPLEMENTATIONS[name].unavailable_reason(place)
    if why is not None:
        raise TransportError(f"transport={name!r} cannot run here: {why}")
    return name
