"""The families of published models: what each calls the tensors of its MoE block, and what it fixes.

One table serves both ways: ``read`` makes MoEParams of a block, ``written`` gives the tensors of MoEParams.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, rule
from jax_moriep.weights.block import GATE_UP_DOWN, Block
from jax_moriep.weights.written import Written

MEMORY, DISK = "memory", "disk"
SPELLINGS = (MEMORY, DISK)


@dataclasses.dataclass(frozen=True)
class Experts:
    """How a family stores its experts, both ways."""

    read: Callable[[Block], dict[str, Any]]
    """w1 and w2, and b1, b2 and scales where there are any."""
    write: Callable[[Written], None]
    quantised: bool = False
    """Whether there is a form with scales on disk."""


def _in_three(gate: str, up: str, down: str) -> Experts:
    names = (gate, up, down)
    return Experts(lambda block: block.experts(names), lambda out: out.experts(names), quantised=True)


def _read_granite(block: Block) -> dict[str, Any]:
    cfg = block.cfg
    if "input_linear.weight" not in block:
        return block.experts()
    # On disk, and in memory before transformers 5.13.
    return {
        "w1": block.of_experts("input_linear.weight", 2 * cfg.intermediate_size, cfg.hidden_size),
        "w2": block.of_experts("output_linear.weight", cfg.hidden_size, cfg.intermediate_size),
    }


def _write_granite(out: Written) -> None:
    names = ("input_linear.weight", "output_linear.weight")
    if out.spelling == MEMORY:
        names = ("experts.gate_up_proj", "experts.down_proj")
    out.put(names[0], out.params.w1)
    out.put(names[1], out.params.w2)


def _read_gpt_oss(block: Block) -> dict[str, Any]:
    hidden, inter = block.cfg.hidden_size, block.cfg.intermediate_size
    # Gate and up alternate; the even ones are the gate's.
    w1 = block.transposed("experts.gate_up_proj", 2 * inter, hidden)
    b1 = block.of_experts("experts.gate_up_proj_bias", 2 * inter)
    return {
        "w1": np.concatenate([w1[:, ::2], w1[:, 1::2]], axis=1),
        "b1": np.concatenate([b1[:, ::2], b1[:, 1::2]], axis=1),
        "w2": block.transposed("experts.down_proj", hidden, inter),
        "b2": block.of_experts("experts.down_proj_bias", hidden),
    }


def _write_gpt_oss(out: Written) -> None:
    params = out.params

    def alternating(w: np.ndarray) -> np.ndarray:
        """[E, 2I, ...] with the gate's rows at even places and up's at odd ones."""
        half = w.shape[1] // 2
        return np.stack([w[:, :half], w[:, half:]], axis=2).reshape(w.shape)

    out.put("experts.gate_up_proj", alternating(params.w1).swapaxes(1, 2))
    out.put("experts.gate_up_proj_bias", alternating(params.b1))
    out.put("experts.down_proj", params.w2.swapaxes(1, 2))
    out.put("experts.down_proj_bias", params.b2)


def _read_llama4(block: Block) -> dict[str, Any]:
    hidden, inter = block.cfg.hidden_size, block.cfg.intermediate_size
    return {
        "w1": block.of_experts("experts.gate_up_proj", hidden, 2 * inter).swapaxes(1, 2),
        "w2": block.of_experts("experts.down_proj", inter, hidden).swapaxes(1, 2),
    }


def _write_llama4(out: Written) -> None:
    out.put("experts.gate_up_proj", out.params.w1.swapaxes(1, 2))
    out.put("experts.down_proj", out.params.w2.swapaxes(1, 2))


@dataclasses.dataclass(frozen=True)
class Family:
    """How one family's block is stored, and what the code of its models fixes in a config.

    Where a name differs between memory and disk there are both, in this order.
    """

    experts: Experts
    routers: tuple[str, ...]
    """The model's own router first; another one in the list is the same formula."""
    router_names: tuple[str, ...] = ("gate.weight",)
    router_bias: str | None = None
    score_bias: tuple[str, ...] = ()
    shared: str | None = None
    shared_gate: str | None = None
    blocks: tuple[str, ...] = ("mlp",)
    """What a decoder layer calls the block, in memory and on disk."""
    activations: tuple[str, ...] = ("silu", "gelu")
    norm_topk: bool | None = None
    """None: the model's config decides, or the router has no such step."""
    scaled: bool = False
    """Whether the model's config has a factor on the routing weights."""

    def read(self, block: Block) -> MoEParams:
        """The weights of a block."""
        cfg = block.cfg
        name = next((n for n in self.router_names if n in block), self.router_names[0])
        fields = {"router": block.router(name), **self.experts.read(block)}
        if self.router_bias is not None:
            fields["router_bias"] = block.array(self.router_bias, cfg.num_experts)
        if self.score_bias:
            fields |= block.score_bias(*self.score_bias)
        if self.shared is not None:
            fields |= block.shared(self.shared)
        if self.shared_gate is not None and cfg.shared_gate:
            fields["shared_gate"] = block.array(self.shared_gate, 1, cfg.hidden_size).T
        return MoEParams(**fields)

    def written(self, params: Any, cfg: MoEConfig, spelling: str) -> dict[str, np.ndarray]:
        """The tensors of a block, as ``read`` takes them: params is a MoEParams of NumPy, E experts each."""
        out = Written(params, cfg, spelling)
        out.put(self._named(self.router_names, spelling), params.router.T)
        self.experts.write(out)
        if self.router_bias is not None:
            out.put(self.router_bias, params.router_bias)
        if params.score_bias is not None:
            out.score_bias(self._named(self.score_bias, spelling))
        if params.shared_w1 is not None and self.shared is not None:
            out.shared(self.shared)
        if params.shared_gate is not None and self.shared_gate is not None:
            out.put(self.shared_gate, params.shared_gate.T)
        return out.tensors

    @staticmethod
    def _named(names: tuple[str, ...], spelling: str) -> str:
        return names[0] if spelling == MEMORY else names[-1]


