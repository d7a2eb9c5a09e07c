"""What test_aiter_experts.py runs on simulated devices."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import jax_moriep as jm
from jax_moriep import schemes
from jax_moriep.aiter import kernels
from jax_moriep.aiter.layout import shuffled
from jax_moriep.experts import IMPLEMENTATIONS, ExpertSpec, ExpertWeights
from jax_moriep.runtime import targets


def draw(scheme, sizes, *, hidden, inner, block, spare=2):
    """(rows, row weights, sizes, codes, scales, d_out) with NaN in the rows that no expert has."""
    rng = np.random.default_rng([len(sizes), hidden, inner, block])
    sizes = np.asarray(sizes, np.int32)
    runs = -(-sizes // block) * block
    capacity = int(runs.sum()) + spare * block
    real = np.zeros(capacity, bool)
    for start, size in zip(np.cumsum(runs) - runs, sizes, strict=True):
        real[start : start + size] = True

    def rows(*shape):
        return np.where(real.reshape(-1, *[1] * len(shape)), rng.normal(size=(capacity, *shape)), np.nan)

    x, d_out = (rows(hidden).astype(jnp.bfloat16) for _ in range(2))
    weights = np.abs(rows()).astype(np.float32)
    w1 = rng.normal(size=(len(sizes), 2 * inner, hidden)) / np.sqrt(hidden)
    w2 = rng.normal(size=(len(sizes), hidden, inner)) / np.sqrt(inner)
    dtype = schemes.code_dtype(scheme, schemes.FORMATS["e4m3fnuz"])
    coded = [
        tuple(np.asarray(a) for a in schemes.quantise_weights(jnp.float32(w), scheme, dtype, parts=parts))
        for w, parts in ((w1, 2), (w2, 1))
    ]
    return x, weights, sizes, *coded, d_out


def forward(scheme, made, times=1):
    """The results of (block, case), each run several times by one program."""
    return [[np.asarray(forward_of(scheme, block)(*case)) for _ in range(times)] for block, case in made]


@functools.cache
def forward_of(scheme, block):
    spec = ExpertSpec("silu", 0.0, 0.0, False, block, scheme=scheme, format="e4m3fnuz")

    @jax.jit
    def run(rows, weights, sizes, w1, w2):
        coded = ExpertWeights(shuffled(w1[0]), shuffled(w2[0]), w1_scale=w1[1], w2_scale=w2[1])
        return IMPLEMENTATIONS["aiter"].expert_mlp(rows, weights, sizes, coded, spec).astype(jnp.float32)

    return run


def forward_and_backward(scheme, block, rows, weights, sizes, w1, w2, d_out):
    """The result and the gradients of rows and row weights."""
    spec = ExpertSpec("silu", 0.0, 0.0, False, block, scheme=scheme, format="e4m3fnuz")

    @jax.jit
    def run(rows, weights, sizes, w1, w2, d_out):
        coded = ExpertWeights(shuffled(w1[0]), shuffled(w2[0]), w1_scale=w1[1], w2_scale=w2[1])

        def layer(rows, weights):
            return IMPLEMENTATIONS["aiter"].expert_mlp(rows, weights, sizes, coded, spec)

        out, pull = jax.vjp(layer, rows, weights)
        return tuple(a.astype(jnp.float32) for a in (out, *pull(d_out)))

    return run(rows, weights, sizes, w1, w2, d_out)


def call_of(scheme, rows, changes):
    """All results of the custom call for rows of one expert, whose weights are zeros: of it, its attributes
    and its operands some may be others."""
    capacity, hidden = rows.shape
    inner = 256
    kernel = kernels.choose(scheme, hidden, inner)
    assert isinstance(kernel, kernels.Kernel)
    targets.register_aiter("rocm")
    kernels.load("rocm", kernel)
    blocks = scheme == "fp8_block"
    dtype = schemes.code_dtype(scheme, schemes.FORMATS["e4m3fnuz"])
    operands = {
        "rows": jnp.asarray(rows),
        "row_weights": jnp.ones(capacity),
        "group_sizes": jnp.full(1, capacity, jnp.int32),
        "w1": jnp.zeros((1, 2 * inner, hidden), dtype),
        "w2": jnp.zeros((1, hidden, inner), dtype),
        "w1_scale": jnp.ones((1, 2 * inner // 128, hidden // 128) if blocks else (1, 2 * inner)),
        "w2_scale": jnp.ones((1, hidden // 128, inner // 128) if blocks else (1, hidden)),
    }
    attributes = {"scheme": scheme, "kernel": kernel.name, "tile": kernel.tile, "block": 1}
    operands |= {name: change for name, change in changes.items() if name in operands}
    attributes |= {name: change for name, change in changes.items() if name in attributes}
    results = (
        jax.ShapeDtypeStruct((capacity, hidden), jnp.bfloat16),
        jax.ShapeDtypeStruct((capacity, hidden), jnp.uint8),
        jax.ShapeDtypeStruct((capacity * (hidden // 128 if blocks else 1),), jnp.float32),
        jax.ShapeDtypeStruct(((capacity + 31) // 32 * 65 + 2,), jnp.int32),
    )
    run = jax.jit(
        lambda *given: targets.call(
            targets.AITER_EXPERTS, results, *given, attributes=tuple(attributes.items())
        )
    )
    return jax.block_until_ready(run(*operands.values()))


def codes_and_scales(scheme, made):
    """What the kernels read of each array of rows."""
    return [call_of(scheme, rows, {})[1:3] for rows in made]


def refusals(scheme, changes):
    """What the call says to attributes and operands that Python does not give it."""
    rows = np.zeros((32, 512), jnp.bfloat16)
    said = []
    for change in changes:
        try:
            call_of(scheme, rows, change)
        except jax.errors.JaxRuntimeError as e:
            said.append(np.array(str(e)))
        else:
            said.append(np.array("nothing"))
    return said


def mesh_of_all():
    return jax.make_mesh((len(jax.devices()),), ("ep",), axis_types=(AxisType.Auto,))


class Layer(NamedTuple):
    """A layer's operands and result; weights are (codes, scales)."""

    x: Any
    y: Any
    ids: Any
    weights: Any
    w1: Any
    w2: Any


