"""transport="two_level": the native transport inside each node, jax's collectives between nodes.

The ranks along the axis are N nodes of P adjacent ranks (``runtime.nodes``). Each rank speaks with the ranks
at its own place in the other nodes, and with the ranks of its node:

1. dispatch: tokens and routing are gathered over the N ranks at a place, so one copy of a token crosses to
   each node. The node's P ranks then have N·T tokens each, and the native transport exchanges them, with the
   ids of the node's experts only. It orders rows by node first, which makes them those of any transport.
   Ranks of a node compare their programs there; between nodes a digest of the config goes along, and where
   it differs the row weights are NaN, so that no wrong number comes of it.
2. combine: the native transport adds a token's rows over the node's ranks. One row per (token, node) goes
   back, and its owner adds them in the order of the nodes.
3. replay, combine's backward: as dispatch, along the plan.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep import quant
from jax_moriep.config import MoEConfig
from jax_moriep.errors import TransportError
from jax_moriep.plan import ExchangeShape, Link, Opened
from jax_moriep.runtime import compat, settings
from jax_moriep.runtime.place import Place
from jax_moriep.transports import delivery, native


class Own(NamedTuple):
    """What a plan keeps."""

    inside: native.Own
    """Of the exchange inside the node."""
    ids: jax.Array
    """i32[N·T, K]: by source node and token, which expert of this node a route goes to, -1 for none of it."""


def unavailable_reason(place: Place) -> str | None:
    """See ``transports.Transport.unavailable_reason``."""
    try:
        settings.RANKS_PER_NODE.value()
    except TransportError as e:
        return str(e)
    return native.unavailable_on_a_machine(place)


def open(  # noqa: A001 - the contract's name
    place: Place,
    cfg: MoEConfig | None,
    shape: ExchangeShape | None,
    dtype: str,
    *,
    again: bool = False,
) -> Opened:
    """See ``transports.Transport.open``; jax opens its collectives itself.

    An fp8 wire is packed before, on GPUs too, so that what crosses between nodes is float8.

    Raises:
      LibraryError: the native library is missing or does not fit.
      TransportError: a node's group could not be opened, or with ``again`` not connected.
    """
    size = place.ranks_per_node
    name = native.open_groups(place, size, again=again)
    if cfg is None or shape is None:
        return Opened(name)
    num_nodes = place.num_ranks // size
    # With the dtype, which the digest needs: float16 and bfloat16 have as many bytes.
    config = f"{num_nodes} nodes of {size} ranks, {dtype}, {cfg.describe()}"
    inside = _inside(shape, num_nodes)
    return Opened(
        name,
        native.attributes(name, config, inside, num_nodes=num_nodes, delivery=delivery.choose(place, cfg)[0]),
    )


def describe(place: Place, cfg: MoEConfig, shape: ExchangeShape, dtype: str) -> str | None:
    """See ``transports.Describes.describe``."""
    size = place.ranks_per_node
    num_nodes = place.num_ranks // size
    if num_nodes == 1:
        return None
    row = quant.packed_width(shape.hidden_size) if cfg.wire_dtype == "fp8" else None
    row = row or shape.hidden_size * jnp.dtype(dtype).itemsize
    sent = (num_nodes - 1) * shape.num_tokens * (row + 8 * shape.top_k)
    return (
        f"{num_nodes} nodes of {size} ranks: native inside, jax's collectives between them\n"
        f"a dispatch sends {sent / 1e6:.3g} MB of each rank to other nodes"
    )


def dispatch(
    link: Link, x: jax.Array, ids: jax.Array, weights: jax.Array, words: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Own, jax.Array]:
    """See ``transports.Transport.dispatch``."""
    nodes = _Nodes.of(link)
    # As one array, because between nodes a message costs more than its bytes.
    routing = nodes.gathered(jnp.stack([ids, lax.bitcast_convert_type(weights, jnp.int32)]))
    all_ids = routing[:, 0].reshape(nodes.inside.shape.num_tokens, link.shape.top_k)
    all_weights = lax.bitcast_convert_type(routing[:, 1], jnp.float32).reshape(all_ids.shape)
    first = nodes.own_node() * nodes.inside.shape.num_experts
    end = jnp.minimum(first + nodes.inside.shape.num_experts, link.shape.num_experts)
    all_ids = jnp.where((all_ids >= first) & (all_ids < end), all_ids - first, -1)
    carried, agree = nodes.words(words, _digest(link))
    rows, row_weights, group_sizes, all_words, inside, order = native.dispatch(
        nodes.inside, nodes.tokens(x), all_ids, all_weights, carried.reshape(-1), order
    )
    row_weights = jnp.where(agree, row_weights, jnp.nan)
    # [place, node, W] -> by rank.
    by_place = (nodes.inside.shape.num_ranks, nodes.count, words.shape[0])
    all_words = all_words.reshape(by_place).swapaxes(0, 1).reshape(link.shape.num_ranks, words.shape[0])
    return rows, row_weights, group_sizes, all_words, Own(inside, all_ids), order


def replay(
    link: Link, x: jax.Array, ids: jax.Array, own: Own, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See ``transports.Transport.replay``."""
    del ids
    nodes = _Nodes.of(link)
    return native.replay(nodes.inside, nodes.tokens(x), own.ids, own.inside, order)


