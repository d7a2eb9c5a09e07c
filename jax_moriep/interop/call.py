"""dlpack_call: a Python function on DLPack tensors as an operation of a JAX program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.errors import ConfigError, ShardingError, rule
from jax_moriep.interop import dtypes, registry, runner
from jax_moriep.runtime import compat, targets
from jax_moriep.runtime.unbatched import unbatched

_NO_VMAP = (
    "vmap over dlpack_call must not be, because the function takes arrays of the shapes that it was traced "
    "with; give the arrays a leading dimension and let the function work on all of it, or use jax.lax.map"
)


def dlpack_call(
    fn: Callable[..., Any], result_shapes: Any, vjp: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Makes a Python function on DLPack tensors callable in JAX programs, also in jit, grad and shard_map.

    ``fn(*inputs, *outputs)`` gets one ``Tensor`` for each array and, behind them, one for each result. Each
    is XLA's own buffer: ``torch.from_dlpack``, ``cupy.from_dlpack``, ``np.from_dlpack`` and ``np.asarray``
    make views of it without a copy. The function writes every element of each output, must not write an
    input, and keeps no view; what it returns is ignored. On a GPU it runs while XLA's stream is current in
    torch and CuPy, and only enqueues work there. docs/interop.md says what else to know. ::

        def add(x, y, out):
            torch.add(torch.from_dlpack(x), torch.from_dlpack(y), out=torch.from_dlpack(out))

        z = jm.interop.dlpack_call(add, jax.ShapeDtypeStruct(x.shape, x.dtype))(x, y)

    XLA may leave out a call whose results nobody uses, merge two that are alike, and run calls without a data
    path between them in any order, so the function must be pure. Pass one that is defined once: it is kept
    for the life of the process, and a new closure in each trace is a new function.

    Args:
      fn: the function.
      result_shapes: a pytree of ``jax.ShapeDtypeStruct``, the results; their order as outputs is that of
        ``jax.tree.leaves``.
      vjp: the function that makes the call differentiable in reverse mode, called as
        ``vjp(*inputs, *output_cotangents, *input_cotangents)``; it writes the last. Integer and bool arrays
        have no cotangent and none is passed.

    Returns:
      A function of the input arrays that gives results in the structure of ``result_shapes``.

    Raises:
      ConfigError: an argument breaks a rule; so do, when the result is called, arrays of an unsupported
        dtype, ``jax.vmap``, and differentiation without ``vjp``.
      ShardingError: when the result is called, an array is split over a mesh outside shard_map.
      LibraryError: the native library is missing or does not fit.
      jax.errors.JaxRuntimeError: when the program runs, fn raised; the text has its exception and traceback.
    """
    _check_function("fn", fn)
    if vjp is not None:
        _check_function("vjp", vjp)
    results, structure = _check_results(result_shapes)
    runner.start()
    name = registry.name_of(fn)
    vjp_name = None if vjp is None else registry.name_of(vjp)

    @jax.custom_vjp
    def differentiable(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _emit(name, results, operands)

    def forward(*operands: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        if vjp_name is None:
            raise ConfigError(
                rule(
                    "vjp",
                    None,
                    f"be a function for {name} to be differentiated",
                    "pass dlpack_call(..., vjp=...), or stop the gradient with jax.lax.stop_gradient",
                )
            )
        return _emit(name, results, operands), operands

    def backward(operands: tuple[jax.Array, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        assert vjp_name is not None
        given = [c for c, r in zip(cotangents, results, strict=True) if _is_inexact(r.dtype)]
        wanted = [x for x in operands if _is_inexact(x.dtype)]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in wanted]
        gradients = iter(_emit(vjp_name, shapes, compat.union_varying(*operands, *given)))
        return tuple(next(gradients) if _is_inexact(x.dtype) else None for x in operands)

    differentiable.defvjp(forward, backward)

    def call(*arrays: Any) -> Any:
        operands = compat.union_varying(*(_operand(i, x) for i, x in enumerate(arrays)))
        return jax.tree.unflatten(structure, differentiable(*operands))

    return call


def _emit(name: str, results: list[Any], operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    operands = tuple(unbatched(x, _NO_VMAP) for x in operands)
    like = operands[0] if operands else jnp.zeros(())
    types = tuple(compat.result_type(like, r.shape, r.dtype) for r in results)
    return targets.call_function(name, types, *operands)


def _is_inexact(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.inexact)


def _check_function(argument: str, value: Any) -> None:
    if not callable(value):
        raise ConfigError(
            rule(
                argument,
                value,
                "be a function of DLPack tensors",
                "pass one that writes its last arguments",
            )
        )


def _check_results(result_shapes: Any) -> tuple[list[Any], Any]:
    leaves, structure = jax.tree.flatten(result_shapes)
    if not leaves:
        raise ConfigError(
            rule(
                "result_shapes",
                result_shapes,
                "have at least one result",
                "name one, for XLA leaves out a call without",
            )
        )
    for leaf in leaves:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            raise ConfigError(
                rule(
                    "result_shapes",
                    leaf,
                    "be a pytree of jax.ShapeDtypeStruct",
                    "write jax.ShapeDtypeStruct(shape, dtype)",
                )
            )
        if not all(isinstance(size, int) for size in leaf.shape):
            raise ConfigError(
                rule("result_shapes.shape", leaf.shape, "be of integers", "trace with sizes that are known")
            )
        _check_dtype("result_shapes.dtype", leaf.dtype)
        if jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
            raise ConfigError(
                rule(
                    "result_shapes.dtype",
                    leaf.dtype.name,
                    "be of 32 bits or less",
                    'call jax.config.update("jax_enable_x64", True) first',
                )
            )
    return leaves, structure


def _check_dtype(argument: str, dtype: Any) -> None:
    if not dtypes.supported(dtype):
        raise ConfigError(
            rule(
                argument,
                str(dtype),
                "be a dtype that DLPack has in whole bytes",
                f"cast to one of {', '.join(dtypes.CODES)}",
            )
        )


def _operand(index: int, value: Any) -> jax.Array:
    x = jnp.asarray(value)
    _check_dtype(f"arrays[{index}].dtype", x.dtype)
    spec = jax.typeof(x).sharding.spec
    if any(axes is not None for axes in spec):
        raise ShardingError(
            rule(
                f"arrays[{index}].sharding",
                str(spec),
                "not split the array, of which the function would see all",
                "call dlpack_call in a jax.shard_map, where it sees each device's part",
            )
        )
    return x
