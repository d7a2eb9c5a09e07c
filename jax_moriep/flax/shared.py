"""What the nnx and the linen module have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_moriep import params as parameters
from jax_moriep.config import WEIGHT_NAMES, MoEConfig, MoEParams
from jax_moriep.errors import ShardingError
from jax_moriep.runtime.mesh import check_axis


def init_padded(
    key: jax.Array, cfg: MoEConfig, mesh: Any, ep_axis: str, tp_axis: str | None, dtype: Any
) -> MoEParams:
    """Random weights, their experts padded to a multiple of the ranks; sharded too on an Explicit mesh.

    Args:
      key: a PRNG key.
      cfg: the layer.
      mesh: the mesh; None takes the one of ``jax.set_mesh``.
      ep_axis: its expert-parallel axis.
      tp_axis: its tensor-parallel axis, if any.
      dtype: of the weights.

    Raises:
      ShardingError: there is no mesh, or it lacks an axis.
    """
    mesh = _checked_mesh(mesh, ep_axis, tp_axis)
    made = parameters.init_params(key, cfg, dtype)
    return _typed(parameters.pad_params(made, mesh.shape[ep_axis]), cfg, mesh, ep_axis, tp_axis)


def padded(params: MoEParams, cfg: MoEConfig, mesh: Any, ep_axis: str, tp_axis: str | None) -> MoEParams:
    """Given weights, floating or quantised, as ``init_padded`` gives random ones.

    Raises:
      ConfigError: they do not fit ``cfg``.
      ShardingError: there is no mesh, or it lacks an axis.
    """
    mesh = _checked_mesh(mesh, ep_axis, tp_axis)
    parameters.check_params(params, cfg, mesh.shape[ep_axis])
    return _typed(parameters.pad_params(params, mesh.shape[ep_axis]), cfg, mesh, ep_axis, tp_axis)


def param_specs(
    cfg: MoEConfig, ep_axis: str, tp_axis: str | None, params: MoEParams | None = None
) -> MoEParams:
    """``jm.param_specs`` with an entry for every dimension, for Flax adds and removes some when it scans."""
    specs = parameters.param_specs(cfg, ep_axis, tp_axis, params=params)
    quantised = params is not None and is_quantised(params)
    shapes = parameters.param_shapes(cfg, quantised=quantised)

    def full(spec: PartitionSpec | None, shape: tuple[int, ...] | None) -> PartitionSpec | None:
        if spec is None or shape is None:
            return None
        return PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))

    fields = [(name, getattr(specs, name), shapes[name]) for name in WEIGHT_NAMES]
    made: dict[str, Any] = {name: full(spec, shape) for name, spec, shape in fields}
    return MoEParams(**made, layout=specs.layout)


def is_quantised(params: MoEParams) -> bool:
    """Whether the experts are codes, which nothing trains and nothing casts."""
    return params.w1_scale is not None


def cast_experts(params: MoEParams, dtype: Any) -> MoEParams:
    """Casts what the experts compute with; the router's weights keep their precision, routing is in f32."""
    names = ("b1", "b2", "shared_w1", "shared_w2", *(() if is_quantised(params) else ("w1", "w2")))
    held = {name: getattr(params, name) for name in names}
    return dataclasses.replace(params, **{name: w.astype(dtype) for name, w in held.items() if w is not None})


def _checked_mesh(mesh: Any, ep_axis: str, tp_axis: str | None) -> Any:
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ShardingError(
            "mesh=None must find a mesh in context; pass mesh=, or make the module under jax.set_mesh(mesh)"
        )
    check_axis(mesh, ep_axis, "ep_axis")
    if tp_axis is not None:
        check_axis(mesh, tp_axis, "tp_axis")
    return mesh


def _typed(params: MoEParams, cfg: MoEConfig, mesh: Any, ep_axis: str, tp_axis: str | None) -> MoEParams:
    """On an Explicit mesh a sharding is part of an array's type, which linen only checks."""
    if not mesh.are_all_axes_explicit:
        return params
    specs = param_specs(cfg, ep_axis, tp_axis, params)
    return jax.tree.map(lambda w, spec: jax.sharding.reshard(w, NamedSharding(mesh, spec)), params, specs)


def hashable_axes(token_axes: str | Sequence[str] | PartitionSpec | None) -> Any:
    """token_axes in a form that may be part of a module's static description."""
    if token_axes is None or isinstance(token_axes, str | PartitionSpec):
        return token_axes
    return tuple(token_axes)
