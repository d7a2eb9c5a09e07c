"""The gated activations inside a kernel: value and derivatives in one go, of f32 tiles.

The formulas are those of ``experts.activation``. They are written out because Pallas-Triton lowers neither
erf nor a split, and because the backward pass wants the value and both derivatives from one sigmoid.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jax_moriep.experts.spec import ExpertSpec


def value(gate: jax.Array, up: jax.Array, spec: ExpertSpec) -> jax.Array:
    """act(gate, up)."""
    return with_derivatives(gate, up, spec)[0]


def with_derivatives(
    gate: jax.Array, up: jax.Array, spec: ExpertSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """act(gate, up) and its derivatives by gate and by up."""
    match spec.activation:
        case "silu":
            s = _sigmoid(gate)
            scaled = gate * s
            return scaled * up, (s + scaled * (1 - s)) * up, scaled
        case "gelu":
            density = jnp.exp(-0.5 * gate * gate)
            cdf = _normal_cdf(gate, density)
            scaled = gate * cdf
            return scaled * up, (cdf + gate * density * (1 / math.sqrt(2 * math.pi))) * up, scaled
        case "swiglu_clamped":
            limit, alpha = spec.activation_limit, spec.activation_alpha
            g = jnp.where(gate > limit, limit, gate)
            u = jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up)) + 1
            s = _sigmoid(alpha * g)
            scaled = g * s
            d_gate = jnp.where(gate > limit, 0.0, u * (s + alpha * scaled * (1 - s)))
            # Compared with the limit and not in magnitude: a NaN fails both and keeps its gradient a NaN.
            d_up = jnp.where(up > limit, 0.0, jnp.where(up < -limit, 0.0, scaled))
            return u * scaled, d_gate, d_up
        case _:
            raise AssertionError(f"activation={spec.activation!r} passed the config's validation")


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def _normal_cdf(x: jax.Array, density: jax.Array) -> jax.Array:
    """The normal distribution, by formula 7.1.26 of Abramowitz and Stegun, which errs by at most 1.5e-7.

    Args:
      x: f32.
      density: exp(-x * x / 2), which the formula wants too.
    """
    z = jnp.abs(x) * math.sqrt(0.5)
    t = 1 / (1 + 0.3275911 * z)
    p = 1.061405429
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + coefficient
    tail = 0.5 * p * t * density
    return jnp.where(x < 0, tail, 1 - tail)
