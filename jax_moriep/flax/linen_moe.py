"""LinenEpMoE: ``ep_moe`` with its weights held by a Flax linen module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_moriep import layer as layers
from jax_moriep.balance import update_score_bias
from jax_moriep.config import LAYOUTS, QUANTISED, WEIGHT_NAMES, MoEConfig, MoEParams, MoEStats
from jax_moriep.errors import ConfigError, rule
from jax_moriep.flax import shared

# The collection of quantised experts, by their layout, so that it is never forgotten.
_QUANTISED = {layout: "quantised" if layout == "plain" else f"quantised_{layout}" for layout in LAYOUTS}


class LinenEpMoE(nn.Module):
    """One mixture-of-experts layer, its experts spread over the devices along ``ep_axis``.

    The weights are in the collection "params" under the names that they have in ``jm.MoEParams``, boxed by
    ``nn.with_partitioning`` with the specs of ``jm.param_specs``; where E does not divide by the ranks the
    experts are padded (``jm.pad_params``; for checkpoints see ``jm.unpad_params``). ``score_bias`` is in the
    collection "score_bias", which optimizers do not see; as with BatchNorm, a call for which that collection
    is mutable updates it. Weights that were not made by ``init`` are brought in by ``variables_of``; where
    their experts are quantised, codes and scales are in the collection "quantised", which nothing trains.

    Attributes:
      cfg: the layer.
      mesh: the mesh; None takes the one of ``jax.set_mesh``.
      ep_axis: as in ``jm.ep_moe``.
      tp_axis: as in ``jm.ep_moe``.
      token_axes: as in ``jm.ep_moe``; names as a tuple.
      dtype: x and the experts' weights are cast to it; None computes in x's dtype. Routing is in f32 always.
      param_dtype: of the weights.
      score_bias_rate: by how much a call moves a bias (``jm.update_score_bias``).

    Example::

      moe = jm.flax.LinenEpMoE(cfg, mesh=mesh)
      variables = moe.init(jax.random.key(0), x)
      y, stats = moe.apply(variables, x)

      frozen = jm.prepare_params(jm.weights.from_hf(state_dict, family, cfg), cfg, mesh)
      variables = moe.variables_of(frozen)
    """

    cfg: MoEConfig
    mesh: Any = None
    ep_axis: str = "ep"
    tp_axis: str | None = None
    token_axes: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    score_bias_rate: float = 1e-3

    @nn.compact
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
          layer: under ``nn.scan`` the number of this layer, as in ``jm.ep_moe``.
          stack: all layers' weights, those of the scanned variables, the experts' in the dtype of their
            products.

        Returns:
          y like x, in ``dtype``, and the statistics of the call.
        """
        specs = shared.param_specs(self.cfg, self.ep_axis, self.tp_axis)
        held: dict[str, Any] = dict.fromkeys(WEIGHT_NAMES)
        layout = self._read_quantised(held)
        for name in held:
            spec = getattr(specs, name)
            if spec is not None and name != "score_bias" and held[name] is None:
                init = nn.with_partitioning(self._initializer(name), tuple(spec), self.mesh)
                held[name] = self.param(name, init)
        bias = None
        if self.cfg.score_bias:
            bias = self.variable("score_bias", "score_bias", jnp.zeros, (self.cfg.num_experts,), jnp.float32)
            held["score_bias"] = bias.value

        x = x if self.dtype is None else x.astype(self.dtype)
        y, stats = layers.ep_moe(
            x,
            shared.cast_experts(MoEParams(**held, layout=layout), x.dtype),
            self.cfg,
            mesh=self.mesh,
            ep_axis=self.ep_axis,
            tp_axis=self.tp_axis,
            token_axes=self.token_axes,
            token_mask=token_mask,
            layer=layer,
            stack=stack,
        )
        if bias is not None and self.is_mutable_collection("score_bias") and not self.is_initializing():
            bias.value = update_score_bias(bias.value, stats.expert_counts, self.score_bias_rate)
        return y, stats

    def variables_of(self, params: MoEParams) -> dict[str, Any]:
        """Variables that hold given weights, boxed as those of ``init``.

        Args:
          params: floating, or quantised (``jm.quantize_params``, ``jm.prepare_params``,
            ``jm.weights.from_hf``); what is laid out for AITER's kernels stays so.

        Returns:
          "params", and as the weights have them "score_bias" and "quantised" ("quantised_aiter" in AITER's
          layout), for ``apply``.

        Raises:
          ConfigError: the weights do not fit ``cfg``.
          ShardingError: there is no mesh, or it lacks an axis.
        """
        params = shared.padded(params, self.cfg, self.mesh, self.ep_axis, self.tp_axis)
        specs = shared.param_specs(self.cfg, self.ep_axis, self.tp_axis, params)
        collections = {"score_bias": "score_bias"}
        if shared.is_quantised(params):
            collections |= dict.fromkeys(QUANTISED, _QUANTISED[params.layout])
        variables: dict[str, Any] = {}
        for name in WEIGHT_NAMES:
            value, spec = getattr(params, name), getattr(specs, name)
            if value is not None:
                boxed = value if name == "score_bias" else nn.Partitioned(value, tuple(spec), self.mesh)
                variables.setdefault(collections.get(name, "params"), {})[name] = boxed
        return variables

    def _read_quantised(self, held: dict[str, Any]) -> str:
        """Fills in codes and scales, if they are what was given, and says how they lie."""
        found = [layout for layout, name in _QUANTISED.items() if self.has_variable(name, "w1")]
        if not found:
            return "plain"
        given = [_QUANTISED[layout] for layout in found]
        given += ["params"] if self.has_variable("params", "w1") else []
        if len(given) > 1:
            raise ConfigError(rule("w1", given, "be in one collection", "pass what variables_of gave"))
        for name in QUANTISED:
            held[name] = self.variable(given[0], name).value
        return found[0]

    def _initializer(self, name: str) -> Any:
        def init(key: jax.Array) -> jax.Array:
            made = shared.init_padded(key, self.cfg, self.mesh, self.ep_axis, self.tp_axis, self.param_dtype)
            return getattr(made, name)

        return init
