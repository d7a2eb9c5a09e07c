"""quantize_params and prepare_params: what is done to weights once, ahead of serving."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_moriep import experts, schemes
from jax_moriep import params as parameters
from jax_moriep.config import MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place


def quantize_params(params: MoEParams, cfg: MoEConfig, format: str | None = None) -> MoEParams:
    """The experts' weights as codes and scales of ``cfg.expert_quant``; the other weights stay.

    Args:
      params: floating, or quantised by the scheme already: float8 codes are then brought into ``format``.
      cfg: the layer.
      format: "e4m3fn" or "e4m3fnuz", the float8 of the codes; None: that of the default backend's devices,
        where the weights are quantised already the one they have. ``jm.prepare_params`` knows the mesh's.

    Returns:
      Weights with w1_scale and w2_scale. A layer computes with them what it computes with the floating
      weights under the same ``cfg.expert_quant``, but cannot train them.

    Raises:
      ConfigError: ``cfg.expert_quant`` is None, ``format`` is unknown, or the weights do not fit cfg.
    """
    check_type("params", params, MoEParams, "make it with jm.init_params")
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    scheme = cfg.expert_quant
    if scheme is None:
        raise ConfigError(
            rule("cfg.expert_quant", None, "name the scheme", "set it, see docs/quantisation.md")
        )
    if format is not None and format not in schemes.FORMATS:
        raise ConfigError(rule("format", format, f"be one of {tuple(schemes.FORMATS)}", "pick one or None"))
    if params.layout != "plain":
        raise ConfigError(
            rule("params.layout", params.layout, "be 'plain'", "pass the weights from before prepare_params")
        )
    count = next(iter(getattr(params.w1, "shape", ())), 0)
    parameters.check_params(params, cfg, count if count > cfg.num_experts else 1)
    spec = getattr(getattr(jax.typeof(params.w1), "sharding", None), "spec", ())
    if any(part is not None for part in spec):
        # On an Explicit mesh jax cannot cut a sharded array into blocks.
        raise ConfigError(
            rule(
                "params.w1.sharding",
                spec,
                "be of one device or of a mesh with AxisType.Auto",
                "use jm.prepare_params(params, cfg, mesh), or quantise before the weights are sharded",
            )
        )
    done = {}
    for name, parts in (("w1", 2), ("w2", 1)):
        w, scale = getattr(params, name), getattr(params, f"{name}_scale")
        if scale is None:
            wanted = schemes.FORMATS[format or _default_format()]
            pair = schemes.quantise_weights(w, scheme, schemes.code_dtype(scheme, wanted), parts=parts)
        elif format is None or scheme == "int8_token":
            pair = schemes.Quantised(w, scale)
        else:
            pair = schemes.convert_weights(w, scale, scheme, schemes.FORMATS[format], parts=parts)
        done |= {name: pair.codes, f"{name}_scale": pair.scales}
    return dataclasses.replace(params, **done)


def prepare_params(params: MoEParams, cfg: MoEConfig, mesh: Mesh, *, ep_axis: str = "ep") -> MoEParams:
    """Does ahead what every call would do otherwise: pads the experts to the ranks, quantises them in the
    platform's format, lays them out for the experts' kernels that ``cfg`` gets on the mesh, and shards them.

    For serving: the result has no gradient where ``cfg.expert_quant`` is set.

    Args:
      params: floating, or quantised by ``cfg.expert_quant``; on the host, or anywhere.
      cfg: the layer.
      mesh: the mesh of the calls to come.
      ep_axis: its expert-parallel axis.

    Returns:
      The weights on the mesh, as ``jm.param_specs(cfg, ep_axis, params=result)`` shards them.

    Raises:
      ConfigError: the weights do not fit cfg.
      ShardingError: mesh is no Mesh, or has no such axis.
      TransportError: the experts that cfg names cannot run on the mesh.
    """
    check_type("params", params, MoEParams, "make it with jm.init_params")
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    if not isinstance(mesh, Mesh):
        raise ShardingError(
            rule("mesh", type(mesh).__name__, "be a jax.sharding.Mesh", "pass the mesh itself")
        )
    place = Place.of(mesh, ep_axis)
    layout = experts.layout_of(experts.choose(cfg, place))
    if params.layout not in ("plain", layout):
        raise ConfigError(
            rule(
                "params.layout",
                params.layout,
                f"be {' or '.join(map(repr, dict.fromkeys(('plain', layout))))} here",
                "prepare the plain weights",
            )
        )
    parameters.check_params(params, cfg, place.num_ranks)
    # Each device gets its own experts only, where they divide without padding.
    specs = parameters.param_specs(cfg, ep_axis, params=params)
    if params.w1.shape[0] % place.num_ranks:
        specs = jax.tree.map(lambda _: PartitionSpec(), specs)
    # By a mesh of the same devices whose shardings are no part of types, for blocks are cut out of arrays.
    auto = Mesh(mesh.devices, mesh.axis_names)
    placed = jax.device_put(params, _on(auto, specs))
    prepare = _program(cfg, schemes.format_name(place.architecture), place.num_ranks, layout)
    specs = parameters.param_specs(cfg, ep_axis, params=jax.eval_shape(prepare, params))
    with jax.set_mesh(auto):
        done = _compiled(prepare, _on(auto, specs))(placed)
    return jax.device_put(done, _on(mesh, specs))


# Cached, so that the layers of a model are compiled once.
@functools.lru_cache(maxsize=64)
def _program(cfg: MoEConfig, format: str, num_ranks: int, layout: str) -> Callable[[MoEParams], MoEParams]:
    def prepare(params: MoEParams) -> MoEParams:
        prepared = params.layout != "plain"
        if cfg.expert_quant is not None and not prepared:
            params = quantize_params(params, cfg, format)
        params = parameters.pad_params(params, num_ranks)
        return params if prepared else experts.laid_out(params, cfg, layout)

    return prepare


@functools.lru_cache(maxsize=64)
def _compiled(
    prepare: Callable[[MoEParams], MoEParams], shardings: MoEParams
) -> Callable[[MoEParams], MoEParams]:
    return jax.jit(prepare, out_shardings=shardings)


def _on(mesh: Mesh, specs: MoEParams) -> MoEParams:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _default_format() -> str:
    return schemes.format_name(compat.architecture(jax.local_devices()[0]))
