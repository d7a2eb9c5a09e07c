"""experts="triton" under every scheme as a GPU runs it, against the oracle: each of its kernels' sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep import schemes
from jax_moriep.config import SCHEMES
from jax_moriep.experts import ExpertSpec, ExpertWeights, pallas
from jax_moriep.plan import run_starts
from tests.unit import schemes_oracle as oracle

if jax.default_backend() != "gpu":
    pytest.skip("these tests need JAX_MORIEP_TEST_PLATFORM=cuda, or rocm, and a GPU", allow_module_level=True)

L = 5
FORMAT = "e4m3fnuz" if "rocm" in jax.devices()[0].client.platform_version.lower() else "e4m3fn"


def silu(gate, up):
    s = 1 / (1 + np.exp(-gate))
    return gate * s * up, (s + gate * s * (1 - s)) * up, gate * s


def f64(array):
    return np.asarray(array).astype(np.float64)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(("hidden", "inner"), [(512, 256), (384, 128), (160, 136)])
@pytest.mark.parametrize("block", [8, 16, 64, 128])
def test_experts(scheme, frozen, hidden, inner, block):
    """Runs that end inside a tile, an empty one, one longer than a tile, and NaN in all padding."""
    rng = np.random.default_rng(block)
    sizes = np.array([block * 2 + 5, 0, 3, 70, block], np.int32)
    starts = np.asarray(run_starts(jnp.asarray(sizes), block))
    capacity = int(starts[-1]) + 2 * block
    real = np.zeros(capacity, bool)
    for start, size in zip(starts, sizes, strict=True):
        real[start : start + size] = True

    def rows(*shape):
        values = f64(jnp.asarray(rng.normal(size=(capacity, *shape)), jnp.bfloat16))
        return np.where(real.reshape(-1, *[1] * len(shape)), values, np.nan)

    x, q, d_out = rows(hidden), np.abs(rows()), rows(hidden)
    w1, w2 = (
        jnp.asarray(rng.normal(size=shape) * shape[-1] ** -0.5, jnp.bfloat16)
        for shape in ((L, 2 * inner, hidden), (L, hidden, inner))
    )
    given, v1, v2 = ExpertWeights(w1, w2), f64(w1), f64(w2)
    code = jnp.dtype(jnp.int8) if scheme == "int8_token" else schemes.FORMATS[FORMAT]
    if frozen:
        q1, q2 = (schemes.quantise_weights(w, scheme, code, parts=p) for w, p in ((w1, 2), (w2, 1)))
        given = ExpertWeights(q1.codes, q2.codes, None, None, q1.scales, q2.scales)
        v1, v2 = (f64(schemes.dequantise_weights(*w, scheme, parts=p)) for w, p in ((q1, 2), (q2, 1)))
    spec = ExpertSpec("silu", 7.0, 1.702, False, block, None, scheme, FORMAT)

    def forward(rows, weights):
        return pallas.expert_mlp(rows, weights, jnp.asarray(sizes), given, spec)

    operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(q, jnp.float32)
    # Without a gradient other kernels may run.
    alone = jax.jit(forward)(*operands)
    out, pull = jax.vjp(jax.jit(forward), *operands)
    gradients = pull(jnp.asarray(d_out, jnp.bfloat16))
    none = (np.zeros((L, 2 * inner)), np.zeros((L, hidden)))
    clean = [np.nan_to_num(a) for a in (x, q, d_out)]
    name = "int8" if scheme == "int8_token" else FORMAT
    want = oracle.experts(
        silu, clean[0], clean[1], sizes, starts, v1, v2, none, clean[2], scheme, name, frozen=frozen
    )
    for what, got, expected in zip(
        ("alone", "out", "d_rows", "d_weights"), (alone, out, *gradients), (want[0], *want), strict=False
    ):
        assert not f64(got)[~real].any(), what
        error = np.linalg.norm(f64(got) - expected) / np.linalg.norm(expected)
        # bf16 between the steps moves codes that lie near a border of two; a row weight's gradient sums them.
        assert error < (4e-2 if what == "d_weights" else 2.5e-2), (what, error)
