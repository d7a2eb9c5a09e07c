"""Makes spellings.npz: the MoE block of a tiny model of every family, as it is named in memory and on disk.

    pip install transformers==5.24.0 torch==2.13.0
    python tests/golden/make_spellings.py

``<model>/memory/<name>`` is from the model's state dict, ``<model>/disk/<name>`` from the file that
``save_pretrained`` wrote; the names are whole, with the prefix of their layer. ``<model>/family`` and
``<model>/cfg`` (JSON, the arguments of MoEConfig) are what from_hf gets.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import pathlib
import tempfile
import zlib
from typing import Any

import numpy as np
import torch
import transformers
from make_goldens import random_array, write
from safetensors.numpy import load_file

# One layer's width and heads in every tiny model; what only some kinds read does no harm to the others.
MODEL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LOCAL_MODEL = {"intermediate_size": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MODEL = {"moe_intermediate_size": 4, "num_experts": 4, "num_experts_per_tok": 2}
GROUPED_MODEL = {
    "moe_intermediate_size": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 4}
V3 = {"router": "deepseek_v3", "score_bias": True, "shared_intermediate_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # model_type of transformers: family, its configuration, ours.
    "mixtral": ("mixtral", LOCAL_MODEL, {}),
    "minimax_m2": (
        "minimax_m2",
        {**LOCAL_MODEL, "rotary_dim": 4},
        {"router": "sigmoid_topk", "score_bias": True},
    ),
    "qwen3_moe": ("qwen3_moe", QWEN_MODEL, {}),
    "olmoe": ("olmoe", {**QWEN_MODEL, "intermediate_size": 4}, {}),
    "qwen2_moe": (
        "qwen2_moe",
        {**QWEN_MODEL, "shared_expert_intermediate_size": 3},
        {"shared_intermediate_size": 3, "shared_gate": True},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {**GROUPED_MODEL, **LATENT},
        {"router": "deepseek_v2", "shared_intermediate_size": 4},
    ),
    "deepseek_v3": ("deepseek_v3", {**GROUPED_MODEL, **LATENT}, V3),
    "glm4_moe": ("deepseek_v3", GROUPED_MODEL, V3),
    "dots1": ("deepseek_v3", GROUPED_MODEL, V3),
    "ernie4_5_moe": (
        "ernie45",
        {
            "moe_intermediate_size": 4,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 0,
            "moe_layer_interval": 1,
        },
        {"router": "ernie45", "score_bias": True, "shared_intermediate_size": 4},
    ),
    "granitemoe": ("granite", LOCAL_MODEL, {"router": "topk_softmax"}),
    "gpt_oss": (
        "gpt_oss",
        LOCAL_MODEL,
        {"router": "gpt_oss", "router_bias": True, "expert_bias": True, "activation": "swiglu_clamped"},
    ),
    "llama4_text": (
        "llama4",
        {**LOCAL_MODEL, "num_experts_per_tok": 1, "intermediate_size_mlp": 4, "interleave_moe_layer_step": 1},
        {"router": "llama4", "top_k": 1, "shared_intermediate_size": 4},
    ),
}
# What a decoder layer calls its MoE block, in memory or on disk.
BLOCKS = (".mlp.", ".block_sparse_moe.", ".feed_forward.")


def make_spellings() -> dict[str, np.ndarray]:
    """The arrays of ``spellings.npz``."""
    arrays = {}
    for name, (family, theirs, ours) in MODELS.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        config = transformers.AutoConfig.for_model(name, **MODEL, **theirs)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(
            {
                key: torch.tensor(random_array(rng, 1.0, tuple(t.shape)))
                for key, t in model.state_dict().items()
            }
        )
        memory = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            disk = load_file(pathlib.Path(folder, "model.safetensors"))
        sizes = {"num_experts": 4, "top_k": 2, "hidden_size": 8, "intermediate_size": 4}
        arrays[f"{name}/family"] = np.array(family)
        arrays[f"{name}/cfg"] = np.array(json.dumps({**sizes, **ours}))
        for spelling, tensors in (("memory", memory), ("disk", disk)):
            for key, value in tensors.items():
                if any(block in key for block in BLOCKS):
                    arrays[f"{name}/{spelling}/{key}"] = value
    return arrays


if __name__ == "__main__":
    write("spellings", make_spellings())
