"""Weights of published models: one layer's MoE block as Hugging Face names it, to MoEParams.

``from_hf`` reads both spellings of transformers 5.24: that in memory (one tensor for all experts), and that
of checkpoints on disk (mostly one tensor per expert).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_moriep.config import MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, rule

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def from_hf(state_dict: Mapping[str, Any], family: str, cfg: MoEConfig) -> MoEParams:
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

    Args:
      state_dict: NumPy arrays or torch tensors by their name below the block, for example "gate.weight".
      family: a name of the table.
      cfg: the layer; says which shapes, biases and shared expert must be there.

    Returns:
      MoEParams of NumPy arrays in the dtype that they had (score_bias: f32); some may share memory with the
      input. ``jax.device_put(params, shardings)`` then sends each device only its own shard.

    Raises:
      ConfigError: the family is unknown or contradicts cfg, or a tensor is missing, has another shape than
        cfg says, is not floating (a quantised checkpoint), or is one that the family does not have. Where the
        names are those of a whole model, the text has the prefixes that would fit.

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
    block = _Block(state_dict, family, cfg)
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


class _Block:
    """A state dict that checks the shape of what is read and remembers what has been."""

    def __init__(self, state_dict: Mapping[str, Any], family: str, cfg: MoEConfig) -> None:
        self.cfg = cfg
        self._tensors = state_dict
        self._family = family
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def array(self, name: str, *shape: int) -> np.ndarray:
        """The tensor of that name as NumPy, of exactly that shape."""
        if name not in self._tensors:
            if f"{name}_blocks" in self._tensors:
                raise ConfigError(
                    f"state_dict has {name + '_blocks'!r}, a quantised tensor, instead of {name!r}; "
                    "dequantise the checkpoint first"
                )
            raise ConfigError(
                f"state_dict lacks {name!r} of shape {shape}, which family={self._family!r} with this config "
                "needs; pass the names below one layer's MoE block, and a config that fits the model"
            )
        self._read.add(name)
        array = _to_numpy(name, self._tensors[name])
        if array.shape != shape:
            raise ConfigError(
                rule(f"state_dict[{name!r}].shape", array.shape, f"be {shape}", "pass the model's own config")
            )
        return array

    def check_all_read(self, params: MoEParams) -> None:
        """Nothing may be left over, in the state dict or in the config's wishes."""
        left = sorted(set(self._tensors) - self._read)
        if left:
            raise ConfigError(
                f"state_dict has {left[:4]} ({len(left)} in all), which family={self._family!r} with this "
                "config does not read; pick the right family, set the config's biases and shared expert as "
                "the model has them, and drop what is not part of the block"
            )
        present = {
            "router_bias": (self.cfg.router_bias, params.router_bias),
            "score_bias": (self.cfg.score_bias, params.score_bias),
            "expert_bias": (self.cfg.expert_bias, params.b1),
            "shared_intermediate_size": (self.cfg.shared_intermediate_size, params.shared_w1),
            "shared_gate": (self.cfg.shared_gate, params.shared_gate),
        }
        for name, (wish, array) in present.items():
            if bool(wish) != (array is not None):
                must, cure = ("be unset", "drop it") if wish else ("be set", "set it in MoEConfig")
                raise ConfigError(rule(name, wish, f"{must} for family={self._family!r}", cure))

    def router(self, name: str) -> np.ndarray:
        return self.array(name, self.cfg.num_experts, self.cfg.hidden_size).T

    def experts(self, names: tuple[str, str, str] = GATE_UP_DOWN) -> dict[str, Any]:
        """w1 and w2, from the fused tensors or from ``experts.<i>.<name>.weight``: gate, up and down."""
        experts, hidden, inter = self.cfg.num_experts, self.cfg.hidden_size, self.cfg.intermediate_size
        if "experts.gate_up_proj" in self:
            return {
                "w1": self.array("experts.gate_up_proj", experts, 2 * inter, hidden),
                "w2": self.array("experts.down_proj", experts, hidden, inter),
            }
        gate, up, down = names
        w1, w2 = [], []
        for i in range(experts):
            halves = [self.array(f"experts.{i}.{half}.weight", inter, hidden) for half in (gate, up)]
            w1.append(np.concatenate(halves))
            w2.append(self.array(f"experts.{i}.{down}.weight", hidden, inter))
        return {"w1": np.stack(w1), "w2": np.stack(w2)}

    def score_bias(self, *names: str) -> dict[str, Any]:
        """The selection bias under the first name that is there; nothing when the config wants none."""
        if not self.cfg.score_bias:
            return {}
        name = next((n for n in names if n in self), names[0])
        # ERNIE keeps a leading dimension of 1.
        lead = (1,) if "moe_statics" in name else ()
        bias = self.array(name, *lead, self.cfg.num_experts)
        return {"score_bias": bias.reshape(-1).astype(np.float32)}

    def shared(self, name: str) -> dict[str, Any]:
        """The shared expert below ``name``; nothing when the config wants none."""
        inter, hidden = self.cfg.shared_intermediate_size, self.cfg.hidden_size
        if inter is None:
            return {}
        halves = [self.array(f"{name}.{half}.weight", inter, hidden) for half in GATE_UP_DOWN[:2]]
        down = self.array(f"{name}.down_proj.weight", hidden, inter)
        return {"shared_w1": np.concatenate(halves), "shared_w2": down}