def combine(
    link: Link,
    rows: jax.Array,
    ids: jax.Array,
    own: Own,
    order: jax.Array,
    row_scalars: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """See ``transports.Transport.combine``."""
    del ids
    nodes = _Nodes.of(link)
    sums, scalars, order = native.combine(nodes.inside, rows, own.ids, own.inside, order, row_scalars)
    return nodes.given_back(sums), None if scalars is None else nodes.given_back(scalars), order


def _digest(link: Link) -> int:
    """i32 of the config and the sizes, the same where programs agree."""
    return zlib.crc32(repr(link.opened.attributes).encode()) - (1 << 31)


def _inside(shape: ExchangeShape, num_nodes: int) -> ExchangeShape:
    """The sizes of the exchange inside a node."""
    num_ranks = shape.num_ranks // num_nodes
    return dataclasses.replace(
        shape,
        num_ranks=num_ranks,
        num_tokens=num_nodes * shape.num_tokens,
        num_experts=num_ranks * shape.num_local_experts,
    )


@dataclasses.dataclass(frozen=True)
class _Nodes:
    """The nodes of an exchange, and what goes between them.

    Attributes:
      count: N.
      inside: the link of the exchange inside a node.
      across: the ranks at each place, which are in different nodes.
    """

    count: int
    inside: Link
    across: list[list[int]]

    @classmethod
    def of(cls, link: Link) -> _Nodes:
        count = int(dict(link.opened.attributes)["num_nodes"])
        inside = dataclasses.replace(link, shape=_inside(link.shape, count))
        ranks = range(link.shape.num_ranks)
        size = inside.shape.num_ranks
        return cls(count, inside, [list(ranks[place::size]) for place in range(size)])

    def own_node(self) -> jax.Array:
        return lax.axis_index(self.inside.ep_axis) // self.inside.shape.num_ranks

    def gathered(self, array: jax.Array) -> jax.Array:
        """[...] -> [N, ...], of the rank at this place in each node."""
        if self.count == 1:
            return array[None]
        return lax.all_gather(array, self.inside.ep_axis, axis_index_groups=self.across)

    def words(self, words: jax.Array, digest: int) -> tuple[jax.Array, jax.Array]:
        """i32[W] -> i32[N, W] of the rank at this place in each node, and whether all have this digest."""
        own = compat.pcast_varying(jnp.full((1,), digest, jnp.int32), compat.varying_axes(words))
        every = self.gathered(jnp.concatenate([words, own]))
        return every[:, :-1], jnp.all(every[:, -1] == digest)

    def tokens(self, x: jax.Array) -> jax.Array:
        """[T, H] -> [N·T, H]."""
        return self.gathered(x).reshape(self.inside.shape.num_tokens, x.shape[1])

    def given_back(self, values: jax.Array) -> jax.Array:
        """[N·T, ...], this node's for the tokens of each -> [T, ...], added over the nodes in order."""
        if self.count == 1:
            return values
        by_node = values.reshape(self.count, len(values) // self.count, values.shape[1])
        parts = lax.all_to_all(by_node, self.inside.ep_axis, 0, 0, axis_index_groups=self.across)
        total = parts[0].astype(jnp.float32)
        for node in range(1, self.count):
            total = total + parts[node].astype(jnp.float32)
        return total.astype(values.dtype)
