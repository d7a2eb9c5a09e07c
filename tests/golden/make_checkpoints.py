"""Makes checkpoints.npz: whole checkpoints of tiny models of every family, and what their MoE blocks compute.

    pip install transformers==5.24.0 torch==2.13.0
    python tests/golden/make_checkpoints.py

``<model>/file/<name>`` are the bytes of each file that ``save_pretrained`` wrote, ``<model>/x`` [T, H] is the
blocks' input, and ``<model>/y/<layer>`` what the block of each layer that has one makes of it. There are five
experts, which no number of ranks but 1 and 5 divides, and four with groups. Some models are in several files.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import pathlib
import tempfile
import zlib
from typing import Any

import numpy as np
import torch
import transformers
from make_goldens import random_array, write
from make_spellings import MODEL, MODELS

TOKENS = 6
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
IN_SEVERAL_FILES = ("mixtral", "deepseek_v3", "gpt_oss", "granitemoe")
# The first layer is dense where the kind of model has dense layers at all.
FIVE = {name: 5 for name in ("num_experts", "num_local_experts", "moe_num_experts")}
DENSE_FIRST = {
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "deepseek_v2": {
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
    },
    "deepseek_v3": {"first_k_dense_replace": 1},
    "glm4_moe": {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    "dots1": {"first_k_dense_replace": 1, "norm_topk_prob": True},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "llama4_text": {"interleave_moe_layer_step": 2, "num_hidden_layers": 4},
}


def config_of(name: str) -> Any:
    """The configuration of one tiny model."""
    theirs = MODELS[name][1]
    five = {key: value for key, value in FIVE.items() if key in theirs}
    dense = {"intermediate_size": 6, "num_hidden_layers": 3}
    return transformers.AutoConfig.for_model(
        name, **{**MODEL, **dense, **theirs, **five, **DENSE_FIRST.get(name, {})}
    )


def make(name: str, folder: str) -> dict[str, np.ndarray]:
    """Saves one model to a folder and gives its arrays."""
    rng = np.random.default_rng(zlib.crc32(f"{name} checkpoint".encode()))
    config = config_of(name)
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(
        {key: torch.tensor(random_array(rng, 0.5, tuple(t.shape))) for key, t in model.state_dict().items()}
    )
    model.save_pretrained(folder, max_shard_size="4KB" if name in IN_SEVERAL_FILES else "1GB")
    arrays = {
        f"file/{path.name}": np.frombuffer(path.read_bytes(), np.uint8)
        for path in sorted(pathlib.Path(folder).iterdir())
        if path.name == "config.json" or ".safetensors" in path.name
    }
    arrays["x"] = x = random_array(rng, 1.0, (TOKENS, MODEL["hidden_size"]))
    for number, layer in enumerate(model.model.layers):
        block = next(getattr(layer, name) for name in BLOCKS if hasattr(layer, name))
        if not hasattr(block, "experts"):
            continue
        with torch.no_grad():
            out = block(torch.tensor(x[None]))
        y = out[0] if isinstance(out, tuple) else out
        arrays[f"y/{number}"] = y.reshape(TOKENS, -1).numpy()
    return arrays


def main() -> None:
    """Writes the file."""
    torch.set_num_threads(1)
    made = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            made |= {f"{name}/{key}": value for key, value in make(name, folder).items()}
    write("checkpoints", made)


if __name__ == "__main__":
    main()
