"""Training: a decoder with mixture-of-experts layers, saved on some ranks and resumed on others.

jax-moriep launch -n 4 examples/train.py --steps 40 --folder run      # trains, and saves every 20 steps
jax-moriep launch -n 2 examples/train.py --steps 80 --folder run      # goes on from there on two ranks

One program makes a step: a scan over micro-batches adds up gradients, a scan over layers keeps the program
small, and each layer recomputes its experts in the backward pass but not its exchanges. Every rank has some
of the text and some of the experts; the other weights are on all ranks. What a step computes does not depend
on the number of ranks, which has to divide the 16 windows of a micro-batch.
"""

import argparse
import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm

VOCABULARY, LAYERS, HEADS, LENGTH = 256, 4, 4, 64
BATCH, MICRO_BATCHES = 32, 2
"""Windows of text in a step, and the parts that are computed one after another."""
SCORE_BIAS_RATE = 0.01

# On four ranks ten experts are stored as twelve, on two as they are.
CFG = jm.MoEConfig(
    num_experts=10, top_k=2, hidden_size=64, intermediate_size=64, router="sigmoid_topk", score_bias=True
)
TEXT = np.frombuffer(b"".join(inspect.getsource(m).encode() for m in (argparse, inspect, json)), np.uint8)

# jax.make_mesh would refuse devices of several machines.
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))


# The model


