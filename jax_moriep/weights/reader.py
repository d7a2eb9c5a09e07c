"""from_hf: one layer's MoE block of a state dict, to MoEParams."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jax_moriep.config import MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, rule
from jax_moriep.weights.block import Block
from jax_moriep.weights.families import FAMILIES, check_config, family_of


def from_hf(
    state_dict: Mapping[str, Any], family: str, cfg: MoEConfig, *, dequantize: bool = False
) -> MoEParams:
    """Converts one layer's MoE block of a Hugging Face model.

    ================================  =====================================================================
    family                            block
    ================================  =====================================================================
    mixtral                           ``gate``, ``experts`` (per expert: w1, w3, w2)
    minimax_m2                        as mixtral, with ``e_score_correction_bias``
    qwen3_moe, olmoe                  ``gate``, ``experts`` (per expert: gate_proj, up_proj, down_proj)
    qwen2_moe                         as qwen3_moe, with ``shared_expert`` and ``shared_expert_gate``
    deepseek_v2                       as qwen3_moe, with ``shared_experts``
    deepseek_v3 (GLM-4 MoE, dots1)    as deepseek_v2, with ``gate.e_score_correction_bias``
    ernie45                           as deepseek_v2, with ``moe_statics.e_score_correction_bias``
    granite                           ``router``, ``experts`` (on disk: ``router.layer``, ``input_linear``,
                                      ``output_linear``)
    gpt_oss                           ``router`` and ``experts``, both with biases; gate and up interleaved
    llama4                            ``router``, ``experts`` (transposed), ``shared_expert``
    ================================  =====================================================================

    The config must be one of the family: its router (a callable is taken as it is), its kind of activation,
    and ``norm_topk`` and ``routed_scaling`` where the family's code fixes them. What a model's own
    ``config.json`` decides cannot be seen here: ``top_k``, the groups, silu or gelu, and elsewhere
    ``norm_topk`` and ``routed_scaling``. Nor can a fused gate_up that somebody has transposed where 2*I == H.

    Experts that are stored as float8 or int8 codes with scales beside them stay so, in the scheme that
    ``cfg.expert_quant`` must name: "fp8_block" for scales of 128 x 128 blocks (``weight_scale_inv`` of
    DeepSeek-V3, Qwen3 and MiniMax-M2), "fp8_token" or "int8_token" for those of rows or of whole matrices
    (``weight_scale`` of GLM-4.5 and others, by compressed-tensors). Floating experts with an
    ``expert_quant`` are master weights. Whatever else is stored as codes becomes bfloat16: shared experts,
    and gpt-oss's MXFP4. Fixed scales for the experts' inputs are not used: rows are quantised by what they
    hold.

    Args:
      state_dict: NumPy arrays or torch tensors by their name below the block, for example "gate.weight".
      family: a name of the table.
      cfg: the layer; says which shapes, biases and shared expert must be there.
      dequantize: give experts that are stored in float8 or int8 in bfloat16.

    Returns:
      MoEParams of NumPy arrays in the dtype that they had (score_bias, scales: f32); some may share memory
      with the input. ``jax.device_put(params, shardings)`` then sends each device only its own shard.

    Raises:
      ConfigError: the family is unknown or contradicts cfg, or a tensor is missing, has another shape than
        cfg says, is quantised in another way, or is one that the family does not have. Where the names are
        those of a whole model, the text has the prefixes that would fit.

    Example:
      >>> prefix = "model.layers.3.mlp."
      >>> block = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
      >>> params = jm.weights.from_hf(block, "qwen3_moe", cfg)
    """
    layout = family_of(family)
    if not isinstance(state_dict, Mapping):
        raise ConfigError(
            rule("state_dict", type(state_dict).__name__, "be a mapping of names to arrays", "pass a dict")
        )
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    check_config(family, cfg)
    check_names(family, state_dict)
    block = Block(state_dict, family, cfg, dequantize)
    params = layout.read(block)
    block.check_all_read(params)
    return params


def check_names(family: str, state_dict: Mapping[str, Any]) -> None:
    """Refuses names that do not begin where the block does; says what there is and which prefix would fit."""
    routers, blocks = FAMILIES[family].router_names, FAMILIES[family].blocks
    names = sorted(map(str, state_dict))
    if {name.split(".")[0] for name in names} & {"experts", *(router.split(".")[0] for router in routers)}:
        return
    there = f"it has {names[:4]} ({len(names)} in all)" if names else "it is empty"
    prefixes = prefixes_of(names, routers)
    if prefixes:
        cure = f"pass the names below {' or '.join(map(repr, prefixes[:2]))} without that prefix"
        if len(prefixes) > 2:
            cure += f" ({len(prefixes)} blocks in all)"
    else:
        usual = " or ".join(repr(f"model.layers.<i>.{block}.") for block in blocks)
        cure = f"pass the names below one layer's MoE block, usually {usual}, without that prefix"
    wanted = " or ".join(map(repr, routers))
    raise ConfigError(f"state_dict lacks {wanted}, the router of family={family!r}: {there}; {cure}")


def prefixes_of(names: Iterable[str], routers: tuple[str, ...]) -> list[str]:
    """What stands before the router's name of each MoE block, in the order of the layers' numbers."""
    # An attention may have a gate, too; it has no experts.
    blocks = with_experts(names) & with_router(names, routers)
    return sorted(blocks, key=lambda p: [(len(part) if part.isdigit() else 0, part) for part in p.split(".")])


def with_router(names: Iterable[str], routers: tuple[str, ...]) -> set[str]:
    """What stands before a router's name."""
    return {name.removesuffix(router) for name in names for router in routers if name.endswith("." + router)}


def with_experts(names: Iterable[str]) -> set[str]:
    """What stands before the names of experts."""
    parts = ("experts.", "input_linear.")
    return {name[: name.find(part)] for name in names for part in parts if part in name}
