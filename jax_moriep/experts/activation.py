"""Gated activations on concatenated pre-activations: gate columns, then up columns.

Formulas: silu and gelu are ``act(gate) * up`` (GLU variants, arXiv:2002.05202; gelu is the exact one, by
erf); swiglu_clamped is the activation of gpt-oss (arXiv:2508.10925).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax


def gated(pre: jax.Array, activation: str, limit: float, alpha: float) -> jax.Array:
    """Applies one gated activation.

    Args:
      pre: [..., 2*I], gate then up.
      activation: a name in ``config.ACTIVATIONS``.
      limit: clamp of "swiglu_clamped": gate from above, up on both sides.
      alpha: sigmoid slope of "swiglu_clamped".

    Returns:
      [..., I], in pre's dtype.
    """
    gate, up = jnp.split(pre, 2, axis=-1)
    match activation:
        case "silu":
            return jax.nn.silu(gate) * up
        case "gelu":
            return gate * _normal_cdf(gate) * up
        case "swiglu_clamped":
            # A select, because a value that lies on the limit passes its whole gradient, as torch.clamp does;
            # jnp.minimum would pass half.
            gate = jnp.where(gate > limit, limit, gate)
            up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
            return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
        case _:
            raise AssertionError(f"activation={activation!r} passed the config's validation")


@jax.custom_jvp
def _normal_cdf(x: jax.Array) -> jax.Array:
    return lax.erfc(-x * math.sqrt(0.5)) / 2


@_normal_cdf.defjvp
def _normal_cdf_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The density. jax 0.12.0 differentiates erfc by a primitive that fails in shard_map with check_vma."""
    (x,), (d_x,) = primals, tangents
    return _normal_cdf(x), jnp.exp(-x * x / 2) / math.sqrt(2 * math.pi) * d_x
