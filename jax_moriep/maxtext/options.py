"""Which of MaxText's options ``ep_moe`` can serve, and the layer that they describe.

Options that only say how MaxText's own kernels compute the same numbers (``megablox``, ``use_tokamax_gmm``,
tiles, ``use_ring_of_experts``, ``use_ragged_sort``) have nothing to say any more and are let through. What
would change a number, a statistic or who computes the layer is refused.
"""

from __future__ import annotations

from typing import Any

from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, rule

EP_AXIS = "expert"
TP_AXIS = "tensor"

_UNINSTALL = "or call jax_moriep.maxtext.uninstall()"

# Option, the values that are served, and what to do instead.
_SERVED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("quantization", ("", None), "leave it out; for quantised experts pass expert_quant= to install()"),
    ("te_moe_block", (False,), "switch TransformerEngine's block off"),
    ("use_batch_split_schedule", (False,), "switch it off; that schedule computes the experts by itself"),
    ("shard_mode", ("auto",), "use Auto meshes"),
    ("moe_dropless_fallback", (None, "step"), 'use "step", or drop no token: ragged_buffer_factor=-1'),
    ("num_moe_token_chunks", (1,), "route all tokens at once"),
    ("moe_quantize_token_all_gather", (False,), 'switch it off; install(wire_dtype="fp8") sends float8'),
    ("moe_quantize_combine_bwd_method", ("", None), "leave it empty"),
    ("defer_small_all_reduces", (False,), "switch it off"),
    ("moe_log_max_load_ratio", (False,), "switch it off"),
    ("log_required_ragged_buffer_factor", (False,), "switch it off"),
)
_SERVING = ("vllm_rpa", "vllm_batched_rpa")


def check(layer: Any) -> None:
    """Raises ConfigError, naming MaxText's option, if ``ep_moe`` cannot stand in for a ``RoutedMoE``."""
    config = layer.config
    if not config.sparse_matmul:
        return  # MaxText's dense products, which nobody replaced
    for name, served, cure in _SERVED:
        value = _plain(getattr(config, name, served[0]))
        if value not in served:
            must = "be " + " or ".join(map(repr, served)) + " for ep_moe"
            raise ConfigError(rule(name, value, must, f"{cure}, {_UNINSTALL}"))
    if config.attention in _SERVING:
        must = "not be one of vLLM's for ep_moe, which have a fused layer of their own"
        raise ConfigError(rule("attention", config.attention, must, _UNINSTALL.removeprefix("or ")))
    if layer.quant is not None or layer.wi_0_sparsity_module is not None:
        what = "sparse" if layer.quant is None else "quantised"
        raise ConfigError(f"the experts' weights must not be {what} by MaxText; drop that, {_UNINSTALL}")
    for axis, option in (("stage", "ici_pipeline_parallelism"), ("diloco", "ici_diloco_parallelism")):
        size = layer.mesh.shape.get(axis, 1)
        if size > 1:
            must = "be 1 for ep_moe, whose exchanges jax.vmap cannot batch"
            cure = "spread the layers over other axes"
            raise ConfigError(rule(f"{option} (the mesh axis {axis!r})", size, must, f"{cure}, {_UNINSTALL}"))
    name = layer._expert_parallelism_name
    if name != EP_AXIS or EP_AXIS not in layer.mesh.axis_names:
        got = config.custom_mesh_and_rule or tuple(layer.mesh.axis_names)
        must = f"leave the experts to one mesh axis, {EP_AXIS!r}"
        raise ConfigError(rule("custom_mesh_and_rule", _plain(got), must, f"use another, {_UNINSTALL}"))
    _activation(config)


def layer_config(layer: Any, hidden: int, inner: int, top_k: int, layer_options: dict[str, Any]) -> MoEConfig:
    """The layer as jax_moriep names it.

    Args:
      layer: MaxText's ``RoutedMoE``.
      hidden: H.
      inner: I, which MaxText may have padded.
      top_k: K; replayed routes may have another number than the config.
      layer_options: of ``install``.
    """
    config = layer.config
    factor = -1.0 if getattr(layer, "force_dropless", False) else layer.get_ragged_buffer_factor()
    return MoEConfig(
        num_experts=layer.num_experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=inner,
        # The routes come from MaxText; this says only where their weights are applied.
        router="llama4" if is_llama4(config) else "softmax_topk",
        expert_bias=bool(config.mlp_bias),
        capacity_factor=float(factor) if factor > 0 else None,
        **_activation(config),
        **layer_options,
    )


def is_llama4(config: Any) -> bool:
    """Whether the weights multiply the experts' inputs, by their sigmoid."""
    return _plain(config.decoder_block) == "llama4"


def _activation(config: Any) -> dict[str, Any]:
    """The experts' activation as fields of MoEConfig."""
    block, limit = _plain(config.decoder_block), config.mlp_activations_limit
    name = config.mlp_activations[0]
    if block == "gpt_oss":
        if name == "sigmoid":
            return {"activation": "swiglu_clamped", "activation_limit": limit, "activation_alpha": 1.702}
        wanted = "sigmoid"
    else:
        if block in ("deepseek", "deepseek4") and limit > 0:
            must = "be -1 for ep_moe, which has no such clamp of DeepSeek's experts"
            raise ConfigError(rule("mlp_activations_limit", limit, must, f"set it to -1, {_UNINSTALL}"))
        if name in ("silu", "swish"):
            return {"activation": "silu"}
        wanted = "silu"
    must = f"be {wanted!r} for ep_moe with decoder_block={block!r}"
    raise ConfigError(rule("mlp_activations[0]", name, must, f"change it, {_UNINSTALL}"))


def _plain(value: Any) -> Any:
    """The value of an option that MaxText may hold as an enum."""
    return getattr(value, "value", value)
