"""Quantised weights have no gradient: whoever asks for one is told so while the program is traced."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import jax

from jax_moriep.errors import ConfigError


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def without_gradient(name: str, weights: jax.Array) -> jax.Array:
    """``weights``, whose derivative may not be asked for.

    Args:
      name: of the field of ``MoEParams``, for the text.
      weights: any dtype.

    Raises:
      ConfigError: when a program that differentiates with respect to them is traced.
    """
    del name
    return weights


@without_gradient.defjvp
def _without_gradient_jvp(name: str, primals: Any, tangents: Any) -> NoReturn:
    # JAX comes here for operands with a tangent only.
    del primals, tangents
    raise ConfigError(
        f"params.{name} is quantised and must not be differentiated; differentiate with respect to x or the "
        "other weights, pass jax.lax.stop_gradient of w1, w2, w1_scale and w2_scale, or train floating "
        "master weights, which expert_quant quantises in every step"
    )
