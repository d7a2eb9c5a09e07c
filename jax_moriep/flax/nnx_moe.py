"""EpMoE: ``ep_moe`` with its weights held by a Flax nnx module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from jax_moriep import layer as layers
from jax_moriep.balance import update_score_bias
from jax_moriep.config import QUANTISED, WEIGHT_NAMES, MoEConfig, MoEParams, MoEStats
from jax_moriep.errors import ConfigError, rule
from jax_moriep.flax import shared


class ScoreBias(nnx.Variable):
    """The bias that only steers the selection of experts; no ``nnx.Param``, so optimizers leave it alone."""


class FrozenWeight(nnx.Variable):
    """Codes and scales of quantised experts; no ``nnx.Param``, so neither gradients nor optimizers see
    them."""


class EpMoE(nnx.Module):
    """One mixture-of-experts layer, its experts spread over the devices along ``ep_axis``.

    Each weight is an attribute with the name that it has in ``jm.MoEParams``; what the config does not use is
    None. All are ``nnx.Param`` but ``score_bias``, a ``ScoreBias``, and the codes and scales of quantised
    experts, each a ``FrozenWeight``. Their ``out_sharding`` is the spec of ``jm.param_specs``, which
    ``nnx.get_partition_spec`` reads; where E does not divide by the ranks the experts are padded
    (``jm.pad_params``; for checkpoints see ``jm.unpad_params``). On a mesh of several processes, make a
    module of random weights under ``jax.jit`` or ``nnx.jit``, for only a compiled program can make arrays
    that no process holds whole.

    Args:
      cfg: the layer.
      mesh: the mesh; None takes the one of ``jax.set_mesh``, here for the padding and again in every call.
      ep_axis: as in ``jm.ep_moe``.
      tp_axis: as in ``jm.ep_moe``.
      token_axes: as in ``jm.ep_moe``.
      dtype: x and the experts' weights are cast to it; None computes in x's dtype. Routing is in f32 always.
      param_dtype: of random weights.
      rngs: random weights take one key from its stream "params".
      params: weights to hold instead: floating ones are trained, codes with scales are served. What
        ``jm.prepare_params`` gives keeps its layout.

    Raises:
      ConfigError: there are neither ``rngs`` nor ``params``, or ``params`` does not fit ``cfg``.
      ShardingError: there is no mesh, or it lacks an axis.

    Example::

      moe = jm.flax.EpMoE(cfg, mesh=mesh, rngs=nnx.Rngs(0))
      y, stats = moe(x)

      frozen = jm.prepare_params(jm.weights.from_hf(state_dict, family, cfg), cfg, mesh)
      moe = jm.flax.EpMoE(cfg, mesh=mesh, params=frozen)
    """

    router: nnx.Param
    w1: nnx.Param | FrozenWeight
    w2: nnx.Param | FrozenWeight
    router_bias: nnx.Param | None
    score_bias: ScoreBias | None
    b1: nnx.Param | None
    b2: nnx.Param | None
    shared_w1: nnx.Param | None
    shared_w2: nnx.Param | None
    shared_gate: nnx.Param | None
    w1_scale: FrozenWeight | None
    w2_scale: FrozenWeight | None

    def __init__(
        self,
        cfg: MoEConfig,
        *,
        mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
        ep_axis: str = "ep",
        tp_axis: str | None = None,
        token_axes: str | Sequence[str] | PartitionSpec | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
        params: MoEParams | None = None,
    ) -> None:
        self.cfg = cfg
        self.mesh = mesh
        self.ep_axis = ep_axis
        self.tp_axis = tp_axis
        self.token_axes = shared.hashable_axes(token_axes)
        self.dtype = dtype
        if params is not None:
            weights = shared.padded(params, cfg, mesh, ep_axis, tp_axis)
        elif rngs is not None:
            weights = shared.init_padded(rngs.params(), cfg, mesh, ep_axis, tp_axis, param_dtype)
        else:
            raise ConfigError(rule("rngs", None, "be given without params", "pass rngs=nnx.Rngs(0)"))
        self.layout = weights.layout
        specs = shared.param_specs(cfg, ep_axis, tp_axis, weights)
        kinds: dict[str, type[nnx.Variable]] = {"score_bias": ScoreBias}
        if shared.is_quantised(weights):
            kinds |= dict.fromkeys(QUANTISED, FrozenWeight)
        for name in WEIGHT_NAMES:
            value = getattr(weights, name)
            if value is not None:
                kind = kinds.get(name, nnx.Param)
                value = kind(value, out_sharding=getattr(specs, name), mesh=mesh)
            setattr(self, name, value)

    def __call__(
        self,
        x: jax.Array,
        token_mask: jax.Array | None = None,
        *,
        layer: int | jax.Array | None = None,
        stack: MoEParams | None = None,
    ) -> tuple[jax.Array, MoEStats]:
        """Applies the layer; see ``jm.ep_moe``.

        Args:
          x: [..., H].
          token_mask: bool, x's shape without H.
          layer: under ``nnx.scan`` the number of this layer, as in ``jm.ep_moe``.
          stack: all layers' weights, ``moe.weights(dtype)`` of the module that is scanned over, in the dtype
            of the experts' products.

        Returns:
          y like x, in ``dtype``, and the statistics of the call.
        """
        x = x if self.dtype is None else x.astype(self.dtype)
        return layers.ep_moe(
            x,
            shared.cast_experts(self.weights(), x.dtype),
            self.cfg,
            mesh=self.mesh,
            ep_axis=self.ep_axis,
            tp_axis=self.tp_axis,
            token_axes=self.token_axes,
            token_mask=token_mask,
            layer=layer,
            stack=stack,
        )

    def weights(self, dtype: Any = None) -> MoEParams:
        """The weights as ``jm.ep_moe`` takes them; with ``dtype`` the experts' cast to it, as calls do."""
        held: dict[str, Any] = {}
        for name in WEIGHT_NAMES:
            variable = getattr(self, name)
            held[name] = None if variable is None else variable[...]
        weights = MoEParams(**held, layout=self.layout)
        return weights if dtype is None else shared.cast_experts(weights, dtype)

    def update_score_bias(self, expert_counts: jax.Array, rate: float) -> None:
        """Moves ``score_bias`` against the load, by ``jm.update_score_bias``; call it once per training step.

        Args:
          expert_counts: i32[E], of the statistics of the step's call.
          rate: by how much a bias changes.

        Raises:
          ConfigError: the config has no ``score_bias``.
        """
        if self.score_bias is None:
            raise ConfigError(rule("cfg.score_bias", False, "be True", "set it, with a router that uses one"))
        self.score_bias[...] = update_score_bias(self.score_bias[...], expert_counts, rate)
