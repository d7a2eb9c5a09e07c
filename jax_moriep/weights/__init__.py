"""Weights of published models: one layer's MoE block as Hugging Face names it, to MoEParams.

``from_hf`` reads both spellings of transformers 5.24: that in memory (one tensor for all experts), and that
of checkpoints on disk (mostly one tensor per expert), also where the weights are quantised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_moriep.config import MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, rule
from jax_moriep.weights.block import Block


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
    if family not in FAMILIES:
        raise ConfigError(
            rule("family", family, f"be one of {tuple(FAMILIES)}", "pick the one of this layout")
        )
    if not isinstance(state_dict, Mapping):
        raise ConfigError(
            rule("state_dict", type(state_dict).__name__, "be a mapping of names to arrays", "pass a dict")
        )
    _check_config(family, cfg)
    _check_names(family, state_dict)
    block = Block(state_dict, family, cfg, dequantize)
    params = FAMILIES[family].read(block)
    block.check_all_read(params)
    return params


def _check_config(family: str, cfg: MoEConfig) -> None:
    """Refuses a config whose values no model of the family has, for its weights would load all the same."""
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    rules = FAMILIES[family]
    fixed: list[tuple[str, tuple[Any, ...]]] = [("activation", rules.activations)]
    if not callable(cfg.router):
        fixed.append(("router", rules.routers))
    if rules.norm_topk is not None:
        fixed.append(("norm_topk", (rules.norm_topk,)))
    if not rules.scaled:
        fixed.append(("routed_scaling", (1.0,)))
    for name, allowed in fixed:
        value = getattr(cfg, name)
        if value not in allowed:
            must = f"be {' or '.join(map(repr, allowed))} for family={family!r}"
            raise ConfigError(
                rule(name, value, must, "make the config that of the model, or pick its family")
            )


def _check_names(family: str, state_dict: Mapping[str, Any]) -> None:
    """Refuses names that do not begin where the block does; says what there is and which prefix would fit."""
    routers, blocks = FAMILIES[family].router_names, FAMILIES[family].blocks
    names = sorted(map(str, state_dict))
    if {name.split(".")[0] for name in names} & {"experts", *(router.split(".")[0] for router in routers)}:
        return
    there = f"it has {names[:4]} ({len(names)} in all)" if names else "it is empty"
    prefixes = _prefixes(names, routers)
    if prefixes:
        cure = f"pass the names below {' or '.join(map(repr, prefixes[:2]))} without that prefix"
        if len(prefixes) > 2:
            cure += f" ({len(prefixes)} blocks in all)"
    else:
        usual = " or ".join(repr(f"model.layers.<i>.{block}.") for block in blocks)
        cure = f"pass the names below one layer's MoE block, usually {usual}, without that prefix"
    wanted = " or ".join(map(repr, routers))
    raise ConfigError(f"state_dict lacks {wanted}, the router of family={family!r}: {there}; {cure}")


def _prefixes(names: list[str], routers: tuple[str, ...]) -> list[str]:
    """What stands before the router's name of each MoE block, in the order of the layers' numbers."""
    found = {name.removesuffix(router) for name in names for router in routers if name.endswith("." + router)}
    # An attention may have a gate, too; it has no experts.
    blocks = [p for p in found if any(n.startswith((f"{p}experts.", f"{p}input_linear.")) for n in names)]
    return sorted(blocks, key=lambda p: [(len(part) if part.isdigit() else 0, part) for part in p.split(".")])


def _mixtral(block: Block) -> MoEParams:
    return MoEParams(router=block.router("gate.weight"), **block.experts(("w1", "w3", "w2")))


def _minimax_m2(block: Block) -> MoEParams:
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(("w1", "w3", "w2")),
        **block.score_bias("e_score_correction_bias"),
    )


def _qwen3_moe(block: Block) -> MoEParams:
    return MoEParams(router=block.router("gate.weight"), **block.experts())


def _qwen2_moe(block: Block) -> MoEParams:
    gate = None
    if block.cfg.shared_gate:
        gate = block.array("shared_expert_gate.weight", 1, block.cfg.hidden_size).T
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(),
        **block.shared("shared_expert"),
        shared_gate=gate,
    )


def _deepseek_v2(block: Block) -> MoEParams:
    return MoEParams(router=block.router("gate.weight"), **block.experts(), **block.shared("shared_experts"))


def _deepseek_v3(block: Block) -> MoEParams:
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(),
        **block.shared("shared_experts"),
        **block.score_bias("gate.e_score_correction_bias"),
    )


def _ernie45(block: Block) -> MoEParams:
    # In memory the bias is below the gate; on disk it is beside it.
    bias = "moe_statics.e_score_correction_bias"
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(),
        **block.shared("shared_experts"),
        **block.score_bias(f"gate.{bias}", bias),
    )


def _granite(block: Block) -> MoEParams:
    cfg = block.cfg
    if "router.layer.weight" not in block:
        return MoEParams(router=block.router("router.weight"), **block.experts())
    # On disk, and in memory before transformers 5.13.
    return MoEParams(
        router=block.router("router.layer.weight"),
        w1=block.floating("input_linear.weight", cfg.num_experts, 2 * cfg.intermediate_size, cfg.hidden_size),
        w2=block.floating("output_linear.weight", cfg.num_experts, cfg.hidden_size, cfg.intermediate_size),
    )


def _gpt_oss(block: Block) -> MoEParams:
    cfg = block.cfg
    experts, hidden, inter = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    w1 = block.transposed("experts.gate_up_proj", experts, 2 * inter, hidden)
    b1 = block.array("experts.gate_up_proj_bias", experts, 2 * inter)
    return MoEParams(
        router=block.router("router.weight"),
        router_bias=block.array("router.bias", experts),
        # Gate and up alternate; the even ones are the gate's.
        w1=np.concatenate([w1[:, ::2], w1[:, 1::2]], axis=1),
        b1=np.concatenate([b1[:, ::2], b1[:, 1::2]], axis=1),
        w2=block.transposed("experts.down_proj", experts, hidden, inter),
        b2=block.array("experts.down_proj_bias", experts, hidden),
    )


def _llama4(block: Block) -> MoEParams:
    cfg = block.cfg
    experts, hidden, inter = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    return MoEParams(
        router=block.router("router.weight"),
        w1=block.array("experts.gate_up_proj", experts, hidden, 2 * inter).swapaxes(1, 2),
        w2=block.array("experts.down_proj", experts, inter, hidden).swapaxes(1, 2),
        **block.shared("shared_expert"),
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family's block is read, and what the code of its models fixes in a config."""

    read: Callable[[Block], MoEParams]
    routers: tuple[str, ...]
    """The model's own router first; another one in the list is the same formula."""
    router_names: tuple[str, ...] = ("gate.weight",)
    blocks: tuple[str, ...] = ("mlp",)
    """What a decoder layer calls the block, in memory and on disk."""
    activations: tuple[str, ...] = ("silu", "gelu")
    norm_topk: bool | None = None
    """None: the model's config decides, or the router has no such step."""
    scaled: bool = False
    """Whether the model's config has a factor on the routing weights."""


