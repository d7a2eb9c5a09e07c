"""The weights of a layer: making them, padding them, and how they lie on a mesh; tensor parallelism."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moriep import schemes
from jax_moriep.config import LAYOUTS, PER_EXPERT, WEIGHT_NAMES, MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.experts.spec import Stack
from jax_moriep.experts.stacks import in_front, readable, stack_specs
from jax_moriep.layout import Layout, axes_of
from jax_moriep.operands import check_array
from jax_moriep.plan import experts_per_rank


def param_shapes(cfg: MoEConfig, *, quantised: bool = False) -> dict[str, tuple[int, ...] | None]:
    """The shape of every weight, by its name in MoEParams; None for what the config does not use.

    Args:
      cfg: the layer.
      quantised: with scales.
    """
    experts, hidden, inner, shared = (
        cfg.num_experts,
        cfg.hidden_size,
        cfg.intermediate_size,
        cfg.shared_intermediate_size,
    )
    scales = (None, None)
    if quantised and cfg.expert_quant is not None:
        scales = schemes.scale_shapes(cfg.expert_quant, experts, hidden, inner)
    return {
        "router": (hidden, experts),
        "w1": (experts, 2 * inner, hidden),
        "w2": (experts, hidden, inner),
        "router_bias": (experts,) if cfg.router_bias else None,
        "score_bias": (experts,) if cfg.score_bias else None,
        "b1": (experts, 2 * inner) if cfg.expert_bias else None,
        "b2": (experts, hidden) if cfg.expert_bias else None,
        "shared_w1": (2 * shared, hidden) if shared else None,
        "shared_w2": (hidden, shared) if shared else None,
        "shared_gate": (hidden, 1) if cfg.shared_gate else None,
        "w1_scale": scales[0],
        "w2_scale": scales[1],
    }


def init_params(key: jax.Array, cfg: MoEConfig, dtype: Any = jnp.float32) -> MoEParams:
    """Random weights: normal with variance 1 / fan-in, zero biases.

    Args:
      key: a PRNG key.
      cfg: the layer.
      dtype: of the weights; ``score_bias`` is float32 always.

    Returns:
      The weights.

    Raises:
      ConfigError: ``cfg`` is no config, or ``dtype`` is not floating.
    """
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    try:
        floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ConfigError(rule("dtype", dtype, "be a floating dtype", "pass jnp.float32 or jnp.bfloat16"))
    shapes = param_shapes(cfg)
    fan_in = {
        "router": cfg.hidden_size,
        "w1": cfg.hidden_size,
        "w2": cfg.intermediate_size,
        "shared_w1": cfg.hidden_size,
        "shared_w2": cfg.shared_intermediate_size or 1,
        "shared_gate": cfg.hidden_size,
    }
    weights: dict[str, Any] = {}
    for i, name in enumerate(WEIGHT_NAMES):
        shape = shapes[name]
        if shape is None:
            weights[name] = None
        elif name in fan_in:
            values = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
            weights[name] = (values * fan_in[name] ** -0.5).astype(dtype)
        else:
            weights[name] = jnp.zeros(shape, jnp.float32 if name == "score_bias" else dtype)
    return MoEParams(**weights)


def param_specs(
    cfg: MoEConfig, ep_axis: str = "ep", tp_axis: str | None = None, *, params: MoEParams | None = None
) -> MoEParams:
    """How the weights are sharded: experts over ``ep_axis``, the rest replicated.

    With ``tp_axis`` the hidden dimension of w1 and of the shared w1, and the intermediate dimension of w2 and
    of the shared w2 are split over it. (A contiguous split of w1's 2*I rows would part gates from their ups.)

    ``jax.device_put`` by these specs refuses an E that the axis does not divide; ``jm.pad_params(params, R)``
    first makes one that it does, and ``jm.prepare_params`` pads and places in one.

    Args:
      cfg: the layer.
      ep_axis: the expert-parallel mesh axis.
      tp_axis: the tensor-parallel mesh axis, if any.
      params: the weights that the specs are for, if their experts may be quantised, which have scales too,
        or if they are stacked layers, whose first dimension is then not split.

    Returns:
      A MoEParams of PartitionSpecs, None where there is no weight.

    Raises:
      ConfigError: ``cfg`` is no config, or ``params`` no MoEParams.
    """
    check_type("cfg", cfg, MoEConfig, "pass the layer's config")
    if params is not None:
        check_type("params", params, MoEParams, "make it with jm.init_params")
    by_block = cfg.expert_quant == "fp8_block"
    specs: dict[str, Any] = {
        "router": P(),
        "w1": P(ep_axis, None, tp_axis),
        "w2": P(ep_axis, None, tp_axis),
        "router_bias": P(),
        "score_bias": P(),
        "b1": P(ep_axis, None),
        "b2": P(ep_axis, None),
        "shared_w1": P(None, tp_axis),
        "shared_w2": P(None, tp_axis),
        "shared_gate": P(),
        # A scale for a whole row of weights belongs to all parts of the row.
        "w1_scale": P(ep_axis, None, tp_axis) if by_block else P(ep_axis, None),
        "w2_scale": P(ep_axis, None, tp_axis) if by_block else P(ep_axis, None),
    }
    shapes = param_shapes(cfg, quantised=params is not None and params.w1_scale is not None)
    used: dict[str, Any] = {name: spec if shapes[name] else None for name, spec in specs.items()}
    one = MoEParams(**used, layout="plain" if params is None else params.layout)
    return one if params is None or _num_leading(params) == 0 else in_front(one)


def _num_leading(params: MoEParams) -> int:
    """How many dimensions weights have in front: one if they are stacked layers. Parts of a layer may be left
    out, as of a checkpoint that is being read."""
    return 0 if params.router is None else len(params.router.shape) - 2


def pad_params(params: MoEParams, num_ranks: int) -> MoEParams:
    """Pads the experts with zeros to a multiple of ``num_ranks``, so that they can be sharded over it.

    The router keeps its E columns, so nothing is routed to the padding. ``ep_moe`` does this on the way when
    E is not divisible; doing it once, ahead, saves the copy in every step. What another number of ranks was
    padded for is padded anew.

    Args:
      params: weights of E experts, or of a padded number of experts; of one layer or of stacked ones.
      num_ranks: R.

    Returns:
      Weights whose expert dimension is ``R * ceil(E / R)``.

    Raises:
      ConfigError: ``params`` is no MoEParams, or ``num_ranks`` is not a positive integer.
    """
    check_type("params", params, MoEParams, "make it with jm.init_params")
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, numbers.Integral) or num_ranks < 1:
        cure = "pass the size of the expert-parallel mesh axis, mesh.shape['ep']"
        raise ConfigError(rule("num_ranks", num_ranks, "be a positive integer", cure))
    padded = int(num_ranks) * experts_per_rank(params.router.shape[-1], int(num_ranks))

    axis = _num_leading(params)

    def pad(w: Any) -> Any:
        if w is None or w.shape[axis] == padded:
            return w
        w = lax.slice_in_dim(w, 0, min(padded, w.shape[axis]), axis=axis)
        widths = [(0, 0)] * w.ndim
        widths[axis] = (0, padded - w.shape[axis])
        return jnp.pad(w, widths)

    return dataclasses.replace(params, **{name: pad(getattr(params, name)) for name in PER_EXPERT})


def check_params(params: MoEParams, cfg: MoEConfig, num_ranks: int) -> None:
    """Raises ConfigError unless every weight has the shape and a dtype that the config gives it.

    Args:
      params: weights of E experts, or of the padded number of experts.
      cfg: the layer.
      num_ranks: R.
    """
    check_type("params", params, MoEParams, "make it with jm.init_params")
    if params.layout not in LAYOUTS:
        raise ConfigError(
            rule("params.layout", params.layout, f"be one of {LAYOUTS}", "take what jm.prepare_params gives")
        )
    for name in WEIGHT_NAMES:
        if getattr(params, name) is not None:
            check_array(f"params.{name}", getattr(params, name), "pass the weights themselves")
    padded = num_ranks * experts_per_rank(cfg.num_experts, num_ranks)
    quantised = params.w1 is not None and schemes.is_codes(params.w1.dtype)
    schemes.check_weights(params, cfg)
    shapes = param_shapes(cfg, quantised=quantised)
    for name in WEIGHT_NAMES:
        want, got = shapes[name], getattr(params, name)
        if (want is None) != (got is None):
            raise ConfigError(
                rule(
                    f"params.{name}",
                    None if got is None else tuple(got.shape),
                    f"be {'absent' if want is None else want} for this config",
                    "make params and config agree",
                )
            )
        if want is None:
            continue
        allowed = [want]
        if name in PER_EXPERT:
            allowed.append((padded, *want[1:]))
        either = " or ".join(map(str, dict.fromkeys(allowed)))
        fits = tuple(got.shape) in allowed
        if not fits and name in PER_EXPERT and got.shape[1:] == want[1:] and got.shape[0] > want[0]:
            raise ConfigError(
                rule(
                    f"params.{name}.shape",
                    tuple(got.shape),
                    f"be {either} on {num_ranks} ranks, and is padded for another number of them",
                    f"pass the weights through jm.pad_params(params, {num_ranks}); for a whole "
                    "state there are jm.unpad_params and jm.pad_like",
                )
            )
        if not fits:
            raise ConfigError(
                rule(
                    f"params.{name}.shape",
                    tuple(got.shape),
                    f"be {either}",
                    "make params and config agree",
                )
            )
        if not (jnp.issubdtype(got.dtype, jnp.floating) or quantised and name in ("w1", "w2")):
            raise ConfigError(rule(f"params.{name}.dtype", str(got.dtype), "be floating", "cast it"))
    counts = {name: getattr(params, name).shape[0] for name in PER_EXPERT if shapes[name]}
    for name, count in counts.items():
        if count != counts["w1"]:
            raise ConfigError(
                rule(
                    f"params.{name}.shape[0]",
                    count,
                    f"be {counts['w1']}, as many experts as w1 has",
                    f"pad them alike, by jm.pad_params(params, {num_ranks})",
                )
            )


def check_split(params: MoEParams, cfg: MoEConfig, tp_axis: str, size: int) -> None:
    """Raises ShardingError unless the experts can be split over the devices of a tensor-parallel axis."""
    if params.layout != "plain":
        cure = "prepare the weights for experts='triton' or 'blocked', or drop tp_axis"
        raise ShardingError(
            rule("params.layout", params.layout, f"be 'plain' with tp_axis={tp_axis!r}", cure)
        )
    by_block = params.w1_scale is not None and cfg.expert_quant == "fp8_block"
    unit = size * schemes.BLOCK if by_block else size
    for name in ("hidden_size", "intermediate_size", "shared_intermediate_size"):
        value = getattr(cfg, name)
        whole = size if name.startswith("shared") else unit
        if value is not None and value % whole:
            blocks = "" if whole == size else f" times {schemes.BLOCK}, the side of a block of weights,"
            must = f"be divisible by the {size} devices of tp_axis={tp_axis!r}{blocks}"
            raise ShardingError(rule(name, value, must.rstrip(","), "change one"))


def placed(
    params: MoEParams, cfg: MoEConfig, layout: Layout, mesh: jax.sharding.Mesh | AbstractMesh
) -> MoEParams:
    """The weights as a layer takes them: padded, and on an Explicit mesh sharded by ``param_specs``.

    Raises:
      ShardingError: on an Explicit mesh weights that need no padding lie otherwise.
    """
    padded = pad_params(params, layout.num_ranks)
    if not layout.explicit:
        return padded
    specs = param_specs(cfg, layout.ep_axis, layout.tp_axis, params=params)
    done: dict[str, Any] = {"layout": params.layout}
    for name in WEIGHT_NAMES:
        spec, value = getattr(specs, name), getattr(padded, name)
        if value is None:
            done[name] = None
        elif value is not getattr(params, name):
            done[name] = jax.sharding.reshard(value, NamedSharding(mesh, spec))
        else:
            done[name] = _as_specified(f"params.{name}", value, spec, layout, mesh)
    return MoEParams(**done)


def placed_stack(
    stack: Stack | None,
    params: MoEParams,
    cfg: MoEConfig,
    layout: Layout,
    mesh: jax.sharding.Mesh | AbstractMesh,
) -> Stack | None:
    """A stack as a layer takes it, if the layer's experts can be read in it as they lie; else None.

    Raises:
      ShardingError: on an Explicit mesh it lies otherwise than by ``param_specs``.
    """
    whole = layout.tp_axis is None
    stack = readable(stack, params, num_ranks=layout.num_ranks, whole=whole)
    if stack is None or not layout.explicit:
        return stack
    specs = stack_specs(param_specs(cfg, layout.ep_axis, params=params)).weights
    placed: dict[str, Any] = {}
    for name in PER_EXPERT:
        value, spec = getattr(stack.weights, name), getattr(specs, name)
        if value is not None:
            placed[name] = _as_specified(f"stack.{name}", value, spec, layout, mesh)
    return stack._replace(weights=stack.weights._replace(**placed))


def _as_specified(
    name: str, value: jax.Array, spec: P, layout: Layout, mesh: jax.sharding.Mesh | AbstractMesh
) -> jax.Array:
    """An array on an Explicit mesh whose sharding must be the spec, but for axes of one device."""
    got = jax.typeof(value).sharding.spec
    if _trim(got, layout) != _trim(spec, layout):
        cure = "place the weights with jax.device_put or jax.sharding.reshard by jm.param_specs"
        raise ShardingError(rule(f"{name}.sharding", got, f"be {spec}", cure))
    # Free: they differ by axes of one device at most.
    return jax.sharding.reshard(value, NamedSharding(mesh, spec))


def _trim(spec: P, layout: Layout) -> tuple[Any, ...]:
    """A spec without what says nothing: axes of one device, and trailing Nones."""
    parts: list[Any] = []
    for part in spec:
        split = tuple(axis for axis in axes_of(P(part)) if layout.mesh_shape[axis] > 1)
        parts.append(split or None)
    while parts and parts[-1] is None:
        parts.pop()
    return tuple(parts)


def tp_part(params: MoEParams, cfg: MoEConfig, layout: Layout) -> MoEParams:
    """This tensor-parallel rank's part of the experts: I / tp gates, their ups, their columns of w2.

    Inside shard_map; where there is no tensor-parallel axis, the weights as they are.
    """
    axis = layout.tp_axis
    if axis is None:
        return params
    by_block = cfg.expert_quant == "fp8_block"
    size, index = layout.mesh_shape[axis], lax.axis_index(axis)

    def rows_for_hidden(w: jax.Array) -> jax.Array:
        """[.., 2*I, H/tp] -> [.., 2*I/tp, H]: trades the split of H for one that keeps gate by up."""
        inner = w.shape[-2] // 2
        halves = w.reshape(*w.shape[:-2], 2, inner, w.shape[-1])
        halves = lax.all_to_all(halves, axis, halves.ndim - 2, halves.ndim - 1, tiled=True)
        return halves.reshape(*w.shape[:-2], 2 * (inner // size), w.shape[-1] * size)

    def slice_b1(b1: jax.Array) -> jax.Array:
        inner = b1.shape[-1] // 2
        halves = b1.reshape(*b1.shape[:-1], 2, inner)
        part = lax.dynamic_slice_in_dim(halves, index * (inner // size), inner // size, -1)
        return part.reshape(*b1.shape[:-1], 2 * (inner // size))

    def once(b2: jax.Array) -> jax.Array:
        return jnp.where(index == 0, b2, 0)  # the ranks' outputs are added, a bias must be in one of them

    def apply(fn: Any, value: Any) -> Any:
        return None if value is None else fn(value)

    return dataclasses.replace(
        params,
        w1=rows_for_hidden(params.w1),
        b1=apply(slice_b1, params.b1),
        b2=apply(once, params.b2),
        w1_scale=apply(rows_for_hidden if by_block else slice_b1, params.w1_scale),
        shared_w1=apply(rows_for_hidden, params.shared_w1),
    )
