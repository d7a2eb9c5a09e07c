"""How f32 experts and routers multiply on a GPU, against float64: exact where asked, else as JAX does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep.experts import IMPLEMENTATIONS, ExpertSpec, ExpertWeights
from jax_moriep.router_product import product

if jax.default_backend() != "gpu":
    pytest.skip("these tests need JAX_MORIEP_TEST_PLATFORM=cuda, or rocm, and a GPU", allow_module_level=True)


def off(found, wanted):
    return np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("name", ["triton", "blocked"])
@pytest.mark.parametrize(("precision", "most"), [("highest", 4e-6), (None, 4e-3), ("tensorfloat32", 4e-3)])
def test_experts(name, precision, most):
    rng = np.random.default_rng(0)
    rows, d_out = rng.normal(size=(2, 256, 512))
    w1, w2 = rng.normal(size=(1, 512, 512)) / 23, rng.normal(size=(1, 512, 256)) / 16
    spec = ExpertSpec("silu", 0.0, 0.0, False, 128, precision=precision)

    def layer(rows, w1, w2):
        weights, sizes = jnp.ones(256, jnp.float32), jnp.asarray([256], jnp.int32)
        return IMPLEMENTATIONS[name].expert_mlp(rows, weights, sizes, ExpertWeights(w1, w2), spec)

    out, pull = jax.vjp(jax.jit(layer), *(jnp.asarray(a, jnp.float32) for a in (rows, w1, w2)))
    _, d_w1, d_w2 = pull(jnp.asarray(d_out, jnp.float32))
    gate, up = np.split(rows @ w1[0].T, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    act, d_act = gate * s * up, d_out @ w2[0]
    d_pre = np.concatenate([d_act * up * (s + gate * s * (1 - s)), d_act * gate * s], axis=1)
    for found, wanted in ((out, act @ w2[0].T), (d_w1[0], d_pre.T @ rows), (d_w2[0], d_out.T @ act)):
        assert off(found, wanted) < most


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_router(dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(512, 4096)), jnp.bfloat16)
    weights = jnp.asarray(rng.normal(size=(4096, 64)) / 64, dtype)
    d_logits = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    logits, pull = jax.vjp(jax.jit(product), x, weights)
    d_x, d_weights = pull(d_logits)
    X, W, D = (np.asarray(a).astype(np.float64) for a in (x, weights, d_logits))
    assert off(logits, X @ W) < 1e-5
    assert off(np.asarray(d_x).astype(np.float64), D @ W.T) < 4e-3
    assert off(np.asarray(d_weights).astype(np.float64), X.T @ D) < (4e-3 if dtype == jnp.bfloat16 else 1e-5)