_MIXTRAL_BLOCKS = ("mlp", "block_sparse_moe")

FAMILIES: dict[str, Family] = {
    "mixtral": Family(_mixtral, ("softmax_topk",), blocks=_MIXTRAL_BLOCKS, norm_topk=True),
    "minimax_m2": Family(_minimax_m2, ("sigmoid_topk",), blocks=_MIXTRAL_BLOCKS, norm_topk=True),
    "qwen3_moe": Family(_qwen3_moe, ("softmax_topk",)),
    "olmoe": Family(_qwen3_moe, ("softmax_topk",)),
    "qwen2_moe": Family(_qwen2_moe, ("softmax_topk",)),
    # Without groups both are the k largest of a softmax; with groups MoEConfig takes the first only.
    "deepseek_v2": Family(_deepseek_v2, ("deepseek_v2", "softmax_topk"), scaled=True),
    "deepseek_v3": Family(_deepseek_v3, ("deepseek_v3",), scaled=True),
    "ernie45": Family(_ernie45, ("ernie45",), norm_topk=True),
    "granite": Family(
        _granite,
        ("topk_softmax", "gpt_oss"),
        router_names=("router.weight", "router.layer.weight"),
        blocks=("block_sparse_moe",),
    ),
    "gpt_oss": Family(
        _gpt_oss,
        ("gpt_oss", "topk_softmax"),
        router_names=("router.weight",),
        activations=("swiglu_clamped",),
    ),
    "llama4": Family(_llama4, ("llama4",), router_names=("router.weight",), blocks=("feed_forward",)),
}