def all_to_one(logits, bias, cfg):
    """A router that sends all tokens to the second expert."""
    del bias
    ids = jnp.ones((*logits.shape[:-1], cfg.top_k), jnp.int32)
    return ids, jax.nn.sigmoid(logits[..., : cfg.top_k]), jax.nn.softmax(logits)


def config(scheme, num_experts, top_k, kind, **more):
    router = all_to_one if kind == "all to one" else "softmax_topk"
    settings = {"router": router, "transport": "native", "experts": "aiter", "expert_quant": scheme} | more
    return jm.MoEConfig(num_experts, top_k, 512, 256, **settings)


def layer(scheme, sizes):
    tokens, experts, top_k, kind = (sizes[name] for name in ("tokens", "experts", "top_k", "kind"))
    cfg = config(scheme, experts, top_k, kind)
    mesh = mesh_of_all()
    plain = jm.quantize_params(jm.init_params(jax.random.key(1), cfg), cfg)
    params = jm.prepare_params(plain, cfg, mesh)
    x = jax.random.normal(jax.random.key(2), (tokens, cfg.hidden_size), jnp.bfloat16)
    mask = jnp.arange(tokens) % 3 != 0 if kind == "masked" else None
    run = jax.jit(lambda x, params: jm.ep_moe(x, params, cfg, mesh=mesh, token_mask=mask)[0])
    first, again = run(x, params), run(x, params)
    np.testing.assert_allclose(*(np.asarray(y, np.float32) for y in (first, again)), atol=0.05)
    route = jm.route(x, plain, cfg)
    ids = route.ids if mask is None else jnp.where(mask[:, None], route.ids, -1)
    w1, w2 = (plain.w1, plain.w1_scale), (plain.w2, plain.w2_scale)
    return Layer(x, again.astype(jnp.float32), ids, route.weights, w1, w2)


def layer_gradients(scheme, sizes):
    """The gradients of x and of the router, by AITER's kernels and by the plainest implementation."""
    mesh = mesh_of_all()
    found = []
    for name in ("aiter", "reference"):
        cfg = config(scheme, sizes["experts"], sizes["top_k"], sizes["kind"], experts=name)
        params = jm.prepare_params(jm.init_params(jax.random.key(1), cfg), cfg, mesh)
        x = jax.random.normal(jax.random.key(2), (sizes["tokens"], cfg.hidden_size), jnp.bfloat16)

        def loss(x, router, cfg=cfg, params=params):
            y, _ = jm.ep_moe(x, dataclasses.replace(params, router=router), cfg, mesh=mesh)
            return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, params.router)
        found.append([np.asarray(g, np.float32) for g in gradients])
    return found


def explained():
    mesh = jax.make_mesh((1,), ("ep",))
    said = []
    for scheme in ("fp8_block", "fp8_token"):
        cfg = jm.MoEConfig(8, 2, 1024, 1024, experts="aiter", expert_quant=scheme)
        said.append(np.array(str(jm.explain(cfg, mesh))))
    return said
