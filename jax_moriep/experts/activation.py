"""Gated activations on concatenated pre-activations: gate columns, then up columns.

Formulas: silu and gelu are ``act(gate) * up`` (GLU variants, arXiv:2002.05202; gelu is the exact one, by
erf); swiglu_clamped is the activation of gpt-oss (arXiv:2508.10925).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
            return jax.nn.gelu(gate, approximate=False) * up
        case "swiglu_clamped":
            # A select, because a value that lies on the limit passes its whole gradient, as torch.clamp does;
            # jnp.minimum would pass half.
            gate = jnp.where(gate > limit, limit, gate)
            up = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))
            return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
        case _:
            raise AssertionError(f"activation={activation!r} passed the config's validation")
