"""ep_moe: the whole expert-parallel layer in one call. The way of a token:

route (routing.py) -> dispatch (exchange.py, transports/) -> expert_mlp (experts/) -> combine -> y.

All but the first may be one call (fused.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jax_moriep import exchange, experts, fused, routing, schemes, stats
from jax_moriep import params as parameters
from jax_moriep.config import WEIGHT_NAMES, MoEConfig, MoEParams, MoEStats
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.layout import Layout, axes_of
from jax_moriep.plan import Link
from jax_moriep.runtime import compat, order
from jax_moriep.runtime.derivatives import reverse_only
from jax_moriep.runtime.unbatched import unbatched


def ep_moe(
    x: jax.Array,
    params: MoEParams,
    cfg: MoEConfig,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    ep_axis: str = "ep",
    token_axes: str | Sequence[str] | PartitionSpec | None = None,
    tp_axis: str | None = None,
    token_mask: jax.Array | None = None,
    route: routing.Route | None = None,
) -> tuple[jax.Array, MoEStats]:
    """One mixture-of-experts layer, its experts spread over the devices along ``ep_axis``.

    Works under jit, grad, ``jax.checkpoint`` (see ``jm.checkpoint_policy``) and ``lax.scan``, on Auto and
    Explicit meshes, with devices of one or of many processes. All ranks must run the same program.

    Args:
      x: [..., H]; tokens are split over ``token_axes``. On an Auto mesh any number of tokens works; one that
        does not divide is padded. On an Explicit mesh x must already be sharded over ``token_axes``.
      params: the weights, sharded by ``jm.param_specs(cfg, ep_axis, tp_axis)``.
      cfg: the layer.
      mesh: the mesh; None takes the one of ``jax.set_mesh``.
      ep_axis: the mesh axis whose devices are the ranks.
      token_axes: the axes over which tokens are split; None: every axis of the mesh but ``tp_axis``. A
        PartitionSpec says which of x's leading dimensions each axis splits; names split the first.
      tp_axis: the mesh axis that splits each expert's intermediate dimension, if any.
      token_mask: bool, x's shape without H; a token where it is False is not routed, counts in no statistic
        and gets zeros.
      route: where each token goes, chosen elsewhere, as ``jm.route`` returns it for this x: another model's
        router, or routes that are replayed. An id that is not in 0..E-1 is routed nowhere. The layer then
        reads neither ``cfg.router`` (but "llama4" still weighs the experts' inputs) nor the router's weights.
        Gradients flow back into its weights, scores and logits.

    Returns:
      y like x, and the statistics of the call.

    Raises:
      ConfigError: a shape or dtype breaks a rule.
      ShardingError: mesh, axes or shardings do not fit.
      TransportError: the transport cannot run here.
    """
    mesh = _resolve_mesh(mesh)
    layout = Layout.of(mesh, ep_axis, token_axes, tp_axis)
    _check_operands(x, params, cfg, layout, token_mask, route)
    x, params, token_mask, route = reverse_only((x, params, token_mask, route), "ep_moe")
    x, params, token_mask, route = unbatched((x, params, token_mask, route), _VMAP_CURE)
    params = (
        parameters.pad_params(params, layout.num_ranks)
        if not layout.explicit
        else _padded_explicit(params, cfg, layout, mesh)
    )

    lead = x.shape[:-1]
    x_spec, divides = layout.spec_of_tokens(x)
    if layout.explicit:
        x = jax.sharding.reshard(x, NamedSharding(mesh, x_spec))
    if not divides:
        # Tokens that fill the last shard; they are masked, so nothing sees them.
        x, token_mask, route = _pad_tokens(x, token_mask, route, layout.num_shards)
        x_spec = PartitionSpec(layout.token_axes)
    beside = (token_mask, route)
    if layout.explicit:
        beside = jax.tree.map(lambda a: jax.sharding.reshard(a, NamedSharding(mesh, x_spec)), beside)
    operands: list[Any] = [x, params, _order_in(mesh, params, layout), beside]

    link = exchange.make_link(cfg, mesh, math.prod(x.shape[:-1]) // layout.num_shards, x.dtype, ep_axis)

    specs = parameters.param_specs(cfg, ep_axis, tp_axis, params=params)
    mapped = _mapped(mesh, cfg, link, layout, x_spec, specs)
    if not any(map(compat.is_tracer, jax.tree.leaves(operands))):
        mapped = _compiled(mapped)
    y, measured, token = mapped(*operands)
    order.leave(layout.chain_key(mesh), token)
    if not divides:
        y = y[: math.prod(lead)].reshape(*lead, cfg.hidden_size)
    return y, measured


_VMAP_CURE = (
    "ep_moe cannot be batched by jax.vmap, because a batched exchange is another exchange; x may have any "
    "number of leading dimensions, so pass the whole batch as x [..., H] in one call"
)


@functools.lru_cache(maxsize=256)
def _mapped(
    mesh: Any,
    cfg: MoEConfig,
    link: Link,
    layout: Layout,
    x_spec: PartitionSpec,
    param_specs: MoEParams,
) -> Callable[..., tuple[jax.Array, MoEStats, jax.Array]]:
    """The layer over the mesh: fn(x, params, order token, (mask or None, route or None))."""

    def body(
        x: jax.Array, params: MoEParams, token: jax.Array, beside: Any
    ) -> tuple[jax.Array, MoEStats, jax.Array]:
        return _local_moe(x, params, cfg, link, layout, token, *beside)

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(x_spec, param_specs, layout.order_spec, x_spec),
        out_specs=(x_spec, PartitionSpec(), layout.order_spec),
    )


@functools.lru_cache(maxsize=256)
def _compiled(mapped: Callable[..., Any]) -> Callable[..., Any]:
    """For calls outside jit, where each operation of the layer would be compiled and run alone."""
    return jax.jit(mapped)


def _local_moe(
    x: jax.Array,
    params: MoEParams,
    cfg: MoEConfig,
    link: Link,
    layout: Layout,
    token: jax.Array,
    mask: jax.Array | None,
    route: routing.Route | None,
) -> tuple[jax.Array, MoEStats, jax.Array]:
    """The layer on one device, inside shard_map."""
    lead = x.shape[:-1]
    x = x.reshape(-1, x.shape[-1])
    if mask is not None:
        mask = mask.reshape(-1)
        x = jnp.where(mask[:, None], x, 0)  # whatever a masked token holds reaches neither value nor gradient

    with jax.named_scope("moriep.route"):
        chosen = routing.route(x, params, cfg) if route is None else jax.tree.map(_as_rows, route)
        if mask is not None:
            chosen = dataclasses.replace(chosen, ids=jnp.where(mask[:, None], chosen.ids, -1))
    counts, sums = stats.counted(chosen, mask, cfg)

    # Each tensor-parallel rank dispatches for itself: typed as varying here, the gradients of the tp ranks
    # are added on [T, H] instead of on [C, H].
    x_here, ids, weights = (layout.vary_over_tp(a) for a in (x, chosen.ids, chosen.weights))
    params = _for_tp(params, layout, cfg.expert_quant == "fp8_block")
    words = stats.as_words(counts, sums)
    y, all_words, token = fused.run(link, cfg, fused.Tokens(x_here, ids, weights, words, params, token))
    measured = stats.collected(all_words, sums, cfg, link.shape, layout.ep_axis, layout.token_axes)
    if cfg.shared_intermediate_size is not None:
        with jax.named_scope("moriep.shared"):
            y = y + experts.shared_mlp(x_here, params, cfg)
    if layout.tp_axis is not None:
        y = lax.psum(y.astype(jnp.float32), layout.tp_axis).astype(y.dtype)
    if mask is not None:
        y = jnp.where(mask[:, None], y, 0)
    return y.reshape(*lead, y.shape[-1]), measured, token


def _as_rows(array: jax.Array) -> jax.Array:
    """A part of a route that the caller gave, [.., K], as ``jm.route`` makes it of tokens in rows."""
    integer = jnp.issubdtype(array.dtype, jnp.integer)
    return array.reshape(-1, array.shape[-1]).astype(jnp.int32 if integer else jnp.float32)


def _for_tp(params: MoEParams, layout: Layout, by_block: bool) -> MoEParams:
    """This tensor-parallel rank's slice of the experts: I / tp gates, their ups, their columns of w2."""
    axis = layout.tp_axis
    if axis is None:
        return params
    size, index = layout.mesh_shape[axis], lax.axis_index(axis)

    def rows_for_hidden(w: jax.Array) -> jax.Array:
        """[.., 2*I, H/tp] -> [.., 2*I/tp, H]: trades the split of H for one that keeps gate by up."""
        inner = w.shape[-2] // 2
        halves = w.reshape(*w.shape[:-2], 2, inner, w.shape[-1])
        halves = lax.all_to_all(halves, axis, halves.ndim - 2, halves.ndim - 1, tiled=True)
        return halves.reshape(*w.shape[:-2], 2 * (inner // size), w.shape[-1] * size)

    def slice_b1(b1: jax.Array) -> jax.Array:
        inner = b1.shape[-1] // 2
        halves = b1.reshape(*b1.shape[:-1], 2, inner)
        part = lax.dynamic_slice_in_dim(halves, index * (inner // size), inner // size, -1)
        return part.reshape(*b1.shape[:-1], 2 * (inner // size))

    def once(b2: jax.Array) -> jax.Array:
        return jnp.where(index == 0, b2, 0)  # the ranks' outputs are added, a bias must be in one of them

    def apply(fn: Any, value: Any) -> Any:
        return None if value is None else fn(value)

    return dataclasses.replace(
        params,
        w1=rows_for_hidden(params.w1),
        b1=apply(slice_b1, params.b1),
        b2=apply(once, params.b2),
        w1_scale=apply(rows_for_hidden if by_block else slice_b1, params.w1_scale),
        shared_w1=apply(rows_for_hidden, params.shared_w1),
    )


def _resolve_mesh(mesh: Any) -> Mesh | AbstractMesh:
    context = jax.sharding.get_abstract_mesh()
    if not context.empty and AxisType.Manual in context.axis_types:
        raise ShardingError(
            f"ep_moe opens a shard_map of its own and cannot run inside one (manual axes: "
            f"{context.manual_axes}); there, call jm.route, jm.dispatch, jm.expert_mlp and jm.combine"
        )
    if mesh is not None:
        if not isinstance(mesh, (Mesh, AbstractMesh)):
            raise ShardingError(
                rule("mesh", mesh, "be a jax.sharding.Mesh or AbstractMesh", "make one with jax.make_mesh")
            )
        return mesh
    found = compat.concrete_mesh()
    if found is not None:
        return found
    if not context.empty:
        return context
    raise ShardingError(
        "mesh=None must find a mesh in context; pass mesh=, or call ep_moe under jax.set_mesh(mesh)"
    )


def _check_operands(
    x: jax.Array,
    params: MoEParams,
    cfg: MoEConfig,
    layout: Layout,
    token_mask: jax.Array | None,
    route: routing.Route | None,
) -> None:
    if not isinstance(cfg, MoEConfig):
        raise ConfigError(rule("cfg", type(cfg).__name__, "be a jm.MoEConfig", "make one"))
    for name, array in (("x", x), ("token_mask", token_mask)):
        if array is not None and not (hasattr(array, "dtype") and hasattr(array, "shape")):
            cure = "call ep_moe(x, params, cfg)" if isinstance(array, MoEParams) else "wrap it in jnp.asarray"
            raise ConfigError(rule(name, type(array).__name__, "be an array", cure))
    if x.ndim < 1 or x.shape[-1] != cfg.hidden_size:
        raise ConfigError(
            rule("x.shape", x.shape, f"end in hidden_size={cfg.hidden_size}", "pass x as [..., H]")
        )
    if str(x.dtype) not in ("float32", "bfloat16", "float16"):
        raise ConfigError(rule("x.dtype", str(x.dtype), "be float32, bfloat16 or float16", "cast x"))
    if token_mask is not None and (token_mask.shape != x.shape[:-1] or token_mask.dtype != jnp.bool_):
        raise ConfigError(
            rule(
                "token_mask",
                f"{token_mask.dtype}{list(token_mask.shape)}",
                f"be bool{list(x.shape[:-1])}, x's shape without H",
                "compare or reshape it",
            )
        )
    parameters.check_params(params, cfg, layout.num_ranks)
    if layout.tp_axis is not None:
        _check_split(params, cfg, layout.tp_axis, layout.mesh_shape[layout.tp_axis])
    if route is not None:
        routing.check_route(route, x.shape[:-1], cfg)


def _check_split(params: MoEParams, cfg: MoEConfig, tp_axis: str, size: int) -> None:
    """Raises ShardingError unless the experts can be split over the devices of a tensor-parallel axis."""
    if params.layout != "plain":
        cure = "prepare the weights for experts='triton' or 'blocked', or drop tp_axis"
        raise ShardingError(
            rule("params.layout", params.layout, f"be 'plain' with tp_axis={tp_axis!r}", cure)
        )
    by_block = params.w1_scale is not None and cfg.expert_quant == "fp8_block"
    unit = size * schemes.BLOCK if by_block else size
    for name in ("hidden_size", "intermediate_size", "shared_intermediate_size"):
        value = getattr(cfg, name)
        whole = size if name.startswith("shared") else unit
        if value is not None and value % whole:
            blocks = "" if whole == size else f" times {schemes.BLOCK}, the side of a block of weights,"
            must = f"be divisible by the {size} devices of tp_axis={tp_axis!r}{blocks}"
            raise ShardingError(rule(name, value, must.rstrip(","), "change one"))


def _padded_explicit(params: MoEParams, cfg: MoEConfig, layout: Layout, mesh: Any) -> MoEParams:
    """On an Explicit mesh: pads replicated experts and reshards them; checks all other shardings."""
    specs = parameters.param_specs(cfg, layout.ep_axis, layout.tp_axis, params=params)
    padded = parameters.pad_params(params, layout.num_ranks)
    done: dict[str, Any] = {"layout": params.layout}
    for name in WEIGHT_NAMES:
        spec, value = getattr(specs, name), getattr(padded, name)
        if value is None:
            done[name] = None
        elif value is not getattr(params, name):
            done[name] = jax.sharding.reshard(value, NamedSharding(mesh, spec))
        else:
            got = jax.typeof(value).sharding.spec
            if _trim(got, layout) != _trim(spec, layout):
                raise ShardingError(
                    rule(
                        f"params.{name}.sharding",
                        got,
                        f"be {spec}",
                        "place the weights with jax.device_put or jax.sharding.reshard by jm.param_specs",
                    )
                )
            # Free: they differ by axes of one device at most.
            done[name] = jax.sharding.reshard(value, NamedSharding(mesh, spec))
    return MoEParams(**done)


def _trim(spec: PartitionSpec, layout: Layout) -> tuple[Any, ...]:
    """A spec without what says nothing: axes of one device, and trailing Nones."""
    parts: list[Any] = []
    for part in spec:
        split = tuple(axis for axis in axes_of(PartitionSpec(part)) if layout.mesh_shape[axis] > 1)
        parts.append(split or None)
    while parts and parts[-1] is None:
        parts.pop()
    return tuple(parts)


def _pad_tokens(
    x: jax.Array, token_mask: jax.Array | None, route: routing.Route | None, num_shards: int
) -> tuple[jax.Array, jax.Array, routing.Route | None]:
    """Flattens x to [N, H] and pads N to a multiple of the shards; the added tokens are masked."""
    count = math.prod(x.shape[:-1])
    added = -count % num_shards
    mask = jnp.ones(count, jnp.bool_) if token_mask is None else token_mask.reshape(-1)

    def padded(array: jax.Array) -> jax.Array:
        return jnp.pad(array.reshape(count, array.shape[-1]), ((0, added), (0, 0)))

    return padded(x), jnp.pad(mask, (0, added)), jax.tree.map(padded, route)


def _order_in(mesh: Any, params: MoEParams, layout: Layout) -> jax.Array:
    """The order token of the call before this one in the same trace, or a first one; one value per device."""
    token = order.last(layout.chain_key(mesh))
    if token is not None:
        return token
    size = math.prod(layout.mesh_shape[axis] for axis in layout.order_axes)
    first = jnp.broadcast_to(order.start(params.router), (size,))
    return jax.sharding.reshard(first, NamedSharding(mesh, layout.order_spec)) if layout.explicit else first
