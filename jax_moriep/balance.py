"""What keeps the load even: the losses of a router, and the bias that needs none. Letters: routing.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, rule
from jax_moriep.routing import Route, divide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """Sums over some tokens of what the losses average; sums over more tokens are the sums of these."""

    scores: jax.Array
    """f32[E], of the scores normalised to 1 per token."""
    z: jax.Array
    """f32[], of the squared logsumexp of the logits."""
    entropy: jax.Array
    """f32[], of the entropy of the normalised scores, in nats."""
    tokens: jax.Array
    """f32[], number of real tokens."""


def router_sums(route: Route, token_mask: jax.Array | None = None) -> RouterSums:
    """Sums over this rank's tokens what ``losses`` needs; add them over ranks (psum) before that.

    Args:
      route: as ``route`` returns it.
      token_mask: bool[...], the leading dimensions of ``route``; False leaves the token out.

    Returns:
      RouterSums, all f32. Tokens that are left out add exactly 0, even where their logits are NaN.
    """
    # Shaped like the logits, not a bare constant, so that inside shard_map it varies over the same axes.
    real = jnp.ones_like(route.logits[..., 0], dtype=bool) if token_mask is None else token_mask
    column = real[..., None]
    axes = tuple(range(real.ndim))
    scores = jnp.where(column, route.scores, 0)
    shares = divide(scores, scores.sum(axis=-1, keepdims=True))
    logs = jnp.log(jnp.where(shares > 0, shares, 1))
    z = jax.nn.logsumexp(jnp.where(column, route.logits, 0), axis=-1)
    return RouterSums(
        scores=shares.sum(axis=axes),
        z=jnp.where(real, z * z, 0).sum(),
        entropy=-(shares * logs).sum(),
        tokens=real.sum(dtype=jnp.float32),
    )


def losses(
    sums: RouterSums, expert_counts: jax.Array, cfg: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The load-balance loss, the router z-loss and the router's entropy.

    * Load balance: ``E * sum_e f_e * p_e`` with f_e the fraction of routes and p_e the mean normalised score
      of expert e (Fedus et al. 2021, arXiv:2101.03961). It is 1.0 when balanced, for every top_k; the
      transformers function of that purpose gives K times as much.
    * z: mean of the squared logsumexp of the logits (Zoph et al. 2022, arXiv:2202.08906).
    * Entropy: mean over tokens of the entropy of the normalised scores, in nats.

    Args:
      sums: over all tokens.
      expert_counts: i32[E], routes per expert over the same tokens, before any drop.
      cfg: gives E and K.

    Returns:
      Three f32 scalars, all 0 when there is no token. Gradients flow through ``sums`` only.
    """
    tokens = jnp.maximum(sums.tokens, 1)
    fractions = expert_counts.astype(jnp.float32) / (tokens * cfg.top_k)
    balance = cfg.num_experts * jnp.sum(fractions * (sums.scores / tokens))
    return balance, sums.z / tokens, sums.entropy / tokens


def update_score_bias(score_bias: jax.Array, expert_counts: jax.Array, rate: float) -> jax.Array:
    """One step of loss-free balancing: a busy expert's bias falls by ``rate``, an idle one's rises.

    The sign rule of Wang et al. 2024 (arXiv:2408.15664), used by DeepSeek-V3. Call it after the optimizer
    step, outside of the gradient.

    Args:
      score_bias: f32[E], or longer where padded; the padding stays as it is.
      expert_counts: i32[E], of the whole batch (``stats.expert_counts``).
      rate: step size; DeepSeek-V3 trained with 0.001.

    Returns:
      The new bias, of score_bias's shape and dtype.

    Raises:
      ConfigError: the bias is shorter than the counts.
    """
    experts = expert_counts.shape[0]
    if score_bias.shape[0] < experts:
        raise ConfigError(
            rule("score_bias.shape", score_bias.shape, f"hold {experts} experts", "pass this layer's bias")
        )
    counts = expert_counts.astype(jnp.float32)
    step = rate * jnp.sign(counts.mean() - counts)
    return score_bias.at[:experts].add(step.astype(score_bias.dtype))
