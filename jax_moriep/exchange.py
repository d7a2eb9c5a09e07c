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

from jax_moriep import experts, quant, transports
from jax_moriep.config import MoEConfig, check_type
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.operands import check_array, check_tokens
from jax_moriep.plan import Dispatched, ExchangeShape, Link, Plan
from jax_moriep.runtime import compat
from jax_moriep.runtime.derivatives import first_order, reverse_only
from jax_moriep.runtime.mesh import mesh_in_shard_map, remember_mesh
from jax_moriep.runtime.order import as_count, chained, forget, of_count
from jax_moriep.runtime.place import Place
from jax_moriep.runtime.unbatched import unbatched
from jax_moriep.transports import IMPLEMENTATIONS, choose, with_experts

DISPATCH_NAME = "moriep_dispatch"
COMBINE_NAME = "moriep_combine"

_VMAP_CURE = (
    "dispatch and combine cannot be batched by jax.vmap, because a batched exchange is another exchange; "
    "put the batch into the tokens, x [T, H]"
)
_VMAP_BACK_CURE = (
    "the cotangents of an exchange cannot be batched by jax.vmap (as jax.jacrev does), because a batched "
    "exchange is another exchange; call the function of jax.vjp once for each, in a loop or by jax.lax.map"
)


def checkpoint_policy(save: str = "exchanges") -> Any:
    """A policy for ``jax.checkpoint``: ``jax.checkpoint(layer, policy=jm.checkpoint_policy())``.

    Args:
      save: "exchanges" saves what the exchanges bring and computes the experts again: dispatched rows, their
        plan and the combined result cost communication to make again, everything else is local arithmetic.
        "experts" saves the experts' pre-activations and the combined result, and dispatches again: with one
        rank that is a permutation of its own tokens, and the rows are most of what a layer saves otherwise.

    Raises:
      ConfigError: ``save`` is neither.
    """
    names = {"exchanges": (DISPATCH_NAME, COMBINE_NAME), "experts": (experts.SAVED_NAME, COMBINE_NAME)}
    if save not in names:
        raise ConfigError(rule("save", save, f"be one of {', '.join(names)}", "choose what is kept"))
    return jax.checkpoint_policies.save_only_these_names(*names[save])


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
    x, ids, weights = unbatched(reverse_only((x, ids, weights), "dispatch"), _VMAP_CURE)
    with chained(_chain_key(link, x, ids, weights)) as chain:
        disp, _, chain.order = ordered_dispatch(
            link, cfg, x, ids, weights, jnp.zeros(0, jnp.int32), chain.order
        )
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
    check_type("plan", plan, Plan, "pass the plan of jm.dispatch's result")
    check_array("rows", rows, "pass dispatch's rows, transformed")
    if axis_name != plan.link.ep_axis:
        raise ShardingError(
            rule(
                "axis_name",
                axis_name,
                f"be the axis of the plan, {plan.link.ep_axis!r}",
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
    rows = unbatched(reverse_only(rows, "combine"), _VMAP_CURE)
    with chained(_chain_key(plan.link, rows, *jax.tree.leaves(plan.own))) as chain:
        y, chain.order = ordered_combine(rows, plan, chain.order)
    return y


def ordered_dispatch(
    link: Link,
    cfg: MoEConfig,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    words: jax.Array,
    order: jax.Array,
) -> tuple[Dispatched, jax.Array, jax.Array]:
    """dispatch with the order in the caller's hands; f32[1] goes in and comes out.

    Args:
      link: the static side of the exchange.
      cfg: the layer.
      x: [T, H].
      ids: i32[T, K].
      weights: floating [T, K].
      words: i32[W], for every rank.
      order: f32[1].

    Returns:
      What the experts see, every rank's words i32[R, W], and the order.
    """
    x, ids, weights, order = _varying_over(link.ep_axis, x, ids, weights, order)
    # Not over the other operands' axes: what the words say there, all_words says too.
    (words,) = _varying_over(link.ep_axis, words)
    with jax.named_scope("moriep.dispatch"):
        packed = cfg.wire_dtype == "fp8" and not link.opened.quantises
        outputs: Any = _dispatch(link, packed, x, ids, weights.astype(jnp.float32), words, order)
    rows, row_weights, group_sizes, all_words, plan, order = outputs
    return Dispatched(rows, row_weights, group_sizes, plan, block=link.shape.block), all_words, order


def ordered_combine(rows: jax.Array, plan: Plan, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """combine with the order in the caller's hands; f32[1] goes in and comes out."""
    leaves, tree = jax.tree.flatten(plan.own)
    rows, order, ids, *leaves = _varying_over(plan.link.ep_axis, rows, order, plan.ids, *leaves)
    plan = dataclasses.replace(plan, ids=ids, own=jax.tree.unflatten(tree, leaves))
    with jax.named_scope("moriep.combine"):
        return _combine(rows, plan, order)


def make_link(cfg: MoEConfig, mesh: Any, num_tokens: int, dtype: Any, ep_axis: str) -> Link:
    """The static side of an exchange of ``num_tokens`` tokens per rank of a dtype, over the transport that
    cfg asks for at this place, which opens itself.

    Raises:
      ShardingError: the mesh has no such axis.
      TransportError: the transport cannot run or cannot be opened here.
    """
    place = Place.of(mesh, ep_axis)
    shape = ExchangeShape.of(cfg, place.num_ranks, num_tokens)
    transport = choose(cfg.transport, place)
    opened = transports.opened(transport, place, cfg, shape, jnp.dtype(dtype).name)
    return Link(shape, transport, ep_axis, place.platform, place.architecture, opened)


def initialize(
    mesh: jax.sharding.Mesh,
    ep_axis: str = "ep",
    *,
    cfg: MoEConfig | None = None,
    num_tokens: int | None = None,
    dtype: Any = None,
) -> None:
    """Opens now what the exchanges over a mesh axis need, and waits for all ranks; optional and idempotent.

    ``ep_moe`` opens its transport when it is traced. Call this before running a deserialised executable,
    before using ``jm.dispatch`` in a shard_map whose mesh is not in context, or to begin anew after a group
    has failed. Every process of the mesh must call it.

    Args:
      mesh: the mesh.
      ep_axis: its expert-parallel axis.
      cfg: the layer whose transport is opened and whose experts' kernels are loaded; None: the transport that
        ``transport="auto"`` takes here.
      num_tokens: T, tokens per rank, for transports whose buffers depend on it; needs cfg.
      dtype: of the tokens, for the same; bfloat16 if not given.

    Raises:
      ConfigError: num_tokens is given without cfg.
      ShardingError: the mesh has no such axis.
      TransportError: the transport cannot be opened, or the ranks do not all come.
    """
    if cfg is None and num_tokens is not None:
        raise ConfigError(rule("num_tokens", num_tokens, "come with cfg", "pass the layer's config as well"))
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ShardingError(
            rule("mesh", type(mesh).__name__, "be a jax.sharding.Mesh with devices", "pass the mesh itself")
        )
    if cfg is not None:
        check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    if num_tokens is not None and num_tokens < 0:
        raise ConfigError(rule("num_tokens", num_tokens, "be 0 or more", "pass the tokens of one rank"))
    forget()
    place = Place.of(mesh, ep_axis)
    shape = None if cfg is None or num_tokens is None else ExchangeShape.of(cfg, place.num_ranks, num_tokens)
    transport = choose("auto" if cfg is None else cfg.transport, place)
    name = jnp.dtype(jnp.bfloat16 if dtype is None else dtype).name
    transports.opened(transport, place, cfg, shape, name, again=True)
    if cfg is not None:
        runs_experts = with_experts(transport)
        experts.open_for(cfg, place, None if runs_experts is None else runs_experts.BACKEND)
    # After it has opened: a mesh that was refused must not be found by its shape later.
    remember_mesh(mesh)


def link_in_shard_map(x: jax.Array, ids: jax.Array, weights: jax.Array, cfg: MoEConfig, ep_axis: str) -> Link:
    """Checks the operands of a dispatch and finds the mesh, the transport and the sizes."""
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    check_tokens(x, cfg, in_rows=True)
    want = (x.shape[0], cfg.top_k)
    for name, array in (("ids", ids), ("weights", weights)):
        check_array(name, array, "pass jm.route's arrays")
        if array.shape != want:
            raise ConfigError(
                rule(f"{name}.shape", array.shape, f"be (T, top_k) = {want}", "pass jm.route's arrays")
            )
    if ids.dtype != jnp.int32:
        raise ConfigError(rule("ids.dtype", str(ids.dtype), "be int32", "cast them"))
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ConfigError(rule("weights.dtype", str(weights.dtype), "be floating", "cast them to float32"))
    return make_link(cfg, mesh_in_shard_map(ep_axis), x.shape[0], x.dtype, ep_axis)


def _varying_over(ep_axis: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Types all operands alike, varying over the ranks too, so that forward and backward types agree."""
    return tuple(compat.pcast_varying(x, frozenset({ep_axis})) for x in compat.union_varying(*arrays))


def _chain_key(link: Link, *arrays: jax.Array) -> tuple[Any, ...]:
    axes = frozenset().union(*(compat.varying_axes(x) for x in arrays))
    return (link.ep_axis, link.opened.group, axes | {link.ep_axis})


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dispatch(
    link: Link,
    packed: bool,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    words: jax.Array,
    order: jax.Array,
) -> Any:
    return _dispatch_fwd(link, packed, x, ids, weights, words, order)[0]


def _dispatch_fwd(
    link: Link,
    packed: bool,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    words: jax.Array,
    order: jax.Array,
) -> tuple[Any, Plan]:
    x, weights = first_order((x, weights), "dispatch")
    transport = IMPLEMENTATIONS[link.transport]
    fp8 = quant.format_of(link.architecture)
    wire = quant.pack(x, fp8) if packed else x
    rows, row_weights, group_sizes, all_words, own, count = transport.dispatch(
        link, wire, ids, weights, words, as_count(order)
    )
    plan = Plan(ids, own, link)
    # Named together and here, so that a checkpoint policy saves all of them or none: rows made again beside
    # a saved plan would be an exchange that nothing orders.
    rows, row_weights, group_sizes, all_words, plan, count = checkpoint_name(
        (rows, row_weights, group_sizes, all_words, plan, count), DISPATCH_NAME
    )
    if packed:
        rows = quant.unpack(rows, x.shape[1], x.dtype, fp8)
    return (rows, row_weights, group_sizes, all_words, plan, of_count(count)), plan


def _dispatch_bwd(link: Link, packed: bool, plan: Plan, cotangents: Any) -> tuple[Any, ...]:
    del packed  # The gradient passes the quantisation as if it were not there (straight through).
    d_rows, d_row_weights, _, _, _, d_order = unbatched(cotangents, _VMAP_BACK_CURE)
    d_x, d_weights, count = IMPLEMENTATIONS[link.transport].combine(
        link, d_rows, plan.ids, plan.own, as_count(d_order), row_scalars=d_row_weights
    )
    return d_x, None, d_weights, None, of_count(count)


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _combine(rows: jax.Array, plan: Plan, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _combine_fwd(rows, plan, order)[0]


def _combine_fwd(rows: jax.Array, plan: Plan, order: jax.Array) -> tuple[Any, tuple[Plan, jax.Array]]:
    rows = first_order(rows, "combine")
    transport = IMPLEMENTATIONS[plan.link.transport]
    y, _, count = transport.combine(plan.link, rows, plan.ids, plan.own, as_count(order))
    y, count = checkpoint_name((y, count), COMBINE_NAME)
    return (y, of_count(count)), (plan, count)


def _combine_bwd(residuals: tuple[Plan, jax.Array], cotangents: Any) -> tuple[Any, ...]:
    plan, forward = residuals
    d_y, d_order = unbatched(cotangents, _VMAP_BACK_CURE)
    # Where the loss is linear in y, neither cotangent depends on the forward pass. The maximum does, so that
    # no rank begins the way back before it has ended the way there.
    count = jnp.maximum(as_count(d_order), forward)
    d_rows, count = IMPLEMENTATIONS[plan.link.transport].replay(plan.link, d_y, plan.ids, plan.own, count)
    return d_rows, None, of_count(count)


_combine.defvjp(_combine_fwd, _combine_bwd)
