"""transport="native": our own custom calls over memory that the ranks of one machine share.

The receiver pulls: a rank stages its tokens and publishes its routing, and each destination reads every
token that it needs once and writes it to all its expert rows, directly into XLA's result. Between GPUs the
owners may put the tokens into their destinations' memory instead (``delivery.py``). Combine pushes one row
per (token, rank) to the token's owner, who adds them in rank order.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, LibraryError, TransportError, rule
from jax_moriep.operands import ROW_DTYPES
from jax_moriep.plan import ExchangeShape, Link, Opened
from jax_moriep.runtime import compat, group, library, targets
from jax_moriep.runtime.mesh import abstract_name, groups_of
from jax_moriep.runtime.place import Place
from jax_moriep.transports import delivery


class Own(NamedTuple):
    """What a plan keeps."""

    routes: jax.Array
    """i32[R, T, K]: row on this rank of the route (source rank, token, k); -1: not this rank's; -2: dropped
    here for want of capacity."""
    places: jax.Array
    """i32[R, T]: where in the owner's arena this rank's sum for a token goes, -1 for nowhere."""


def unavailable_reason(place: Place) -> str | None:
    """See ``transports.Transport.unavailable_reason``."""
    why = unavailable_on_a_machine(place)
    if why is None and place.num_nodes > 1:
        return "it needs the ranks of a group on one machine; use transport='two_level'"
    return why


def unavailable_on_a_machine(place: Place) -> str | None:
    """Why it cannot run between ranks of one machine, with the cure; None if it can."""
    if place.platform is None:
        return None
    if place.backend is None:
        gpu = place.platform == "gpu"
        what = "there is no GPU in this process" if gpu else f"it has no {place.platform} backend"
        return f"{what}; use transport='collective'"
    if sys.platform != "linux":
        return f"it needs Linux (memfd and futex), not {sys.platform}; use transport='collective'"
    try:
        library.load(place.backend)
    except LibraryError as e:
        return str(e)
    return None


def open(  # noqa: A001 - the contract's name
    place: Place,
    cfg: MoEConfig | None,
    shape: ExchangeShape | None,
    dtype: str,
    *,
    again: bool = False,
) -> Opened:
    """See ``transports.Transport.open``; the peers are connected in the background.

    Another process may trace its program later, so only the first exchange waits for the connection.

    Raises:
      LibraryError: the native library is missing or does not fit.
      TransportError: a group could not be opened, or with ``again`` not connected.
    """
    del dtype
    name = open_groups(place, place.num_ranks, again=again)
    if cfg is None or shape is None:
        return Opened(name)
    # The kernels of GPUs quantise on the way. The CPU's loops would do it no faster than XLA's.
    quantises = cfg.wire_dtype == "fp8" and place.platform == "gpu"
    given = attributes(
        name,
        cfg.describe(),
        shape,
        wire="fp8" if quantises else "",
        delivery=delivery.choose(place, cfg)[0],
    )
    return Opened(name, given, quantises)


def open_groups(place: Place, num_ranks: int, *, again: bool) -> str:
    """Opens a group for each run of so many ranks along the axis, a divisor of R; gives the table's name."""
    if place.platform is None:
        name = abstract_name(place.mesh, place.ep_axis)
        return name if num_ranks == place.num_ranks else f"{name}-{num_ranks}"
    assert place.backend is not None
    groups = groups_of(place.mesh, place.ep_axis).split(num_ranks)
    group.open_groups(groups, place.backend, again=again)
    return groups.name


def attributes(
    name: str,
    config: str,
    shape: ExchangeShape,
    *,
    num_nodes: int = 1,
    wire: str = "",
    delivery: str,
) -> tuple[tuple[str, int | str], ...]:
    """The attributes of the custom calls.

    Args:
      name: of the groups.
      config: a text that the ranks compare at run time.
      shape: the sizes.
      num_nodes: each rank's tokens are those of so many nodes, as many of each, one node's after the other's;
        the rows are then ordered by local expert, node, rank and token.
      wire: "fp8" where dispatch takes tokens as they are and sends float8.
      delivery: "pull" or "put", see ``transports.delivery``.
    """
    return (
        ("group", name),
        ("config", config),
        ("num_experts", shape.num_experts),
        ("num_local_experts", shape.num_local_experts),
        ("block", shape.block),
        ("num_nodes", num_nodes),
        ("wire", wire),
        ("delivery", delivery),
    )


