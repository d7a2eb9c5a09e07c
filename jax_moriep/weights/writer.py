"""to_hf: MoEParams of one layer, to its MoE block as Hugging Face names it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jax_moriep.config import PER_EXPERT, WEIGHT_NAMES, MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.params import check_params
from jax_moriep.schemes import FORMATS, is_codes
from jax_moriep.weights import codes
from jax_moriep.weights.families import DISK, FAMILIES, SPELLINGS, check_config, family_of


def to_hf(
    params: MoEParams, family: str, cfg: MoEConfig, *, spelling: str = DISK, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Gives one layer's weights the names and layouts of a Hugging Face model; the way back of ``from_hf``.

    Args:
      params: one layer's, plain, on the host or on devices of this process; padded experts are left out. One
        layer of stacked ones is ``jax.tree.map(lambda w: w[i], params)``.
      family: a name of the table at ``from_hf``.
      cfg: the layer.
      spelling: "disk", as checkpoints have it (mostly a tensor for each expert), or "memory", as the modules
        of transformers have it (one for all). They differ for all families but gpt_oss and llama4.
      prefix: what to put before every name, such as "model.layers.3.mlp.", with its final dot.

    Returns:
      Contiguous NumPy arrays by their names, in the dtypes that they have. Codes and scales are named as
      checkpoints have them: ``weight_scale_inv`` with "fp8_block", ``weight_scale`` with the other schemes.

    Raises:
      ConfigError: the family is unknown or contradicts cfg, the prefix has no final dot, the weights do not
        fit cfg, are laid out for kernels or are traced by ``jax.jit``, or they are codes in a form that the
        family's checkpoints do not have.
      ShardingError: some of the weights are in other processes.

    Example:
      >>> tensors = jm.weights.to_hf(params, "qwen3_moe", cfg, prefix="model.layers.3.mlp.")
      >>> safetensors.numpy.save_file(tensors, "layer3.safetensors")
    """
    layout = family_of(family)
    check_type("params", params, MoEParams, "make it with jm.init_params")
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    check_config(family, cfg)
    if spelling not in SPELLINGS:
        raise ConfigError(rule("spelling", spelling, f"be one of {SPELLINGS}", "pick one"))
    if not isinstance(prefix, str) or prefix and not prefix.endswith("."):
        must = "be empty or end with '.', which names of tensors have behind a module's"
        raise ConfigError(rule("prefix", prefix, must, f"pass {str(prefix) + '.'!r}"))
    for name in WEIGHT_NAMES:
        codes.check_has_values(f"params.{name}", getattr(params, name))
    if params.layout != "plain":
        cure = "pass the weights from before jm.prepare_params"
        raise ConfigError(rule("params.layout", params.layout, "be 'plain'", cure))
    if getattr(params.w1, "ndim", 3) == 4:
        cure = "pass jax.tree.map(lambda w: w[i], params) for each layer i"
        raise ConfigError(rule("params.w1.shape", tuple(params.w1.shape), "be one layer's", cure))
    count = next(iter(getattr(params.w1, "shape", ())), 0)
    check_params(params, cfg, count if count > cfg.num_experts else 1)
    _check_family(params, family)
    if is_codes(params.w1.dtype):
        _check_codes(params, family, spelling)
    on_host = {name: _on_host(name, getattr(params, name), cfg.num_experts) for name in WEIGHT_NAMES}
    written = layout.written(dataclasses.replace(params, **on_host), cfg, spelling)
    return {prefix + name: value for name, value in written.items()}


def _check_family(params: MoEParams, family: str) -> None:
    """Refuses weights for which the family has no name."""
    layout = FAMILIES[family]
    places = {
        "router_bias": layout.router_bias is not None,
        "score_bias": bool(layout.score_bias),
        "b1": layout.router_bias is not None,
        "shared_w1": layout.shared is not None,
        "shared_gate": layout.shared_gate is not None,
    }
    for name, has_place in places.items():
        there = getattr(params, name) is not None
        if there and not has_place:
            cure = "pick the model's family, or drop that weight from config and params"
            raise ConfigError(rule(f"params.{name}", "an array", f"be None for family={family!r}", cure))
        if not there and has_place and name in ("router_bias", "b1"):
            raise ConfigError(
                rule(f"params.{name}", None, f"be an array for family={family!r}", "make it, zeros will do")
            )


def _check_codes(params: MoEParams, family: str, spelling: str) -> None:
    """Refuses codes for which checkpoints of the family have no form."""
    dtype = params.w1.dtype
    if spelling != DISK or not FAMILIES[family].experts.quantised:
        must = f"be floating for family={family!r} and spelling={spelling!r}"
        cure = "dequantise the experts; codes have names on disk only, and with a tensor for each expert"
        raise ConfigError(rule("params.w1.dtype", str(dtype), must, cure))
    if dtype == FORMATS["e4m3fnuz"]:
        must = "be float8_e4m3fn, which is the float8 of checkpoints"
        cure = "pass what jm.quantize_params(params, cfg, 'e4m3fn') gives"
        raise ConfigError(rule("params.w1.dtype", str(dtype), must, cure))


def _on_host(name: str, value: Any, num_experts: int) -> np.ndarray | None:
    if value is None:
        return None
    if not getattr(value, "is_fully_addressable", True) and not value.is_fully_replicated:
        cure = "gather it first: jax.experimental.multihost_utils.process_allgather(params, tiled=True)"
        raise ShardingError(rule(f"params.{name}.sharding", value.sharding, "be of this process", cure))
    whole = np.asarray(value)
    return whole[:num_experts] if name in PER_EXPERT else whole
