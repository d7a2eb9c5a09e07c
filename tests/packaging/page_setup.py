"""What the code of pages presumes: checkpoints in the folder, an x, a library that was imported before."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import jax_moriep as jm

HIDDEN = 64


def prepare(page: str) -> dict[str, Any]:
    """Writes what a page reads into the working folder; returns the names that its code begins with."""
    return PAGES[page]() if page in PAGES else {}


def several_machines() -> dict[str, Any]:
    return {"jax": jax, "np": np}


def mori() -> dict[str, Any]:
    return {"jm": jm}


def readme() -> dict[str, Any]:
    return {"folder": qwen3(Path("model"))}


def weights() -> dict[str, Any]:
    qwen3(Path("Qwen3-30B-A3B"))
    deepseek_v3(Path("DeepSeek-V3"))
    return {"x": jnp.ones((8, HIDDEN))}


def quantisation() -> dict[str, Any]:
    deepseek_v3(Path("DeepSeek-V3"))
    return {}


def sharp_bits() -> dict[str, Any]:
    """Two layers of a stack, and the second one as a scan's body has it."""
    cfg = jm.MoEConfig(8, 2, HIDDEN, 32)
    params = jax.vmap(lambda key: jm.init_params(key, cfg))(jax.random.split(jax.random.key(0), 2))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
    own = jax.tree.map(lambda w: w[1], params)
    return {
        "jm": jm,
        "x": jnp.ones((8, HIDDEN)),
        "i": 1,
        "cfg": cfg,
        "mesh": mesh,
        "params": params,
        "own": own,
    }


PAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/mori.md": mori,
    "docs/multi_node.md": several_machines,
    "docs/quantisation.md": quantisation,
    "docs/sharp_bits.md": sharp_bits,
    "docs/weights.md": weights,
}


def qwen3(folder: Path) -> Path:
    config = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config |= {"moe_intermediate_size": 32, "num_hidden_layers": 2, "mlp_only_layers": []}
    return write(folder, config, "qwen3_moe", range(2))


def deepseek_v3(folder: Path) -> Path:
    """Four layers, of which the last has experts, in blocks of float8."""
    config = {"model_type": "deepseek_v3", "n_routed_experts": 8, "num_experts_per_tok": 2}
    config |= {"moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
    config |= {"routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid"}
    config |= {"topk_method": "noaux_tc", "num_hidden_layers": 4, "first_k_dense_replace": 3}
    config |= {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    return write(folder, config, "deepseek_v3", [3])


def write(folder: Path, config: dict[str, Any], family: str, layers: Any) -> Path:
    folder.mkdir()
    config = config | {"hidden_size": HIDDEN, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    cfg = jm.MoEConfig.from_hf(folder)
    tensors = {}
    for layer in layers:
        params = jm.init_params(jax.random.key(layer), cfg)
        if cfg.expert_quant is not None:
            params = jm.quantize_params(params, cfg)
        tensors |= jm.weights.to_hf(params, family, cfg, prefix=f"model.layers.{layer}.mlp.")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder
