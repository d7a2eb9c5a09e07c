"""ep_moe: the whole expert-parallel layer in one call. The line that a token takes:

route (routing.py) -> dispatch (exchange.py, transports/) -> expert_mlp (experts/) -> combine -> y,

and beside it the statistics (stats.py). ``fused.run`` is all between route and y, as three calls or as one.
How tokens and weights lie on the mesh is said in layout.py and params.py.
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
from jax.sharding import PartitionSpec

from jax_moriep import exchange, experts, fused, operands, routing, stats
from jax_moriep import params as parameters
from jax_moriep.config import MoEConfig, MoEParams, MoEStats, check_type
from jax_moriep.experts.stacks import stack_specs
from jax_moriep.layout import Layout
from jax_moriep.plan import Link
from jax_moriep.runtime import compat
from jax_moriep.runtime import mesh as meshes
from jax_moriep.runtime.derivatives import reverse_only
from jax_moriep.runtime.order import chained
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
    layer: int | jax.Array | None = None,
    stack: MoEParams | None = None,
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
      layer: which layer of stacked weights it is, whose arrays have a dimension for the layers in front:
        ``params`` of all layers, or ``stack``. The experts' kernels read it where it lies, where XLA would
        copy what ``lax.scan`` gives its body. An int must be in range; a traced one is clamped.
      stack: the weights of all layers, where ``params`` are those of this one, as a scan over the stack gives
        them. Their experts' values are then read in the stack at ``layer``, and gradients are those of
        ``params``, which a scan writes into one stack; with ``layer`` alone JAX adds up gradients of whole
        stacks, layer by layer::

          def body(x, of_layer):
              params, i = of_layer
              y, stats = jm.ep_moe(x, params, cfg, stack=stack, layer=i)
              return x + y, stats

          x, stats = jax.lax.scan(body, x, (stack, jnp.arange(num_layers)))

    Returns:
      y like x, and the statistics of the call.

    Raises:
      ConfigError: a shape or dtype breaks a rule.
      ShardingError: mesh, axes or shardings do not fit.
      TransportError: the transport cannot run here.
    """
    mesh = meshes.resolve(mesh)
    layout = Layout.of(mesh, ep_axis, token_axes, tp_axis)
    params, read = experts.of_layer(params, layer, stack)
    _check(x, params, cfg, layout, token_mask, route)
    x, params, token_mask, route = reverse_only((x, params, token_mask, route), "ep_moe")
    x, params, token_mask, route, read = unbatched((x, params, token_mask, route, read), _VMAP_CURE)

    lead = x.shape[:-1]
    x, *beside, x_spec = layout.place_tokens(mesh, x, token_mask, route)
    read = parameters.placed_stack(read, params, cfg, layout, mesh)
    params = parameters.placed(params, cfg, layout, mesh)
    specs = parameters.param_specs(cfg, ep_axis, tp_axis, params=params)
    of_stack = None if read is None else stack_specs(specs)
    num_tokens = math.prod(x.shape[:-1]) // layout.num_shards
    link = exchange.make_link(cfg, mesh, num_tokens, x.dtype, ep_axis)

    mapped = _mapped(mesh, cfg, link, layout, x_spec, specs, of_stack)
    with chained(layout.chain_key(mesh), lambda: layout.first_order(mesh, params.router)) as chain:
        given = (x, params, chain.order, tuple(beside), read)
        if not any(map(compat.is_tracer, jax.tree.leaves(given))):
            mapped = _compiled(mapped)
        y, measured, chain.order = mapped(*given)
    return layout.as_given(y, lead), measured


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
    of_stack: experts.Stack | None,
) -> Callable[..., tuple[jax.Array, MoEStats, jax.Array]]:
    """The layer over the mesh: fn(x, params, order, (mask or None, route or None), stack or None)."""

    def body(
        x: jax.Array, params: MoEParams, order: jax.Array, beside: Any, stack: experts.Stack | None
    ) -> tuple[jax.Array, MoEStats, jax.Array]:
        return _local_moe(x, (params, stack), cfg, link, layout, order, *beside)

    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(x_spec, param_specs, layout.order_spec, x_spec, of_stack),
        out_specs=(x_spec, PartitionSpec(), layout.order_spec),
    )


@functools.lru_cache(maxsize=256)
def _compiled(mapped: Callable[..., Any]) -> Callable[..., Any]:
    """For calls outside jit, where each operation of the layer would be compiled and run alone."""
    return jax.jit(mapped)


def _local_moe(
    x: jax.Array,
    weights: tuple[MoEParams, experts.Stack | None],
    cfg: MoEConfig,
    link: Link,
    layout: Layout,
    order: jax.Array,
    mask: jax.Array | None,
    route: routing.Route | None,
) -> tuple[jax.Array, MoEStats, jax.Array]:
    """The layer on one device, inside shard_map."""
    lead, (params, stack) = x.shape[:-1], weights
    x = x.reshape(-1, x.shape[-1])
    if mask is not None:
        mask = mask.reshape(-1)
        x = jnp.where(mask[:, None], x, 0)  # whatever a masked token holds reaches neither value nor gradient

    with jax.named_scope("moriep.route"):
        chosen = routing.choose(x, params, cfg) if route is None else routing.in_rows(route)
        if mask is not None:
            chosen = dataclasses.replace(chosen, ids=jnp.where(mask[:, None], chosen.ids, -1))
    counts, sums = stats.counted(chosen, mask, cfg)

    # Each tensor-parallel rank dispatches for itself: typed as varying here, the gradients of the tp ranks
    # are added on [T, H] instead of on [C, H].
    x_here, ids, route_weights = (layout.vary_over_tp(a) for a in (x, chosen.ids, chosen.weights))
    params = parameters.tp_part(params, cfg, layout)
    words = stats.as_words(counts, sums)
    y, all_words, order = fused.run(
        link, cfg, fused.Tokens(x_here, ids, route_weights, words, params, order, stack)
    )
    measured = stats.collected(all_words, sums, cfg, link.shape, layout.ep_axis, layout.token_axes)
    if cfg.shared_intermediate_size is not None:
        with jax.named_scope("moriep.shared"):
            y = y + experts.shared_mlp(x_here, params, cfg)
    if layout.tp_axis is not None:
        y = lax.psum(y.astype(jnp.float32), layout.tp_axis).astype(y.dtype)
    if mask is not None:
        y = jnp.where(mask[:, None], y, 0)
    return y.reshape(*lead, y.shape[-1]), measured, order


def _check(
    x: jax.Array,
    params: MoEParams,
    cfg: MoEConfig,
    layout: Layout,
    token_mask: jax.Array | None,
    route: routing.Route | None,
) -> None:
    """All that the layer is given, once: what it calls takes the operands as they are."""
    check_type("cfg", cfg, MoEConfig, "make one")
    operands.check_tokens(x, cfg)
    if token_mask is not None:
        operands.check_mask(token_mask, x)
    parameters.check_params(params, cfg, layout.num_ranks)
    if layout.tp_axis is not None:
        parameters.check_split(params, cfg, layout.tp_axis, layout.mesh_shape[layout.tp_axis])
    if route is not None:
        routing.check_route(route, x.shape[:-1], cfg)