def init(key: jax.Array) -> dict[str, Any]:
    """Random weights, those of the layers stacked."""
    keys = jax.random.split(key, 5)
    width = CFG.hidden_size

    def weight(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * shape[-2] ** -0.5

    def moe(key: jax.Array) -> jm.MoEParams:
        return jm.pad_params(jm.init_params(key, CFG), mesh.size)

    return {
        "embedding": weight(keys[0], VOCABULARY, width),
        "layers": {
            "qkv": weight(keys[1], LAYERS, width, 3 * width),
            "out": weight(keys[2], LAYERS, width, width),
            "moe": jax.vmap(moe)(jax.random.split(keys[3], LAYERS)),
        },
        "head": weight(keys[4], width, VOCABULARY) * 0.1,
    }


def normed(x: jax.Array) -> jax.Array:
    """Without a weight of its own."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


# What the exchanges brought is kept for the backward pass; all other arithmetic of the layer is done again.
@functools.partial(jax.checkpoint, policy=jm.checkpoint_policy())
def layer(
    stack: jm.MoEParams, x: jax.Array, of_layer: tuple[dict[str, Any], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """x [B, S, H] behind a layer, and the number of tokens that each expert got, i32[E].

    The experts' kernels read the stack of all layers, for XLA would copy a layer's weights for them.
    """
    weights, number = of_layer
    q, k, v = jnp.split((normed(x) @ weights["qkv"]).reshape(*x.shape[:-1], 3 * HEADS, -1), 3, axis=-2)
    seen = jax.nn.dot_product_attention(normed(q), normed(k), v, is_causal=True)
    x = x + seen.reshape(x.shape) @ weights["out"]
    y, stats = jm.ep_moe(normed(x), weights["moe"], CFG, mesh=mesh, stack=stack, layer=number)
    return x + y, stats.expert_counts


def loss(params: dict[str, Any], windows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss in nats on windows i32[B, LENGTH + 1], and the load of the experts i32[LAYERS, E]."""
    position = jnp.sin(jnp.arange(LENGTH)[:, None] * 1000.0 ** -jnp.linspace(0, 1, CFG.hidden_size))
    x, layers = params["embedding"][windows[:, :-1]] + position, params["layers"]
    body = functools.partial(layer, layers["moe"])
    x, counts = jax.lax.scan(body, x, (layers, jnp.arange(LAYERS)))
    logits = normed(x) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(), counts


# The training


def decays(params: dict[str, Any]) -> dict[str, Any]:
    """False for the selection biases: no gradient reaches them, and decay would pull them back to zero."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "score_bias" not in str(path[-1]), params)


optimizer = optax.adamw(3e-3, weight_decay=0.05, mask=decays)


def start(key: jax.Array) -> dict[str, Any]:
    """The state before the first step: all that a checkpoint holds."""
    params = init(key)
    return {"params": params, "moments": optimizer.init(params)}


def sharding(path: tuple[Any, ...], _: Any) -> NamedSharding:
    """The experts' weights, and their moments, are split over the ranks behind the axis of the layers."""
    names = {str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path}
    return NamedSharding(mesh, P(None, "ep") if names & {"w1", "w2"} else P())


@functools.partial(jax.jit, donate_argnums=0)
def step(state: dict[str, Any], windows: jax.Array) -> tuple[dict[str, Any], jax.Array]:
    """One step with windows i32[MICRO_BATCHES, B, LENGTH + 1]: the new state, and the loss before it."""
    params = state["params"]

    def add(total: Any, windows: jax.Array) -> tuple[Any, None]:
        (value, counts), grads = jax.value_and_grad(loss, has_aux=True)(params, windows)
        return jax.tree.map(jnp.add, total, (value, counts, grads)), None

    nothing = (0.0, jnp.zeros((LAYERS, CFG.num_experts), jnp.int32), jax.tree.map(jnp.zeros_like, params))
    (value, counts, grads), _ = jax.lax.scan(add, nothing, windows)
    grads = jax.tree.map(lambda g: g / MICRO_BATCHES, grads)
    updates, moments = optimizer.update(grads, state["moments"], params)
    params: Any = optax.apply_updates(params, updates)
    layers = params["layers"]
    move = jax.vmap(functools.partial(jm.update_score_bias, rate=SCORE_BIAS_RATE))
    moe = dataclasses.replace(layers["moe"], score_bias=move(layers["moe"].score_bias, counts))
    params |= {"layers": layers | {"moe": moe}}
    return {"params": params, "moments": moments}, value / MICRO_BATCHES


def windows_of(step: int) -> jax.Array:
    """The text of a step, the same on any number of ranks; each process makes what its devices take."""
    begins = np.random.default_rng(step).integers(
        0, len(TEXT) - LENGTH, (MICRO_BATCHES, BATCH // MICRO_BATCHES)
    )
    windows = TEXT[begins[..., None] + np.arange(LENGTH + 1)].astype(np.int32)
    split = NamedSharding(mesh, P(None, "ep"))
    return jax.make_array_from_callback(windows.shape, split, lambda index: windows[index])


def main() -> None:
    """Trains, from the newest checkpoint where there is one."""
    parser = argparse.ArgumentParser(
        description="Trains a small mixture-of-experts decoder on Python's source."
    )
    parser.add_argument("--steps", type=int, default=40, help="to be done in all (default: 40)")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS", help="default: 20")
    parser.add_argument("--folder", type=Path, default=Path("run"), help="of the checkpoints (default: run)")
    args = parser.parse_args()
    if args.save_every < 1:
        parser.error("--save-every must be at least 1")
    if BATCH // MICRO_BATCHES % mesh.size:
        parser.error(f"{mesh.size} ranks do not divide the {BATCH // MICRO_BATCHES} windows of a micro-batch")

    abstract = jax.eval_shape(start, jax.random.key(0))
    shardings = jax.tree_util.tree_map_with_path(sharding, abstract)
    state = jax.jit(start, out_shardings=shardings)(jax.random.key(0))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(args.folder.absolute(), options=options) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            # A checkpoint holds each expert once, whatever the number of ranks; the padding is added here.
            like = jm.unpad_params(jax.tree.map(ocp.utils.to_shape_dtype_struct, state), CFG)
            state = jm.pad_like(checkpoints.restore(done, args=ocp.args.StandardRestore(like)), state, CFG)
            if jax.process_index() == 0:
                print(f"going on after step {done} on {mesh.size} ranks")
        while done < args.steps:
            state, value = step(state, windows_of(done))
            done += 1
            if jax.process_index() == 0:
                print(f"step {done}: loss {float(value):.5f}")
            if done % args.save_every == 0 or done == args.steps:
                checkpoints.save(done, args=ocp.args.StandardSave(jm.unpad_params(state, CFG)))


if __name__ == "__main__":
    main()