def describe(place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str) -> str | None:
    """See ``transports.Describes``."""
    del shape, dtype
    try:
        said = delivery.describe(place, cfg)
    except TransportError as error:
        return f"refuses every exchange: {error}"
    return said if place.platform == "gpu" and place.num_ranks > 1 else None


def dispatch(
    link: Link, x: jax.Array, ids: jax.Array, weights: jax.Array, words: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Own, jax.Array]:
    """See ``transports.Transport.dispatch``."""
    shape = link.shape
    _check_dtype(x, (*ROW_DTYPES, "uint8"))
    carried = compat.pcast_varying(words, compat.varying_axes(x))
    results = (
        compat.result_type(x, (shape.capacity, x.shape[1]), x.dtype),
        compat.result_type(x, (shape.capacity,), jnp.float32),
        compat.result_type(x, (shape.num_local_experts,), jnp.int32),
        compat.result_type(x, (shape.num_ranks, shape.num_tokens, shape.top_k), jnp.int32),
        compat.result_type(x, (shape.num_ranks, shape.num_tokens), jnp.int32),
        compat.result_type_shared(words, (shape.num_ranks, words.shape[0]), jnp.int32, link.ep_axis),
        compat.result_type(x, (1,), jnp.int32),
    )
    rows, row_weights, group_sizes, routes, places, all_words, order = targets.call(
        targets.DISPATCH,
        results,
        *(x, ids, weights, carried, targets.own_rank(link.ep_axis, x), order),
        attributes=link.opened.attributes,
    )
    return rows, row_weights, group_sizes, all_words, Own(routes, places), order


def replay(
    link: Link, x: jax.Array, ids: jax.Array, own: Own, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See ``transports.Transport.replay``."""
    shape = link.shape
    _check_dtype(x, ROW_DTYPES)
    results = (
        compat.result_type(x, (shape.capacity, x.shape[1]), x.dtype),
        compat.result_type(x, (1,), jnp.int32),
    )
    rows, order = targets.call(
        targets.REPLAY,
        results,
        *(x, own.routes, ids, targets.own_rank(link.ep_axis, x), order),
        attributes=link.opened.attributes,
    )
    return rows, order


def combine(
    link: Link,
    rows: jax.Array,
    ids: jax.Array,
    own: Own,
    order: jax.Array,
    row_scalars: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """See ``transports.Transport.combine``."""
    shape = link.shape
    _check_dtype(rows, ROW_DTYPES)
    # An empty operand stands for "no scalars", so that one target serves the forward and the backward pass.
    carried = row_scalars is not None
    scalars = row_scalars if carried else compat.zeros_like_varying((0,), jnp.float32, rows)
    results = (
        compat.result_type(rows, (shape.num_tokens, rows.shape[1]), rows.dtype),
        compat.result_type(rows, (shape.num_tokens if carried else 0, shape.top_k), jnp.float32),
        compat.result_type(rows, (1,), jnp.int32),
    )
    y, token_scalars, order = targets.call(
        targets.COMBINE,
        results,
        *(rows, scalars, own.routes, own.places, ids, targets.own_rank(link.ep_axis, rows), order),
        attributes=link.opened.attributes,
    )
    return y, token_scalars if carried else None, order


def _check_dtype(x: jax.Array, allowed: tuple[str, ...]) -> None:
    if str(x.dtype) not in allowed:
        raise ConfigError(
            rule(
                "dtype",
                str(x.dtype),
                f"be one of {ROW_DTYPES} with transport='native'",
                "cast x, or use another transport",
            )
        )
