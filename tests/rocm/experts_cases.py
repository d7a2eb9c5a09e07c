"""What test_experts.py computes both on simulated devices and on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep.experts import IMPLEMENTATIONS, ExpertSpec, ExpertWeights


def draw(dtype, sizes, *, hidden, inner, block):
    """(rows, row weights, sizes, w1, w2, d_out) with NaN in the rows that no expert has."""
    rng = np.random.default_rng(0)
    runs = -(-sizes // block) * block
    capacity = int(runs.sum()) + 2 * block
    real = np.zeros(capacity, bool)
    for start, size in zip(np.cumsum(runs) - runs, sizes, strict=True):
        real[start : start + size] = True

    def rows(*shape):
        return np.where(real.reshape(-1, *[1] * len(shape)), rng.normal(size=(capacity, *shape)), np.nan)

    w1 = rng.normal(size=(len(sizes), 2 * inner, hidden)) / np.sqrt(hidden)
    w2 = rng.normal(size=(len(sizes), hidden, inner)) / np.sqrt(inner)
    weights = np.abs(rows()).astype(np.float32)
    x, d_out = rows(hidden).astype(dtype), rows(hidden).astype(dtype)
    return x, weights, sizes, w1.astype(dtype), w2.astype(dtype), d_out


def forward_and_backward(name, block, rows, weights, sizes, w1, w2, d_out):
    spec = ExpertSpec("silu", 0.0, 0.0, False, block, precision="highest")

    def layer(rows, weights, w1, w2):
        return IMPLEMENTATIONS[name].expert_mlp(rows, weights, sizes, ExpertWeights(w1, w2), spec)

    @jax.jit
    def run(rows, weights, w1, w2, d_out):
        out, pull = jax.vjp(layer, rows, weights, w1, w2)
        return out, *pull(d_out)

    return tuple(jnp.asarray(a, jnp.float32) for a in run(rows, weights, w1, w2, d_out))
