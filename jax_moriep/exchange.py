"""dispatch and combine: the two exchanges, each the transpose of the other, over any transport.

Both are differentiable in reverse mode. The gradient of dispatch is a combine of the rows' cotangents, which
carries the router's scalars along; the gradient of combine is a replay of dispatch along the same plan.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_moriep import quant
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.plan import Dispatched, ExchangeShape, Link, Plan
from jax_moriep.runtime import compat, group
from jax_moriep.runtime import order as order_chain
from jax_moriep.runtime.unbatched import unbatched
from jax_moriep.transports import IMPLEMENTATIONS, choose

DISPATCH_NAME = "moriep_dispatch"
COMBINE_NAME = "moriep_combine"

_VMAP_CURE = (
    "dispatch and combine cannot be batched by jax.vmap, because a batched exchange is another exchange; "
    "put the batch into the tokens, x [T, H]"
)


def checkpoint_policy() -> Any:
    """The policy for ``jax.checkpoint`` that saves what the exchanges bring and recomputes the experts.

    Dispatched rows, their plan and the combined result cost communication to make again; everything else is
    local arithmetic. Use it as ``jax.checkpoint(layer, policy=jm.checkpoint_policy())``.
    """
    return jax.checkpoint_policies.save_only_these_names(DISPATCH_NAME, COMBINE_NAME)


def dispatch(
    x: jax.Array, ids: jax.Array, weights: jax.Array, cfg: MoEConfig, *, axis_name: str = "ep"
) -> Dispatched:
    """Sends each token to the ranks of its experts; inside shard_map.

    Args:
      x: [T, H], this rank's tokens.
      ids: i32[T, K], expert ids; -1 and ids at or above E mean no route.
      weights: f32[T, K], router weights.
      cfg: the layer.
      axis_name: the mesh axis whose devices are the ranks.

    Returns:
      What the experts of this rank see; differentiable in x and weights.

    Raises:
      ConfigError: a shape or dtype breaks a rule.
      ShardingError: there is no such mesh axis in the context.
      TransportError: the transport cannot run here.
    """
    link = link_in_shard_map(x, ids, weights, cfg, axis_name)
    x, ids, weights = unbatched((x, ids, weights), _VMAP_CURE)
    key = _chain_key(link, x, ids, weights)
    token = order_chain.last(key)
    disp, token = ordered_dispatch(
        link, cfg, x, ids, weights, order_chain.start() if token is None else token
    )
    order_chain.leave(key, token)
    return disp


def combine(rows: jax.Array, plan: Plan, *, axis_name: str = "ep") -> jax.Array:
    """Returns each row to its token and adds a token's rows; inside shard_map.

    Args:
      rows: [C, H], the experts' results, already times their router weights.
      plan: of the dispatch that brought the rows.
      axis_name: the axis of that dispatch.

    Returns:
      [T, H] in the rows' dtype, added up in f32; zeros for a token with no route.

    Raises:
      ConfigError: rows does not fit the plan.
      ShardingError: the plan was made over another axis.
    """
    if axis_name != plan.link.axis_name:
        raise ShardingError(
            rule(
                "axis_name",
                axis_name,
                f"be the axis of the plan, {plan.link.axis_name!r}",
                "use one axis for both",
            )
        )
    shape = plan.link.shape
    if rows.shape != (shape.capacity, shape.hidden_size):
        raise ConfigError(
            rule(
                "rows.shape",
                rows.shape,
                f"be {(shape.capacity, shape.hidden_size)}",
                "pass dispatch's rows, transformed",
            )
        )
    rows = unbatched(rows, _VMAP_CURE)
    key = _chain_key(plan.link, rows, plan.routes)
    token = order_chain.last(key)
    y, token = ordered_combine(rows, plan, order_chain.start() if token is None else token)
    order_chain.leave(key, token)
    return y


def ordered_dispatch(
    link: Link, cfg: MoEConfig, x: jax.Array, ids: jax.Array, weights: jax.Array, token: jax.Array
) -> tuple[Dispatched, jax.Array]:
    """dispatch with the order token in the caller's hands; f32[1] goes in and comes out."""
    x, ids, weights, token = _varying_over(link.axis_name, x, ids, weights, token)
    with jax.named_scope("moriep.dispatch"):
        outputs: Any = _dispatch(link, cfg.wire_dtype == "fp8", x, ids, weights.astype(jnp.float32), token)
    rows, row_weights, group_sizes, plan, token = outputs
    return Dispatched(rows, row_weights, group_sizes, plan, block=link.shape.block), token


