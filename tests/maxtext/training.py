"""Trains a MaxText model by MaxText's own setup and step, and keeps what each step handed its optimizer."""

# pyright: reportMissingImports=false
# MaxText is in the environment of these tests alone.

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import maxtext.configs
import numpy as np
import optax
from flax import linen, nnx
from maxtext.configs import pyconfig
from maxtext.trainers.pre_train import train
from maxtext.utils import sharding, train_utils

_BASE = os.path.join(next(iter(maxtext.configs.__path__)), "base.yml")
# Small, exact (f32), eight sequences in a step, and plain gradient descent: Adam divides a gradient by its
# own size, and would show a rounding of a gradient that is almost zero as a whole step.
_TINY = {
    "run_name": "tiny",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "enable_checkpointing": False,
    "log_config": False,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "sharding_tolerance": 1.0,
    "override_model_config": True,
    "attention": "dot_product",
    "enable_dropout": False,
    "base_emb_dim": 32,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "base_mlp_dim": 24,
    "base_moe_mlp_dim": 24,
    "vocab_size": 64,
    "mlp_activations": "['silu','linear']",
    "max_target_length": 24,
    "per_device_batch_size": 1,
    "dtype": "float32",
    "opt_type": "sgd",
    "learning_rate": 0.5,
    "gradient_clipping_threshold": 0.0,
    "steps": 100,
    "ici_fsdp_parallelism": 1,
}

# Sigmoid scores, a routing bias that moves in every step, and groups of experts.
DEEPSEEK = {
    "model_name": "deepseek3-tiny",
    "decoder_block": "deepseek",
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "n_routing_groups": 4,
    "topk_routing_group": 2,
    "routed_bias_update_rate": 0.01,
}


@dataclasses.dataclass
class Trained:
    """What came out of some steps."""

    losses: list[float]
    balance_losses: list[float]
    gradients: list[dict[str, np.ndarray]]
    """By step, and by the path of the parameter."""
    weights: dict[str, np.ndarray]
    """Of the end, parameters and routing biases."""


def config(folder: Any, **overrides: Any) -> Any:
    """MaxText's configuration of a tiny model."""
    values = _TINY | {"base_output_directory": folder} | overrides
    return pyconfig.initialize(["train", _BASE, *(f"{name}={value}" for name, value in values.items())])


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by name, on the host."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


def batches(cfg: Any, steps: int) -> list[dict[str, np.ndarray]]:
    """Sequences in which a token mostly decides the next one, so that there is something to learn."""
    rng = np.random.default_rng(0)
    shape = (cfg.global_batch_size_to_load, cfg.max_target_length)
    made = []
    for _ in range(steps):
        tokens = rng.integers(1, cfg.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
        for at in range(1, shape[1] + 1):
            follow = rng.uniform(size=shape[0]) < 0.75
            tokens[follow, at] = 1 + tokens[follow, at - 1] * 5 % (cfg.vocab_size - 1)
        position = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        part = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        for name in tuple(part):
            part |= {f"{name}_position": position, f"{name}_segmentation": np.ones(shape, np.int32)}
        made.append(part)
    return made


def run(cfg: Any, steps: int, monkeypatch: Any) -> Trained:
    """Trains from MaxText's own initial weights, which depend on the config's seed alone."""
    create = train_utils.create_training_optimizer

    def recording(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        schedule, optimizer = create(*args, **kwargs)
        return schedule, optax.chain(_keep_gradient(), optimizer)

    monkeypatch.setattr(train_utils, "create_training_optimizer", recording)
    made = train_utils.setup_train_loop(cfg, None)
    shardings, mesh, state = made[2], made[4], made[-1]
    graph, state = nnx.split(state)
    weights, shardings = sharding.maybe_update_params_sharding_with_opt(cfg, shardings)
    step, _ = train_utils.jit_train_and_eval_step(
        cfg, graph, mesh, state, shardings, train.train_step, params_shardings=weights
    )
    trained = Trained([], [], [], {})
    with jax.set_mesh(mesh), linen.logical_axis_rules(cfg.logical_axis_rules):
        split = sharding.get_input_data_sharding(cfg, mesh)
        for batch in batches(cfg, steps):
            state, metrics = step(state, jax.device_put(batch, split))
            trained.losses.append(float(metrics["scalar"]["learning/loss"]))
            trained.balance_losses.append(float(metrics["scalar"]["learning/moe_lb_loss"]))
            trained.gradients.append(by_path(nnx.to_pure_dict(state.optimizer)["opt_state"][0]))
    trained.weights = by_path(nnx.to_pure_dict(state.model))
    return trained


def _keep_gradient() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda weights: jax.tree.map(jnp.zeros_like, weights), lambda gradient, *_: (gradient, gradient)
    )
