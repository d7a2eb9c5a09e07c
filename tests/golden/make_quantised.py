"""Makes quantised.npz: MoE blocks of tiny models as quantised checkpoints have them, and what they stand for.

    pip install transformers==5.24.0 torch==2.13.0 accelerate==1.15.0 compressed-tensors==0.20.1
    python tests/golden/make_quantised.py

``<model>/disk/<name>`` are the tensors of the checkpoint by their name below the block, and
``<model>/memory/<name>`` those of the model into which transformers loads it, dequantised to bfloat16.
NumPy's files have no bfloat16 and no float8, so ``<model>/dtype/<disk or memory>/<name>`` says as what the
bytes must be read. ``<model>/family`` and ``<model>/cfg`` (JSON) are what from_hf gets.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import pathlib
import tempfile
import zlib
from typing import Any

import compressed_tensors
import numpy as np
import torch
import transformers
from make_goldens import write
from make_spellings import BLOCKS, GROUPED_MODEL, LATENT, LOCAL_MODEL, MODEL, QWEN_MODEL, V3
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

EXPERTS = 2
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# As compressed-tensors has scales by rows; transformers does not load experts of its int8.
WEIGHTS = {"dynamic": False, "num_bits": 8, "strategy": "channel", "symmetric": True, "type": "float"}
BY_ROWS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": WEIGHTS,
            "input_activations": {**WEIGHTS, "dynamic": True, "strategy": "token"},
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: model_type of transformers, family, its configuration, ours, the quantisation's.
    "deepseek_v3": (
        "deepseek_v3",
        "deepseek_v3",
        {**GROUPED_MODEL, **LATENT, "n_routed_experts": EXPERTS, "n_group": 1},
        {**V3, "shared_intermediate_size": 128},
        FP8,
    ),
    "qwen3_moe": ("qwen3_moe", "qwen3_moe", {**QWEN_MODEL, "num_experts": EXPERTS}, {}, FP8),
    "minimax_m2": (
        "minimax_m2",
        "minimax_m2",
        {**LOCAL_MODEL, "num_local_experts": EXPERTS, "rotary_dim": 4},
        {"router": "sigmoid_topk", "score_bias": True},
        FP8,
    ),
    "gpt_oss": (
        "gpt_oss",
        "gpt_oss",
        {**LOCAL_MODEL, "num_local_experts": EXPERTS},
        {"router": "gpt_oss", "router_bias": True, "expert_bias": True, "activation": "swiglu_clamped"},
        {"quant_method": "mxfp4"},
    ),
    "glm4_moe": (
        "glm4_moe",
        "deepseek_v3",
        {**GROUPED_MODEL, "n_routed_experts": EXPERTS, "n_group": 1},
        {**V3, "shared_intermediate_size": 128},
        BY_ROWS,
    ),
}


def weights_of(rng: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """A pattern of its own, which compresses well; a row and a block of 128 have a size of their own."""
    steps, sizes = rng.integers(1, 7, len(shape)), range(len(shape))
    index = [np.arange(shape[i]).reshape([-1 if j == i else 1 for j in sizes]) for i in sizes]
    values = (sum(step * of for step, of in zip(steps, index, strict=True)) + rng.integers(7)) % 7 / 8 - 3 / 8
    if len(shape) > 1:
        values = values * (1 + index[-2] // 128 + 3 * (index[-1] // 128) + index[-2] % 3)
    return torch.tensor(np.broadcast_to(values, shape).astype(np.float32), dtype=torch.bfloat16)


def quantised(key: str, value: torch.Tensor, how: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors that a checkpoint has for a weight."""
    if how["quant_method"] == "fp8":
        config = transformers.FineGrainedFP8Config(weight_block_size=tuple(how["weight_block_size"]))
        return Fp8Quantize(FineGrainedFP8HfQuantizer(config, pre_quantized=False)).convert({key: value})
    args = compressed_tensors.quantization.QuantizationArgs(**WEIGHTS)
    low, high = value.amin(-1, keepdim=True), value.amax(-1, keepdim=True)
    scale, zero = compressed_tensors.quantization.utils.calculate_qparams(low, high, args)
    codes = compressed_tensors.quantization.quantize(value, scale, zero, args, dtype=torch.float8_e4m3fn)
    return {key: codes, key + "_scale": scale}


def mxfp4(rng: np.random.Generator, key: str, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Every byte, and scales at both ends and in the middle; 255, a NaN, is none that models have."""
    experts, columns, rows = shape
    blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16)).astype(np.uint8)
    blocks[:, 16:] &= 0x11  # so that it compresses
    scales = rng.choice([0, 1, 100, 126, 127, 128, 252, 253, 254], blocks.shape[:-1]).astype(np.uint8)
    return {f"{key}_blocks": torch.tensor(blocks), f"{key}_scales": torch.tensor(scales)}


def is_quantised(key: str, value: torch.Tensor, how: dict[str, Any]) -> bool:
    """Whether a tensor of the layer is stored as codes; routers are not."""
    if how["quant_method"] == "mxfp4":
        return key.endswith(("gate_up_proj", "down_proj"))
    return value.ndim == 2 and not key.endswith("gate.weight") and any(block in key for block in BLOCKS)


def stored(tensors: dict[str, torch.Tensor], part: str) -> dict[str, np.ndarray]:
    """The MoE block's tensors for the file: their bytes, and their dtypes where NumPy has none."""
    arrays = {}
    for key, value in tensors.items():
        block = next((b for b in BLOCKS if b in key), None)
        if block is None:
            continue
        name = f"{part}/{key.split(block)[1]}"
        dtype = str(value.dtype).removeprefix("torch.")
        bits = {"bfloat16": torch.int16, "float8_e4m3fn": torch.uint8}.get(dtype, value.dtype)
        arrays[f"dtype/{name}"] = np.array(dtype)
        arrays[name] = value.detach().contiguous().view(bits).numpy()
    return arrays


def make(name: str) -> dict[str, np.ndarray]:
    """The arrays of one model."""
    model_type, family, theirs, ours, how = MODELS[name]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    hidden, inter = (64, 32) if family == "gpt_oss" else (256, 128)
    sizes = {"hidden_size": hidden, "intermediate_size": inter, "moe_intermediate_size": inter}
    config = transformers.AutoConfig.for_model(model_type, **{**MODEL, **theirs, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({key: weights_of(rng, tuple(t.shape)) for key, t in model.state_dict().items()})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = pathlib.Path(folder, "model.safetensors")
        disk: dict[str, torch.Tensor] = {}
        for key, value in load_file(file).items():
            if not is_quantised(key, value, how):
                disk[key] = value
            elif how["quant_method"] == "mxfp4":
                disk.update(mxfp4(rng, key, tuple(value.shape)))
            else:
                disk.update(quantised(key, value, how))
        save_file(disk, file, {"format": "pt"})
        path = pathlib.Path(folder, "config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": how}))
        dequantise = {
            "fp8": transformers.FineGrainedFP8Config(dequantize=True),
            "mxfp4": transformers.Mxfp4Config(dequantize=True),
            "compressed-tensors": transformers.CompressedTensorsConfig(run_compressed=False),
        }[how["quant_method"]]
        loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=dequantise, output_loading_info=True
        )
        if report["missing_keys"] or report["unexpected_keys"]:
            raise SystemExit(f"{name}: transformers does not know these names: {report}")
    sizes = {"num_experts": EXPERTS, "top_k": 2, "hidden_size": hidden, "intermediate_size": inter}
    return {
        "family": np.array(family),
        "cfg": np.array(json.dumps({**sizes, **ours})),
        **stored(disk, "disk"),
        **stored(dict(loaded.state_dict()), "memory"),
    }


def main() -> None:
    """Writes the file."""
    torch.set_num_threads(1)
    made = {f"{name}/{key}": value for name in MODELS for key, value in make(name).items()}
    write("quantised", made)


if __name__ == "__main__":
    main()
