"""One layer of a stack: weights with a dimension for the layers in front, as a scan over layers has them.

XLA hands a custom call whole arrays. Cut out of a stack, a layer's weights are copied in front of every
kernel, in both passes; so kernels get the stack and the layer's number, and gradients go to the layer's own
weights, whose values nobody reads, so that XLA never cuts them out.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.config import PER_EXPERT, WEIGHT_NAMES, MoEParams, check_type
from jax_moriep.errors import ConfigError, rule
from jax_moriep.experts.spec import ExpertWeights, Stack
from jax_moriep.operands import check_array


def of_layer(params: MoEParams, layer: Any, stack: MoEParams | None) -> tuple[MoEParams, Stack | None]:
    """The weights of one layer, and where an implementation may read its experts.

    Args:
      params: of the layer; or without ``stack`` of all layers.
      layer: which; None: there is no stack.
      stack: of all layers, where ``params`` are what a scan cut out of it.

    Returns:
      The layer's own weights, which get the gradients, and the experts of all layers, which get none.

    Raises:
      ConfigError: as for ``ep_moe``.
    """
    if layer is None:
        if stack is not None:
            cure = "pass the layer's number, or drop stack"
            raise ConfigError(rule("layer", None, "be given with stack", cure))
        return params, None
    name, whole = ("params", params) if stack is None else ("stack", stack)
    check_type(name, whole, MoEParams, "stack those of jm.init_params, by jax.vmap or by jnp.stack")
    index = _index(layer, _num_layers(name, whole))
    if stack is None:
        params = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, index, keepdims=False), whole)
    else:
        _check_same(params, stack)
    read = {name: getattr(whole, name) for name in PER_EXPERT}
    return params, Stack(ExpertWeights(**lax.stop_gradient(read)), index)


def _num_layers(argument: str, whole: MoEParams) -> int:
    """N, which all weights must have in front."""
    ranks = {"router": 3, "w1": 4, "w2": 4}
    num_layers = None
    for name in WEIGHT_NAMES:
        if getattr(whole, name) is None and name not in ranks:
            continue
        value, where = getattr(whole, name), f"{argument}.{name}"
        check_array(where, value, "pass the weights themselves")
        shape = jnp.shape(value)
        if len(shape) != ranks.get(name, len(shape)) or not shape or shape[0] == 0:
            must = f"have {ranks.get(name, 2)} dimensions with layer=, the layers first and at least one"
            cure = "stack the layers' weights, or drop layer"
            raise ConfigError(rule(f"{where}.shape", shape, must, cure))
        if num_layers not in (None, shape[0]):
            must = f"begin with {num_layers}, as many layers as the router has"
            raise ConfigError(rule(f"{where}.shape", shape, must, "stack the same layers"))
        num_layers = shape[0]
    assert num_layers is not None
    return num_layers


def _index(layer: Any, num_layers: int) -> jax.Array:
    """i32[] in range: what is traced is clamped, as jax's own slices are."""
    must, cure = f"be an integer in 0..{num_layers - 1}", "count the stack's layers from 0"
    if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
        number = int(layer)
        if not 0 <= number < num_layers:
            raise ConfigError(rule("layer", number, must, cure))
        return jnp.asarray(number, jnp.int32)
    dtype = getattr(layer, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or layer.shape != ():
        shown = layer if dtype is None else f"{dtype}{list(layer.shape)}"
        raise ConfigError(rule("layer", shown, must, "pass an int, or a scalar of integers"))
    return jnp.clip(jnp.asarray(layer), 0, num_layers - 1).astype(jnp.int32)


def _check_same(params: MoEParams, stack: MoEParams) -> None:
    """Raises ConfigError unless params may be one layer of the stack."""
    check_type("params", params, MoEParams, "pass the slice of the stack that the scan gives its body")
    for name in WEIGHT_NAMES:
        one, whole = (_described(getattr(tree, name)) for tree in (params, stack))
        if one != (None if whole is None else (whole[0][1:], whole[1])):
            must = f"be one layer of stack.{name}={whole}"
            cure = "pass what the scan over the stack gives its body, or without stack= the stack alone"
            raise ConfigError(rule(f"params.{name}", one, must, cure))
    if params.layout != stack.layout:
        raise ConfigError(
            rule("params.layout", params.layout, f"be stack's, {stack.layout!r}", "prepare both")
        )


def _described(value: Any) -> tuple[tuple[int, ...], str] | None:
    return None if value is None else (tuple(value.shape), str(value.dtype))


def readable(stack: Stack | None, params: MoEParams, *, num_ranks: int, whole: bool) -> Stack | None:
    """The stack, if kernels can read a layer's experts in it as they lie; None if the layer's own are read.

    Args:
      stack: of a layer, or None.
      params: the layer's own weights.
      num_ranks: R; experts that have to be padded on the way are copied whatever is done.
      whole: each device has all of its experts; tensor parallelism rearranges w1 on the way.
    """
    if stack is None or params.layout != "plain" or not whole or params.w1.shape[0] % num_ranks:
        return None
    return stack


def stack_specs(specs: MoEParams) -> Stack:
    """How a stack lies on a mesh, by the specs of one layer: every device has its experts of all layers."""
    spec = jax.sharding.PartitionSpec
    per_expert = {name: getattr(specs, name) for name in PER_EXPERT}
    fields = {name: None if of is None else spec(None, *of) for name, of in per_expert.items()}
    return Stack(ExpertWeights(**fields), spec())


def in_front(specs: MoEParams) -> MoEParams:
    """Specs of a stack's weights, by those of one layer."""
    spec = jax.sharding.PartitionSpec
    fields = {name: getattr(specs, name) for name in WEIGHT_NAMES}
    done = {name: None if of is None else spec(None, *of) for name, of in fields.items()}
    return dataclasses.replace(specs, **done)
