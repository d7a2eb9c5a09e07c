"""Makes the golden .npz files beside it from the MoE blocks of transformers; run by hand, on its newest.

    pip install transformers==5.24.0 torch==2.13.0
    python tests/golden/make_goldens.py

Each block runs alone on the CPU in f32, forward and backward, with small random weights of a fixed seed. A
file holds ``cfg`` (JSON, the arguments of MoEConfig), ``family``, ``x`` [T, H], ``ids`` and ``weights``
[T, K], ``y`` and ``cotangent`` [T, H], the weights as ``param.<field>`` and the gradients of
``sum(y * cotangent)`` as ``grad.x`` and ``grad.<field>``, both in the layout of MoEParams; a few also hold
the block's own state dict as ``hf.<name>``. Inputs are multiples of 1/64, so that they compress well.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import importlib
import json
import pathlib
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from jax_moriep.config import MoEConfig
from jax_moriep.weights import from_hf

TRANSFORMERS = "5.24.0"

EXPERTS, TOP_K, HIDDEN, INTER, TOKENS = 8, 3, 16, 8, 12
OWN = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_size": HIDDEN, "intermediate_size": INTER}
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K}
LOCAL = {**SIZES, "intermediate_size": INTER, "num_local_experts": EXPERTS}
QWEN = {**SIZES, "moe_intermediate_size": INTER, "num_experts": EXPERTS}
DEEPSEEK = {**SIZES, "moe_intermediate_size": INTER, "n_routed_experts": EXPERTS, "n_shared_experts": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """One block: where transformers has it, how it is configured there and here, and how it is filled."""

    family: str
    module: str
    """models.<module>.modeling_<module> of transformers."""
    block: str
    config: str
    theirs: dict[str, Any]
    ours: dict[str, Any]
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    """Standard deviation of the tensors whose name ends so; others have 0.3, matrices of the router 0.5."""
    keep_state_dict: bool = False
    prepare: Callable[[dict[str, np.ndarray]], None] | None = None
    """Changes the state dict before the run."""


def _negative_bias(state: dict[str, np.ndarray]) -> None:
    """Only group 0 stays above 0.0, so that 0.0 for masked experts would win against two kept groups."""
    bias = np.array([0, 0, -3, -3.125, -2.5, -2.75, -2, -2.25], np.float32)
    state["gate.e_score_correction_bias"] = bias


def _half_below_zero(state: dict[str, np.ndarray]) -> None:
    """Scores below 0.5 become negative, also in the best group."""
    state["gate.e_score_correction_bias"] = np.full(EXPERTS, -0.5, np.float32)


def _one_group(module: str, name: str) -> Case:
    """DeepSeek-V3's router, also of GLM-4 MoE and dots1, where what stands for masked experts decides."""
    return Case(
        "deepseek_v3",
        module,
        f"{name}MoE",
        f"{name}Config",
        {
            **DEEPSEEK,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        {
            "router": "deepseek_v3",
            "top_k": 2,
            "num_groups": 4,
            "top_groups": 1,
            "score_bias": True,
            "routed_scaling": 2.5,
            "shared_intermediate_size": 2 * INTER,
        },
        prepare=_half_below_zero,
    )


CASES = {
    "mixtral": Case(
        "mixtral", "mixtral", "MixtralSparseMoeBlock", "MixtralConfig", LOCAL, {}, keep_state_dict=True
    ),
    "qwen3_moe_no_norm": Case(
        "qwen3_moe",
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        {**QWEN, "norm_topk_prob": False},
        {"norm_topk": False},
    ),
    "qwen2_moe_shared_gate": Case(
        "qwen2_moe",
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        {**QWEN, "norm_topk_prob": True, "shared_expert_intermediate_size": 12},
        {"shared_intermediate_size": 12, "shared_gate": True},
    ),
    "granite": Case(
        "granite", "granitemoe", "GraniteMoeMoE", "GraniteMoeConfig", LOCAL, {"router": "topk_softmax"}
    ),
    "minimax_m2": Case(
        "minimax_m2",
        "minimax_m2",
        "MiniMaxM2SparseMoeBlock",
        "MiniMaxM2Config",
        LOCAL,
        {"router": "sigmoid_topk", "score_bias": True},
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        {**DEEPSEEK, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        {
            "router": "deepseek_v3",
            "num_groups": 4,
            "top_groups": 2,
            "score_bias": True,
            "routed_scaling": 2.5,
            "shared_intermediate_size": 2 * INTER,
        },
        keep_state_dict=True,
    ),
    "deepseek_v3_negative_bias": Case(
        "deepseek_v3",
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        {
            **DEEPSEEK,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 3,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
        {
            "router": "deepseek_v3",
            "top_k": 4,
            "num_groups": 4,
            "top_groups": 3,
            "score_bias": True,
            "norm_topk": False,
            "routed_scaling": 1.5,
            "shared_intermediate_size": 2 * INTER,
        },
        prepare=_negative_bias,
    ),
    "deepseek_v3_one_group": _one_group("deepseek_v3", "DeepseekV3"),
    "glm4_moe_one_group": _one_group("glm4_moe", "Glm4Moe"),
    "dots1_one_group": _one_group("dots1", "Dots1"),
    "deepseek_v2": Case(
        "deepseek_v2",
        "deepseek_v2",
        "DeepseekV2Moe",
        "DeepseekV2Config",
        {
            **DEEPSEEK,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "num_attention_heads": 4,
            "routed_scaling_factor": 4.0,
        },
        {
            "router": "deepseek_v2",
            "num_groups": 4,
            "top_groups": 2,
            "norm_topk": False,
            "routed_scaling": 4.0,
            "shared_intermediate_size": 2 * INTER,
        },
    ),
    "gpt_oss": Case(
        "gpt_oss",
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        LOCAL,
        {"router": "gpt_oss", "router_bias": True, "expert_bias": True, "activation": "swiglu_clamped"},
        # Large enough that the clamp at 7 is reached on both sides.
        scales={"gate_up_proj": 1.0, "gate_up_proj_bias": 3.0, "router.bias": 0.5},
        keep_state_dict=True,
    ),
    "llama4": Case(
        "llama4",
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        {**LOCAL, "num_experts_per_tok": 1},
        {"router": "llama4", "top_k": 1, "shared_intermediate_size": INTER},
    ),
    "ernie45": Case(
        "ernie45",
        "ernie4_5_moe",
        "Ernie4_5_MoeSparseMoeBlock",
        "Ernie4_5_MoeConfig",
        {
            "hidden_size": HIDDEN,
            "moe_k": TOP_K,
            "moe_intermediate_size": INTER,
            "moe_num_experts": EXPERTS,
            "moe_num_shared_experts": 2,
        },
        {"router": "ernie45", "score_bias": True, "shared_intermediate_size": 2 * INTER},
        scales={"e_score_correction_bias": 0.1},
    ),
}


def random_array(rng: np.random.Generator, scale: float, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers, rounded to multiples of 1/64."""
    return (np.round(rng.normal(size=shape) * scale * 64) / 64).astype(np.float32)


def _scale(name: str, case: Case) -> float:
    for end, scale in case.scales.items():
        if name.endswith(end):
            return scale
    return 0.5 if name.startswith(("gate.weight", "router.")) else 0.3


def _run(block: Any, x: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """The leaf for x, the block's y [T, H], and the ids and weights that its router handed on."""
    seen: dict[str, Any] = {}
    kind = type(block).__name__
    if kind == "Llama4TextMoe":
        hook = block.router.register_forward_hook(lambda m, args, out: seen.update(out=out))
    else:
        hook = block.experts.register_forward_pre_hook(
            lambda m, args: seen.update(ids=args[1], weights=args[2])
        )
    leaf = torch.tensor(x.reshape(2, TOKENS // 2, HIDDEN), requires_grad=True)
    out = block(leaf)
    hook.remove()
    y = (out[0] if isinstance(out, tuple) else out).reshape(TOKENS, HIDDEN)
    if kind == "Llama4TextMoe":
        weights, ids = seen["out"][0].topk(block.top_k)
    else:
        ids, weights = seen["ids"], seen["weights"]
    return leaf, y, ids.numpy().astype(np.int32), weights.detach().numpy()


def make(name: str, case: Case) -> dict[str, np.ndarray]:
    """The arrays of one golden file."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    modeling = importlib.import_module(f"transformers.models.{case.module}.modeling_{case.module}")
    configuration = importlib.import_module(f"transformers.models.{case.module}.configuration_{case.module}")
    config = getattr(configuration, case.config)(**case.theirs)
    config._experts_implementation = "eager"
    block = getattr(modeling, case.block)(config).train()
    state = {
        key: random_array(rng, _scale(key, case), tuple(tensor.shape))
        for key, tensor in block.state_dict().items()
    }
    if case.prepare is not None:
        case.prepare(state)
    block.load_state_dict({key: torch.tensor(value) for key, value in state.items()})

    x, cotangent = (random_array(rng, 1.0, (TOKENS, HIDDEN)) for _ in range(2))
    leaf, y, ids, weights = _run(block, x)
    (y * torch.tensor(cotangent)).sum().backward()
    nudged = _run(block, x * (1 + 1e-3 * rng.normal(size=x.shape).astype(np.float32)))[2]
    if not np.array_equal(np.sort(ids), np.sort(nudged)):
        raise SystemExit(f"{name}: a choice hangs on rounding; take another seed")

    grads = {key: np.zeros_like(value) for key, value in state.items()}
    for key, parameter in block.named_parameters():
        if parameter.grad is not None:
            grads[key] = parameter.grad.numpy()
    ours = {**OWN, **case.ours}
    cfg = MoEConfig(**ours)
    assert leaf.grad is not None
    arrays = {
        "cfg": np.array(json.dumps(ours)),
        "family": np.array(case.family),
        "x": x,
        "cotangent": cotangent,
        "ids": ids,
        "weights": weights,
        "y": y.detach().numpy(),
        "grad.x": leaf.grad.numpy().reshape(TOKENS, HIDDEN),
    }
    # A gradient has the layout of its weight, so the same conversion serves both.
    for prefix, tensors in (("param", state), ("grad", grads)):
        for field, value in vars(from_hf(tensors, case.family, cfg)).items():
            if value is not None:
                arrays[f"{prefix}.{field}"] = np.ascontiguousarray(value)
    if case.keep_state_dict:
        arrays |= {f"hf.{key}": value for key, value in state.items()}
    return arrays


def write(name: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes one golden file, if they are of the release that this script names."""
    if transformers.__version__ != TRANSFORMERS:
        raise SystemExit(f"transformers is {transformers.__version__}; the goldens are of {TRANSFORMERS}")
    path = pathlib.Path(__file__).with_name(f"{name}.npz")
    np.savez_compressed(path, allow_pickle=False, **arrays)
    print(f"{path.name}: {path.stat().st_size} bytes")


def main() -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        write(name, make(name, case))


if __name__ == "__main__":
    main()