def _to_numpy(name: str, value: Any) -> np.ndarray:
    """NumPy array of a NumPy, JAX or torch array, without importing torch."""
    dtype = str(getattr(value, "dtype", type(value).__name__))
    if dtype.removeprefix("torch.") not in ("float64", "float32", "float16", "bfloat16"):
        must = "be float64, float32, float16 or bfloat16"
        raise ConfigError(rule(f"state_dict[{name!r}].dtype", dtype, must, "dequantise the checkpoint first"))
    if not dtype.startswith("torch."):
        return np.asarray(value)
    value = value.detach().cpu()
    if dtype == "torch.bfloat16":
        # torch gives NumPy no bfloat16; through float32 no bit is lost.
        return value.float().numpy().astype(jnp.bfloat16)
    return value.numpy()


def _mixtral(block: _Block) -> MoEParams:
    return MoEParams(router=block.router("gate.weight"), **block.experts(("w1", "w3", "w2")))


def _minimax_m2(block: _Block) -> MoEParams:
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(("w1", "w3", "w2")),
        **block.score_bias("e_score_correction_bias"),
    )


def _qwen3_moe(block: _Block) -> MoEParams:
    return MoEParams(router=block.router("gate.weight"), **block.experts())


def _qwen2_moe(block: _Block) -> MoEParams:
    gate = None
    if block.cfg.shared_gate:
        gate = block.array("shared_expert_gate.weight", 1, block.cfg.hidden_size).T
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(),
        **block.shared("shared_expert"),
        shared_gate=gate,
    )


def _deepseek_v2(block: _Block) -> MoEParams:
    return MoEParams(router=block.router("gate.weight"), **block.experts(), **block.shared("shared_experts"))


def _deepseek_v3(block: _Block) -> MoEParams:
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(),
        **block.shared("shared_experts"),
        **block.score_bias("gate.e_score_correction_bias"),
    )


def _ernie45(block: _Block) -> MoEParams:
    # In memory the bias is below the gate; on disk it is beside it.
    bias = "moe_statics.e_score_correction_bias"
    return MoEParams(
        router=block.router("gate.weight"),
        **block.experts(),
        **block.shared("shared_experts"),
        **block.score_bias(f"gate.{bias}", bias),
    )


def _granite(block: _Block) -> MoEParams:
    cfg = block.cfg
    if "router.layer.weight" not in block:
        return MoEParams(router=block.router("router.weight"), **block.experts())
    # On disk, and in memory before transformers 5.13.
    return MoEParams(
        router=block.router("router.layer.weight"),
        w1=block.array("input_linear.weight", cfg.num_experts, 2 * cfg.intermediate_size, cfg.hidden_size),
        w2=block.array("output_linear.weight", cfg.num_experts, cfg.hidden_size, cfg.intermediate_size),
    )


def _gpt_oss(block: _Block) -> MoEParams:
    cfg = block.cfg
    experts, hidden, inter = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    w1 = block.array("experts.gate_up_proj", experts, hidden, 2 * inter).swapaxes(1, 2)
    b1 = block.array("experts.gate_up_proj_bias", experts, 2 * inter)
    return MoEParams(
        router=block.router("router.weight"),
        router_bias=block.array("router.bias", experts),
        # Gate and up alternate; the even ones are the gate's.
        w1=np.concatenate([w1[:, ::2], w1[:, 1::2]], axis=1),
        b1=np.concatenate([b1[:, ::2], b1[:, 1::2]], axis=1),
        w2=block.array("experts.down_proj", experts, inter, hidden).swapaxes(1, 2),
        b2=block.array("experts.down_proj_bias", experts, hidden),
    )


def _llama4(block: _Block) -> MoEParams:
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

    read: Callable[[_Block], MoEParams]
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
