"""Dispatch, experts and combine as one step of the layer: in one custom call, or in three.

Where a transport and an implementation of the experts both work on tokens as they come, a program that is not
differentiated runs the one call: no rows are made, and no buffer is as large as the capacity. Its derivative
is that of the three, which a program that is differentiated runs in its place.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_moriep import exchange, experts, transports
from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.plan import Link
from jax_moriep.runtime import compat
from jax_moriep.runtime.order import as_count, of_count
from jax_moriep.runtime.place import Place


def is_one_call(
    cfg: MoEConfig, transport: str, implementation: str, dtype: Any, *, num_nodes: int = 1
) -> bool:
    """Whether a program that is not differentiated runs one custom call.

    A layer with a ``capacity_factor`` does not: there is no capacity that tokens could exceed, so what is
    dropped would depend on what runs.

    Args:
      cfg: the layer.
      transport: the transport's name.
      implementation: the experts'.
      dtype: of x.
      num_nodes: machines of the group; the one call stays on one.
    """
    return (
        num_nodes == 1
        and cfg.capacity_factor is None
        and jnp.dtype(dtype) == jnp.bfloat16
        and transports.with_experts(transport) is not None
        and isinstance(experts.IMPLEMENTATIONS[implementation], experts.RunsOnTokens)
    )


class Tokens(NamedTuple):
    """What a layer's step is given on one rank."""

    x: jax.Array
    """[T, H]."""
    ids: jax.Array
    """i32[T, K]."""
    weights: jax.Array
    """f32[T, K], or of another floating dtype."""
    words: jax.Array
    """i32[W], carried to all ranks."""
    params: MoEParams
    """This rank's experts."""
    order: jax.Array
    """f32[1]."""
    stack: experts.Stack | None = None
    """Where experts that are not laid out for one call may be read."""


Results = tuple[jax.Array, jax.Array, jax.Array]
"""y [T, H], the words of all ranks i32[R, W], and the order."""


def run(link: Link, cfg: MoEConfig, given: Tokens) -> Results:
    """The tokens' way to their experts and back, inside shard_map.

    Args:
      link: the exchange.
      cfg: the layer.
      given: the tokens, where they go, and the experts here.

    Returns:
      y [T, H], the words of all ranks i32[R, W], and the order.
    """
    if given.params.layout != "plain":
        place = Place(link.platform, link.architecture)
        nodes = int(dict(link.opened.attributes).get("num_nodes", 1))
        implementation = experts.choose(cfg, place)
        if is_one_call(cfg, link.transport, implementation, given.x.dtype, num_nodes=nodes):
            return _one_call(link, cfg, _varying(given, link.ep_axis))
    return _three_calls(link, cfg, given)


def _varying(given: Tokens, ep_axis: str) -> Tokens:
    """As the one call takes them: all but the words vary over the same axes."""
    axes = frozenset({ep_axis})
    coded = experts.without_gradients(given.params)
    # The words are the same along other axes, and so are all ranks' words.
    others = (given.x, given.ids, given.weights.astype(jnp.float32), coded, given.order)
    leaves, tree = jax.tree.flatten(others)
    leaves = compat.union_varying(*(compat.pcast_varying(leaf, axes) for leaf in leaves))
    x, ids, weights, params, order = jax.tree.unflatten(tree, leaves)
    return Tokens(x, ids, weights, compat.pcast_varying(given.words, axes), params, order)


def _three_calls(link: Link, cfg: MoEConfig, given: Tokens) -> Results:
    disp, all_words, order = exchange.ordered_dispatch(
        link, cfg, given.x, given.ids, given.weights, given.words, given.order
    )
    with jax.named_scope("moriep.experts"):
        rows = experts.of_rows(disp, given.params, cfg, given.stack)
    y, order = exchange.ordered_combine(rows, disp.plan, order)
    return y, all_words, order


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _one_call(link: Link, cfg: MoEConfig, given: Tokens) -> Results:
    transport = transports.with_experts(link.transport)
    assert transport is not None
    layer = experts.expert_tokens(
        given.params, cfg, link, backend=transport.BACKEND, fp8_wire=link.opened.quantises
    )
    with jax.named_scope("moriep.fused"):
        y, all_words, count = transport.run_experts(
            link,
            *(given.x, given.ids, given.weights),
            operands=layer.operands,
            attributes=layer.attributes,
            scratch=(layer.code_rows, layer.row_scales, layer.words),
            words=given.words,
            order=as_count(given.order),
        )
    return y, all_words, of_count(count)


def _one_call_fwd(link: Link, cfg: MoEConfig, given: Tokens) -> tuple[Any, Any]:
    def run(x: jax.Array, weights: jax.Array, order: jax.Array) -> Results:
        return _three_calls(link, cfg, given._replace(x=x, weights=weights, order=order))

    return jax.vjp(run, given.x, given.weights, given.order)


def _one_call_bwd(link: Link, cfg: MoEConfig, pull: Any, cotangents: Any) -> tuple[Any, ...]:
    del link, cfg
    d_x, d_weights, d_order = pull(cotangents)
    none: Any = None
    return (Tokens(d_x, none, d_weights, none, none, d_order),)


_one_call.defvjp(_one_call_fwd, _one_call_bwd)
