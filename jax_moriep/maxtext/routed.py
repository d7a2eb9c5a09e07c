"""What stands in the place of ``RoutedMoE.sparse_matmul``: MaxText's routes and losses, our experts."""

from __future__ import annotations

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_moriep.config import MoEParams, MoEStats
from jax_moriep.layer import ep_moe
from jax_moriep.layout import axes_of
from jax_moriep.maxtext import options
from jax_moriep.routing import Route


def sparse_matmul(
    moe: Any,
    layer_options: dict[str, Any],
    layer: Any,
    inputs: jax.Array,
    gate_logits: jax.Array,
    pre_bias_logits: jax.Array | None,
    w0_kernel: jax.Array,
    w1_kernel: jax.Array,
    wo_kernel: jax.Array,
    w0_bias: jax.Array | None,
    w1_bias: jax.Array | None,
    wo_bias: jax.Array | None,
    input_ids: jax.Array | None = None,
    forced_routed_experts: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Computes one layer's routed experts.

    Args:
      moe: the module ``maxtext.layers.moe``.
      layer_options: of ``install``.
      layer: MaxText's ``RoutedMoE``.
      inputs: [B, S, H].
      gate_logits: [B, S, E], with the score function and the bias where the model has them.
      pre_bias_logits: [B, S, E], without the bias, of the models that choose by it.
      w0_kernel: [E, H, I], of the gate.
      w1_kernel: [E, H, I], of what it multiplies.
      wo_kernel: [E, I, H].
      w0_bias: [E, I], or None.
      w1_bias: [E, I], or None.
      wo_bias: [E, H], or None.
      input_ids: [B, S], for routing by a table.
      forced_routed_experts: i32[B, S, K], routes to replay; ids outside of 0..E-1 are no route.

    Returns:
      As MaxText's: the output [B, S, H], the load-balance loss, and what the routing bias is to change by.

    Raises:
      ConfigError: the layer's config asks for what ``ep_moe`` cannot do.
    """
    options.check(layer)
    token_axes, tp_axis = _axes(layer)
    weights, ids = _routes(layer, token_axes, gate_logits, pre_bias_logits, input_ids, forced_routed_experts)
    logits = gate_logits.astype(jnp.float32)
    cfg = options.layer_config(layer, inputs.shape[-1], wo_kernel.shape[1], ids.shape[-1], layer_options)
    output, stats = ep_moe(
        inputs,
        _params(layer, (w0_kernel, w1_kernel, wo_kernel), (w0_bias, w1_bias, wo_bias)),
        cfg,
        mesh=layer.mesh,
        ep_axis=options.EP_AXIS,
        token_axes=token_axes,
        tp_axis=tp_axis,
        route=Route(ids=ids, weights=weights, scores=jax.nn.softmax(logits), logits=logits),
    )
    _sow_overflow(layer, stats)
    scores = gate_logits if pre_bias_logits is None else pre_bias_logits
    return output, _balance_loss(moe, layer, ids, scores), _bias_updates(moe, layer, stats)


def _routes(layer: Any, token_axes: PartitionSpec, *operands: jax.Array | None) -> tuple[Any, Any]:
    """MaxText's weights and ids [B, S, K] of logits, scores without the bias, input ids and replayed routes.

    Each device routes its own tokens: XLA gathers the logits of all to every device for ``top_k`` otherwise.
    Where the devices do not divide the tokens it may, and where MaxText draws the routes.
    """

    def local(operands: Any) -> tuple[jax.Array, jax.Array]:
        logits, scores, input_ids, forced = operands
        weights, ids = layer.get_topk(logits, scores, layer.rngs, input_ids, forced)
        if options.is_llama4(layer.config):
            weights = jax.nn.sigmoid(weights.astype(jnp.float32))
        return weights, ids

    sizes = [math.prod(layer.mesh.shape[a] for a in axes_of(PartitionSpec(part))) for part in token_axes]
    lead = cast(jax.Array, operands[0]).shape
    if layer.config.use_random_routing or any(n % size for n, size in zip(lead, sizes, strict=False)):
        return local(operands)
    return jax.shard_map(local, mesh=layer.mesh, in_specs=(token_axes,), out_specs=token_axes)(operands)


def _params(layer: Any, kernels: tuple[Any, ...], biases: tuple[Any, ...]) -> MoEParams:
    """MaxText's weights as MoEParams, in the dtype of the activations.

    MaxText casts its master weights in every step as well; XLA fuses that cast with the change of layout. The
    gate's kernel only lends its numbers to the order.
    """
    w0, w1, wo = (jnp.swapaxes(kernel, 1, 2).astype(layer.dtype) for kernel in kernels)
    b0, b1, bo = biases
    return MoEParams(
        router=layer.gate.kernel[...],
        w1=_sharded(layer, jnp.concatenate([w0, w1], axis=1), layer.wi_kernel_axes),
        w2=wo,
        b1=None if b0 is None else jnp.concatenate([b0, b1], axis=1),
        b2=bo,
    )


def _sharded(layer: Any, weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Holds [E, .., ..] of the up weights as MaxText's [E, H, I] is split, so that what fsdp gathers is cast.

    Where I is split as well, by tensor parallelism, two halves side by side cannot be; XLA is left to choose.
    """
    experts, hidden, inner = (*layer._logical_to_mesh_axes(axes), None, None, None)[:3]
    if inner is not None:
        return weight
    return layer._maybe_shard_with_pspec(weight, PartitionSpec(experts, None, hidden))


def _axes(layer: Any) -> tuple[PartitionSpec, str | None]:
    """How [B, S] is split over the mesh, and the axis of tensor parallelism, if there is one."""
    spec = layer._logical_to_mesh_axes(("activation_batch", "activation_norm_length"))
    split = [axes_of(PartitionSpec(part)) for part in (*spec, None, None)[:2]]
    if options.EP_AXIS not in split[0] + split[1]:
        split[0] += (options.EP_AXIS,)  # an axis of one device, or one that no rule gives the tokens
    parallel = layer.mesh.shape.get(options.TP_AXIS, 1) > 1 and options.TP_AXIS not in split[0] + split[1]
    return PartitionSpec(*(part or None for part in split)), options.TP_AXIS if parallel else None


def _balance_loss(moe: Any, layer: Any, ids: jax.Array, scores: jax.Array) -> jax.Array | None:
    """MaxText's own loss, on all tokens of the mesh, from the scores without the bias."""
    if layer.config.load_balance_loss_weight <= 0 or layer.is_hash_routing:
        return None
    if moe.uses_megatron_seq_aux_loss(layer.config):
        return layer.megatron_seq_aux_loss(scores)
    shares = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(layer.dtype)
    return layer.load_balance_loss(ids, shares)


def _bias_updates(moe: Any, layer: Any, stats: MoEStats) -> jax.Array | None:
    """What the routing bias changes by, or under gradient accumulation the counts that say so in the end."""
    config = layer.config
    if not layer.should_update_load_balance():
        return None
    if config.gradient_accumulation_steps > 1:
        return stats.expert_counts
    return moe.load_balance_updates_from_counts(
        stats.expert_counts, layer.num_experts, config.routed_bias_update_rate
    )


def _sow_overflow(layer: Any, stats: MoEStats) -> None:
    """Leaves, where ``moe_dropless_fallback`` looks for it, whether any route was dropped."""
    from flax import nnx

    layer.sow(nnx.Intermediate, "moe_has_overflow", stats.overflow)