def ordered_combine(rows: jax.Array, plan: Plan, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """combine with the order token in the caller's hands; f32[1] goes in and comes out."""
    rows, routes, ids, token = _varying_over(plan.link.axis_name, rows, plan.routes, plan.ids, token)
    slots = None if plan.slots is None else compat.union_varying(plan.slots, rows)[0]
    plan = dataclasses.replace(plan, routes=routes, ids=ids, slots=slots)
    with jax.named_scope("moriep.combine"):
        return _combine(rows, plan, token)


def make_link(cfg: MoEConfig, mesh: Any, num_tokens: int, axis_name: str) -> Link:
    """The static side of an exchange of ``num_tokens`` tokens per rank.

    It takes the transport that cfg asks for on the mesh, and opens the groups that this needs.
    """
    platform, group_name = None, ""
    if isinstance(mesh, jax.sharding.AbstractMesh):
        transport = choose(cfg.transport, None)
        if transport == "native":
            group_name = group.abstract_name(mesh, axis_name)
    else:
        groups = group.groups_of(mesh, axis_name)
        platform = groups.platform
        asked = cfg.transport in ("auto", "native")
        transport = choose(cfg.transport, platform, one_machine=asked and group.one_machine(groups))
        if transport == "native":
            group_name = group.open_groups(mesh, axis_name).name
    return Link(
        shape=ExchangeShape.of(cfg, mesh.shape[axis_name], num_tokens),
        transport=transport,
        axis_name=axis_name,
        group=group_name,
        config=cfg.describe(),
        platform=platform,
    )


def link_in_shard_map(
    x: jax.Array, ids: jax.Array, weights: jax.Array, cfg: MoEConfig, axis_name: str
) -> Link:
    """Checks the operands of a dispatch and finds the mesh, the transport and the sizes."""
    check_tokens(x, cfg)
    want = (x.shape[0], cfg.top_k)
    for name, array in (("ids", ids), ("weights", weights)):
        if array.shape != want:
            raise ConfigError(
                rule(f"{name}.shape", array.shape, f"be (T, top_k) = {want}", "pass jm.route's arrays")
            )
    if ids.dtype != jnp.int32:
        raise ConfigError(rule("ids.dtype", str(ids.dtype), "be int32", "cast them"))
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ConfigError(rule("weights.dtype", str(weights.dtype), "be floating", "cast them to float32"))
    return make_link(cfg, group.mesh_in_shard_map(axis_name), x.shape[0], axis_name)


def check_tokens(x: jax.Array, cfg: MoEConfig) -> None:
    """Raises ConfigError unless x is [T, hidden_size] of a dtype that rows can have."""
    if x.ndim != 2 or x.shape[1] != cfg.hidden_size:
        raise ConfigError(
            rule("x.shape", x.shape, f"be (T, hidden_size={cfg.hidden_size})", "reshape x to [T, H]")
        )
    if str(x.dtype) not in ("float32", "bfloat16", "float16"):
        raise ConfigError(rule("x.dtype", str(x.dtype), "be float32, bfloat16 or float16", "cast x"))


def _varying_over(axis_name: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Types all operands alike, varying over the ranks too, so that forward and backward types agree."""
    return tuple(compat.pcast_varying(x, frozenset({axis_name})) for x in compat.union_varying(*arrays))


def _chain_key(link: Link, *arrays: jax.Array) -> tuple[Any, ...]:
    axes = frozenset().union(*(compat.varying_axes(x) for x in arrays))
    return (link.axis_name, link.group, axes | {link.axis_name})


def _to_order(token: jax.Array) -> jax.Array:
    return token.astype(jnp.int32)


def _to_token(order: jax.Array) -> jax.Array:
    return order.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(
    link: Link, fp8: bool, x: jax.Array, ids: jax.Array, weights: jax.Array, token: jax.Array
) -> Any:
    return _dispatch_fwd(link, fp8, x, ids, weights, token)[0]


def _dispatch_fwd(
    link: Link, fp8: bool, x: jax.Array, ids: jax.Array, weights: jax.Array, token: jax.Array
) -> tuple[Any, Plan]:
    transport = IMPLEMENTATIONS[link.transport]
    wire = quant.pack(x) if fp8 else x
    rows, row_weights, group_sizes, plan, order = transport.dispatch(
        link, wire, ids, weights, _to_order(token)
    )
    # Named together and here, so that a checkpoint policy saves all of them or none: rows made again beside
    # a saved plan would be an exchange that nothing orders.
    rows, row_weights, group_sizes, plan, order = checkpoint_name(
        (rows, row_weights, group_sizes, plan, order), DISPATCH_NAME
    )
    if fp8:
        rows = quant.unpack(rows, x.shape[1], x.dtype)
    return (rows, row_weights, group_sizes, plan, _to_token(order)), plan


def _dispatch_bwd(link: Link, fp8: bool, plan: Plan, cotangents: Any) -> tuple[Any, ...]:
    del fp8  # The gradient passes the quantisation as if it were not there (straight through).
    d_rows, d_row_weights, _, _, d_token = cotangents
    d_x, d_weights, order = IMPLEMENTATIONS[link.transport].combine(
        link, d_rows, plan, _to_order(d_token), row_scalars=d_row_weights
    )
    return d_x, None, d_weights, _to_token(order)


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(rows: jax.Array, plan: Plan, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _combine_fwd(rows, plan, token)[0]


def _combine_fwd(rows: jax.Array, plan: Plan, token: jax.Array) -> tuple[Any, tuple[Plan, jax.Array]]:
    y, _, order = IMPLEMENTATIONS[plan.link.transport].combine(plan.link, rows, plan, _to_order(token))
    y, order = checkpoint_name((y, order), COMBINE_NAME)
    return (y, _to_token(order)), (plan, order)


def _combine_bwd(residuals: tuple[Plan, jax.Array], cotangents: Any) -> tuple[Any, ...]:
    plan, forward = residuals
    d_y, d_token = cotangents
    # Where the loss is linear in y, neither cotangent depends on the forward pass. The maximum does, so that
    # no rank begins the way back before it has ended the way there.
    order = jnp.maximum(_to_order(d_token), forward)
    d_rows, order = IMPLEMENTATIONS[plan.link.transport].replay(plan.link, d_y, plan, order)
    return d_rows, None, _to_token(order)


_combine.defvjp(_combine_fwd, _combine_bwd)
