"""What moves rows between ranks. Each module here is one transport with the functions of ``Transport``.

Everything is local to one rank, inside shard_map, and nothing syncs with the host. The order of rows is
fixed: by local expert, then source rank, then source token. Padding rows are zero. A new transport is one
file here and one entry in ``IMPLEMENTATIONS``; ``tests/contract`` then runs on it unchanged.
"""

from __future__ import annotations

from typing import Protocol

import jax

from jax_moriep.errors import TransportError
from jax_moriep.plan import Link, Plan
from jax_moriep.transports import collective, native, reference


class Transport(Protocol):
    """The contract. ``order`` is the order token, i32[1]: it goes in and out of every call."""

    def unavailable_reason(self, platform: str) -> str | None:
        """Why it cannot run on a platform ("cpu", "gpu", ...), with the cure; None if it can."""
        ...

    def dispatch(
        self, link: Link, x: jax.Array, ids: jax.Array, weights: jax.Array, order: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, Plan, jax.Array]:
        """x [T, H], ids i32[T, K], weights f32[T, K] -> rows [C, H], row_weights f32[C], group_sizes i32[L],
        plan, order. x may also be opaque bytes, u8[T, W]. Ids that are no expert are dropped."""
        ...

    def replay(self, link: Link, x: jax.Array, plan: Plan, order: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Dispatches x [T, H] again along a known plan -> rows [C, H], order. The transpose of combine."""
        ...

    def combine(
        self, link: Link, rows: jax.Array, plan: Plan, order: jax.Array, row_scalars: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """rows [C, H] -> y [T, H], the sum of each token's rows in f32: on each rank in the order of k, then
        over the ranks in their order. The transpose of dispatch. ``row_scalars`` f32[C], if given, come back
        to their routes as f32[T, K] (the router's gradient)."""
        ...


IMPLEMENTATIONS: dict[str, Transport] = {"native": native, "collective": collective, "reference": reference}
"""In the order in which "auto" tries them."""


def reasons(platform: str | None, *, one_machine: bool = True) -> dict[str, str | None]:
    """For each transport why it cannot run, or None if it can.

    Args:
      platform: of the mesh's devices; None for a mesh without devices, on which programs are only lowered.
      one_machine: whether all ranks are on one machine.
    """
    found = {}
    for name, transport in IMPLEMENTATIONS.items():
        why = None if platform is None else transport.unavailable_reason(platform)
        if why is None and name == "native" and not one_machine:
            why = "it needs all ranks on one machine; use transport='collective'"
        found[name] = why
    found["mori"] = "it is not in this version of jax_moriep; use transport='native' or 'collective'"
    return found


def choose(name: str, platform: str | None, *, one_machine: bool = True) -> str:
    """The transport to use: the named one, or for "auto" the first that can run.

    Args:
      name: "auto" or a transport's name.
      platform: of the mesh's devices, None for a mesh without devices.
      one_machine: whether all ranks are on one machine.

    Raises:
      TransportError: the named transport cannot run; the text says why and the cure.
    """
    found = reasons(platform, one_machine=one_machine)
    if name == "auto":
        return next(candidate for candidate in IMPLEMENTATIONS if found[candidate] is None)
    if found[name] is not None:
        raise TransportError(f"transport={name!r} cannot run here: {found[name]}")
    return name
