"""Dispatch, experts and combine as one step of the layer: in one custom call, or in three.

Where a transport and an implementation of the experts both work on tokens as they come, a program that is not
differentiated runs the one call: no rows are made, and no buffer is as large as the capacity. Its derivative
is that of the three, which a program that is differentiated runs in its place.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep import exchange, experts, transports
from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.plan import Link
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place


def is_one_call(cfg: MoEConfig, transport: str, implementation: str, dtype: Any) -> bool:
    """Whether a program that is not differentiated runs one custom call.

    A layer with a ``capacity_factor`` does not: there is no capacity that tokens could exceed, so what is
    dropped would depend on what runs.

    Args:
      cfg: the layer.
      transport: the transport's name.
      implementation: the experts'.
      dtype: of x.
    """
    return (
        cfg.capacity_factor is None
        and jnp.dtype(dtype) == jnp.bfloat16
        and transports.with_experts(transport) is not None
        and isinstance(experts.IMPLEMENTATIONS[implementation], experts.RunsOnTokens)
    )


def run(
    link: Link,
    cfg: MoEConfig,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    words: jax.Array,
    params: MoEParams,
    token: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens' way to their experts and back, inside shard_map.

    Args:
      link: the exchange.
      cfg: the layer.
      x: [T, H].
      ids: i32[T, K].
      weights: f32[T, K].
      words: i32[W], carried to all ranks.
      params: this rank's experts.
      token: the order token, f32[1].

    Returns:
      y [T, H], the words of all ranks i32[R, W], and the order token.
    """
    if params.layout != "plain":
        place = Place(link.platform, link.architecture)
        if is_one_call(cfg, link.transport, experts.choose(cfg, place), x.dtype):
            words = compat.pcast_varying(words, frozenset({link.axis_name}))
            coded = experts.without_gradients(params)
            leaves, tree = jax.tree.flatten((x, ids, weights.astype(jnp.float32), coded, token))
            axes = frozenset({link.axis_name})
            leaves = compat.union_varying(*(compat.pcast_varying(leaf, axes) for leaf in leaves))
            x, ids, weights, coded, token = jax.tree.unflatten(tree, leaves)
            return _one_call(link, cfg, x, ids, weights, words, coded, token)
    return _three_calls(link, cfg, x, ids, weights, words, params, token)


def _three_calls(
    link: Link,
    cfg: MoEConfig,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    words: jax.Array,
    params: MoEParams,
    token: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    disp, all_words, token = exchange.ordered_dispatch(link, cfg, x, ids, weights, words, token)
    with jax.named_scope("moriep.experts"):
        rows = experts.expert_mlp(disp, params, cfg)
    y, token = exchange.ordered_combine(rows, disp.plan, token)
    return y, all_words, token


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _one_call(
    link: Link,
    cfg: MoEConfig,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    words: jax.Array,
    params: MoEParams,
    token: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    transport = transports.with_experts(link.transport)
    assert transport is not None
    layer = experts.expert_tokens(
        params, cfg, link, backend=transport.BACKEND, fp8_wire=link.opened.quantises
    )
    with jax.named_scope("moriep.fused"):
        y, all_words, order = transport.run_experts(
            link,
            *(x, ids, weights),
            operands=layer.operands,
            attributes=layer.attributes,
            scratch=(layer.code_rows, layer.row_scales, layer.words),
            words=words,
            order=token.astype(jnp.int32),
        )
    return y, all_words, order.astype(jnp.float32)


def _one_call_fwd(
    link: Link,
    cfg: MoEConfig,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    words: jax.Array,
    params: MoEParams,
    token: jax.Array,
) -> tuple[Any, Any]:
    def run(x: jax.Array, weights: jax.Array, token: jax.Array) -> Any:
        return _three_calls(link, cfg, x, ids, weights, words, params, token)

    return jax.vjp(run, x, weights, token)


def _one_call_bwd(link: Link, cfg: MoEConfig, pull: Any, cotangents: Any) -> tuple[Any, ...]:
    del link, cfg
    d_x, d_weights, d_token = pull(cotangents)
    return d_x, None, d_weights, None, None, d_token


_one_call.defvjp(_one_call_fwd, _one_call_bwd)
