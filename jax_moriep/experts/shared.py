"""The shared expert: one gated MLP that sees every token, with an optional sigmoid gate on its output."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, rule
from jax_moriep.experts.activation import gated


def shared_mlp(x: jax.Array, params: MoEParams, cfg: MoEConfig) -> jax.Array:
    """``act(x @ shared_w1.T) @ shared_w2.T``, times ``sigmoid(x @ shared_gate)`` with ``cfg.shared_gate``.

    Under tensor parallelism the weights are this rank's part of the intermediate size, and so is the result
    a partial sum; the gate is a factor per token and commutes with the sum over ranks.

    Args:
      x: [T, H].
      params: uses shared_w1 [2*Is, H] (gate rows, then up rows), shared_w2 [H, Is], shared_gate [H, 1].
      cfg: the activation is ``cfg.activation``.

    Returns:
      [T, H] in x's dtype; sums run in f32.

    Raises:
      ConfigError: a weight is missing or has the wrong shape.
    """
    w1, w2 = params.shared_w1, params.shared_w2
    if w1 is None or w2 is None:
        raise ConfigError(
            f"shared_intermediate_size={cfg.shared_intermediate_size!r} needs params.shared_w1 and "
            "params.shared_w2, and one is None; make params with init_params(key, cfg)"
        )
    hidden = x.shape[-1]
    if w1.ndim != 2 or w1.shape[1] != hidden or w1.shape[0] % 2 or w2.shape != (hidden, w1.shape[0] // 2):
        raise ConfigError(
            f"shared_w1.shape={w1.shape} and shared_w2.shape={w2.shape} must be (2*Is, {hidden}) and "
            f"({hidden}, Is) for x.shape={x.shape}; transpose them"
        )
    pre = jnp.einsum("th,ih->ti", x, w1, preferred_element_type=jnp.float32)
    h = gated(pre, cfg.activation, cfg.activation_limit, cfg.activation_alpha).astype(x.dtype)
    y = jnp.einsum("ti,hi->th", h, w2, preferred_element_type=jnp.float32)
    if cfg.shared_gate:
        gate = params.shared_gate
        if gate is None or gate.shape != (hidden, 1):
            shape = None if gate is None else gate.shape
            raise ConfigError(rule("shared_gate.shape", shape, f"be {(hidden, 1)}", "pass [H, 1]"))
        y = y * jax.nn.sigmoid(jnp.einsum("th,hg->tg", x, gate, preferred_element_type=jnp.float32))
    return y.astype(x.dtype)
