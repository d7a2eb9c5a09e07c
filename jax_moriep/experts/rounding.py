"""What quantisation leaves of values, for implementations that compute with the values themselves.

The products of codes are exact in f32, so such an implementation differs from one that multiplies codes by
the order of its sums only. Each function gives f32 and takes any float.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moriep import schemes
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights, dequantised


def rows(x: jax.Array, spec: ExpertSpec, dtype: jnp.dtype) -> jax.Array:
    """[t, H] as the first product reads them."""
    assert spec.scheme is not None
    return schemes.dequantise_rows(schemes.quantise_rows(x, spec.scheme, dtype))


def activated(h: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[t, I] as the second product reads them. Cotangents of results [t, H] are rounded so, too."""
    return schemes.dequantise_rows(schemes.quantise_activated(h, dtype))


def halves(d_pre: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cotangents of pre-activations, [t, 2*I]; gate's and up's columns have groups of their own."""
    gate, up = jnp.split(d_pre, 2, axis=-1)
    return jnp.concatenate([activated(gate, dtype), activated(up, dtype)], axis=-1)


def weights(of: ExpertWeights, spec: ExpertSpec) -> tuple[jax.Array, jax.Array]:
    """w1 and w2 as the products read them, of codes or of master weights."""
    scheme = spec.scheme
    assert scheme is not None
    if of.frozen:
        return dequantised(of, scheme)
    dtype = spec.code_dtype(of)
    return master(of.w1, spec, dtype, parts=2), master(of.w2, spec, dtype, parts=1)


def master(w: jax.Array, spec: ExpertSpec, dtype: jnp.dtype, *, parts: int) -> jax.Array:
    """Floating weights [..., N, D] as products read them; ``parts`` as in ``schemes.quantise_weights``."""
    assert spec.scheme is not None
    codes, scales = schemes.quantise_weights(w, spec.scheme, dtype, parts=parts)
    return schemes.dequantise_weights(codes, scales, spec.scheme, parts=parts)