_MIXTRAL = _in_three("w1", "w3", "w2")
_COMMON = _in_three(*GATE_UP_DOWN)
_MIXTRAL_BLOCKS = ("mlp", "block_sparse_moe")
_BIAS = "e_score_correction_bias"

FAMILIES: dict[str, Family] = {
    "mixtral": Family(_MIXTRAL, ("softmax_topk",), blocks=_MIXTRAL_BLOCKS, norm_topk=True),
    "minimax_m2": Family(
        _MIXTRAL, ("sigmoid_topk",), score_bias=(_BIAS,), blocks=_MIXTRAL_BLOCKS, norm_topk=True
    ),
    "qwen3_moe": Family(_COMMON, ("softmax_topk",)),
    "olmoe": Family(_COMMON, ("softmax_topk",)),
    "qwen2_moe": Family(
        _COMMON, ("softmax_topk",), shared="shared_expert", shared_gate="shared_expert_gate.weight"
    ),
    # Without groups both are the k largest of a softmax; with groups MoEConfig takes the first only.
    "deepseek_v2": Family(_COMMON, ("deepseek_v2", "softmax_topk"), shared="shared_experts", scaled=True),
    "deepseek_v3": Family(
        _COMMON, ("deepseek_v3",), score_bias=(f"gate.{_BIAS}",), shared="shared_experts", scaled=True
    ),
    "ernie45": Family(
        _COMMON,
        ("ernie45",),
        score_bias=(f"gate.moe_statics.{_BIAS}", f"moe_statics.{_BIAS}"),
        shared="shared_experts",
        norm_topk=True,
    ),
    "granite": Family(
        Experts(_read_granite, _write_granite),
        ("topk_softmax", "gpt_oss"),
        router_names=("router.weight", "router.layer.weight"),
        blocks=("block_sparse_moe",),
    ),
    "gpt_oss": Family(
        Experts(_read_gpt_oss, _write_gpt_oss),
        ("gpt_oss", "topk_softmax"),
        router_names=("router.weight",),
        router_bias="router.bias",
        activations=("swiglu_clamped",),
    ),
    "llama4": Family(
        Experts(_read_llama4, _write_llama4),
        ("llama4",),
        router_names=("router.weight",),
        shared="shared_expert",
        blocks=("feed_forward",),
    ),
}


def family_of(name: Any) -> Family:
    """The family of that name, or a ConfigError with those that there are."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(rule("family", name, f"be one of {tuple(FAMILIES)}", "pick the one of this layout"))
    return FAMILIES[name]


def check_config(family: str, cfg: MoEConfig) -> None:
    """Refuses a config whose values no model of the family has, for its weights would load all the same."""
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
