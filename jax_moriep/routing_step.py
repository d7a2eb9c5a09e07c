"""The routing and its measurements as one step of the layer: in one kernel, or as XLA makes them.

On NVIDIA's GPUs a program that is not differentiated runs the kernel where the tokens are few
(``routing_kernel``). Its derivative is that of ``routing`` and ``stats``, which a program that is
differentiated runs in its place.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_moriep import balance, routing, stats
from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.runtime import compat


class Routed(NamedTuple):
    """Where a rank's tokens go, and what is measured of that."""

    ids: jax.Array
    """i32[T, K]; -1 for tokens that are masked."""
    weights: jax.Array
    """f32[T, K]."""
    words: jax.Array
    """i32[W], see ``stats.as_words``."""
    sums: balance.RouterSums
    """What the losses need, and where their gradients flow."""


def run(
    x: jax.Array, params: MoEParams, cfg: MoEConfig, mask: jax.Array | None, platform: str | None
) -> Routed:
    """Routes a rank's tokens; inside shard_map.

    Args:
      x: [T, H].
      params: with the router's weights.
      cfg: the layer.
      mask: bool[T] or None; where it is False, a token is not routed and counts nowhere.
      platform: of the mesh's devices; None for a mesh without devices.

    Returns:
      The routes and their measurements.
    """
    logits, score_bias = routing.scored(x, params, cfg)
    if platform != "cpu" and (platform is not None or compat.lowers_triton()):
        # Imported on first use, as in ``experts.pallas``.
        from jax_moriep import routing_kernel

        if routing_kernel.unsuited(cfg, x.shape[0]) is None:
            leaves, tree = jax.tree.flatten((logits, score_bias, mask))
            # Outside the custom VJP, so that JAX's transpose of the cast adds the psum that it needs.
            return _of_few(cfg, *jax.tree.unflatten(tree, compat.union_varying(*leaves)))
    return _by_xla(cfg, logits, score_bias, mask)


def given(route: routing.Route, cfg: MoEConfig, mask: jax.Array | None) -> Routed:
    """The same for routes that were chosen elsewhere; ``mask`` as in ``run``."""
    ids = route.ids if mask is None else jnp.where(mask[:, None], route.ids, -1)
    counts, sums = stats.counted(ids, route, mask, cfg)
    return Routed(ids, route.weights, stats.as_words(counts, sums), sums)


def _by_xla(
    cfg: MoEConfig, logits: jax.Array, score_bias: jax.Array | None, mask: jax.Array | None
) -> Routed:
    return given(routing.chosen(logits, score_bias, cfg), cfg, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_few(
    cfg: MoEConfig, logits: jax.Array, score_bias: jax.Array | None, mask: jax.Array | None
) -> Routed:
    from jax_moriep import routing_kernel

    def by_kernel(*operands: Any) -> Routed:
        # jax 0.10.2 forgets over which mesh axes a kernel's results vary.
        results = routing_kernel.routed(cfg, *operands, interpret=False)
        ids, weights, words = (compat.pcast_varying(a, axes) for a in results)
        return Routed(ids, weights, words, routing_kernel.sums_of(words, cfg.num_experts))

    axes = compat.varying_axes(logits)
    by_xla = functools.partial(_by_xla, cfg)
    # No AMD GPU has run the kernel.
    return jax.lax.platform_dependent(logits, score_bias, mask, cuda=by_kernel, default=by_xla)


def _of_few_fwd(
    cfg: MoEConfig, logits: jax.Array, score_bias: jax.Array | None, mask: jax.Array | None
) -> tuple[Routed, Any]:
    def differentiable(logits: jax.Array) -> tuple[Any, Any]:
        routed = _by_xla(cfg, logits, score_bias, mask)
        return (routed.weights, routed.sums), (routed.ids, routed.words)

    (weights, sums), pull, (ids, words) = jax.vjp(differentiable, logits, has_aux=True)
    return Routed(ids, weights, words, sums), pull


def _of_few_bwd(cfg: MoEConfig, pull: Any, cotangents: Routed) -> tuple[Any, None, None]:
    del cfg
    (d_logits,) = pull((cotangents.weights, cotangents.sums))
    return d_logits, None, None


_of_few.defvjp(_of_few_fwd, _of_few_bwd)
