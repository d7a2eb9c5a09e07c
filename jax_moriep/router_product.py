"""The product that makes a router's logits: exact terms, also where a GPU's matrix unit multiplies them.

A router decides by small differences, so its logits are sums of exact terms in f32. As a product of f32
values that costs a GPU most of a millisecond, for its matrix unit rounds f32 operands to TF32 and exact
products of them run without it. But a product of two bf16 values is exact in f32, and an f32 value is the
exact sum of three bf16 values, of 8 bits each: so the matrix unit multiplies **parts**, and adds in f32.

How many parts an f32 operand gets depends on what the result is rounded to:

=================  =====  ==========================================================
result             parts  error of a term, over its magnitude
=================  =====  ==========================================================
f32                3      0
bf16               2      2^-16 for each f32 operand, 1/128 of the result's rounding
=================  =====  ==========================================================

To that comes the order of the f32 sums, as with every product; on an H200 sums of 7168 terms were off by
4.5e-6 of the largest, and by 1.2e-6 as a product of f32 values. Of an f32 value what is below bf16's least
positive value, 9.2e-41, is lost. An infinity or NaN gives what it gives in f32, but for a gradient by tokens:
that is NaN where it might be an infinity.

So it is on NVIDIA's GPUs. CPUs have no such unit, AMD's multiply f32 values too, and what theirs does with
subnormal bf16 values has not been tested: there the operands are f32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_moriep.runtime import compat

_LOW = jnp.dtype(jnp.bfloat16)
_product = Primitive("moriep_router_product")


def product(x: jax.Array, weights: jax.Array) -> jax.Array:
    """``x @ weights`` in f32.

    Differentiable as every product is: in both modes, and more than once.

    Args:
      x: [..., H], floating.
      weights: [H, E], floating.

    Returns:
      f32[..., E]. Terms are exact; sums are f32.
    """
    suits = x.dtype == _LOW and weights.dtype in (_LOW, jnp.float32)
    # Of shardings that are part of a type, a product of JAX's own knows what its derivatives have.
    if not suits or _sharded_by_type(x) or _sharded_by_type(weights):
        x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
        return jnp.dot(x, weights, precision=lax.Precision.HIGHEST)
    rows, weights = compat.union_varying(x.reshape(-1, x.shape[-1]), weights)
    logits = _bind(rows, weights, (1, 0), jnp.float32)
    return logits.reshape(*x.shape[:-1], weights.shape[1])


def _sharded_by_type(x: jax.Array) -> bool:
    return any(axes is not None for axes in jax.typeof(x).sharding.spec)


def _bind(a: jax.Array, b: jax.Array, summed: tuple[int, int], dtype: Any) -> jax.Array:
    return _product.bind(a, b, summed=summed, dtype=jnp.dtype(dtype))


def in_f32(a: jax.Array, b: jax.Array, *, summed: tuple[int, int], dtype: Any) -> jax.Array:
    """The product of two matrices as one of f32 values.

    Args:
      a: a matrix.
      b: another.
      summed: the dimension of each that the sums are over; the result has a's other one, then b's.
      dtype: of the result.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return lax.dot_general(a, b, _numbers(summed), precision=lax.Precision.HIGHEST).astype(dtype)


def in_parts(a: jax.Array, b: jax.Array, *, summed: tuple[int, int], dtype: Any) -> jax.Array:
    """The same as one product of bf16 values, which the operands are or are made of."""
    count = 2 if dtype == _LOW else 3
    low = [operand.dtype == _LOW for operand in (a, b)]
    if all(low):
        return lax.dot_general(a, b, _numbers(summed), preferred_element_type=dtype)
    if not any(low) and count == 3:
        return in_f32(a, b, summed=summed, dtype=dtype)
    # Whichever writes less: sums of every part, or the bf16 operand once for every part.
    results = a.shape[1 - summed[0]] * b.shape[1 - summed[1]]
    if not any(low) or results > (a if low[0] else b).size:
        return _one_sum(a, b, summed, count, dtype)
    return _sum_of_sums(a, b, summed, count).astype(dtype)


def _one_sum(a: jax.Array, b: jax.Array, summed: tuple[int, int], count: int, dtype: Any) -> jax.Array:
    """All products of parts in one sum, which the matrix unit rounds to ``dtype`` itself.

    Of two f32 operands products that are as small as what the parts leave out are left out too.
    """
    left, right = parts(a, count), parts(b, count)
    pairs = [(x, y) for i, x in enumerate(left) for j, y in enumerate(right) if i + j < count]
    long_a = jnp.concatenate([x for x, _ in pairs], axis=summed[0])
    long_b = jnp.concatenate([y for _, y in pairs], axis=summed[1])
    return lax.dot_general(long_a, long_b, _numbers(summed), preferred_element_type=dtype)


def _sum_of_sums(a: jax.Array, b: jax.Array, summed: tuple[int, int], count: int) -> jax.Array:
    """All parts of the f32 operand side by side, as one wide matrix; the parts' sums are added in f32.

    Where the largest parts give an infinity or NaN, that is the result: infinity times a part that is 0, of a
    number that is not, would make NaN of it.
    """
    left, right = (
        jnp.concatenate(parts(x, count), axis=1 - dim) for x, dim in zip((a, b), summed, strict=True)
    )
    sums = lax.dot_general(left, right, _numbers(summed), preferred_element_type=jnp.float32)
    first, *others = jnp.split(sums, count, axis=1 if a.dtype == _LOW else 0)
    return first + jnp.where(jnp.isfinite(first), functools.reduce(jnp.add, others[::-1]), 0)


def parts(values: jax.Array, count: int) -> list[jax.Array]:
    """bf16 values that add up to f32 values, the largest first; bf16 values are their only part.

    Args:
      values: f32 or bf16.
      count: how many parts of f32 values; three add up to them exactly, two up to 2^-16 of them.
    """
    if values.dtype == _LOW:
        return [values]
    limit = float(jnp.finfo(_LOW).max)
    found = []
    for _ in range(count):
        # Not a cast there and back, which XLA may leave out. What is above bf16's range is no infinity.
        near = jnp.clip(lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7), -limit, limit)
        part = jnp.where(jnp.isfinite(values), near, values)
        found.append(part.astype(_LOW))
        values = jnp.where(jnp.isfinite(values), values - part, 0)
    return found


def _numbers(summed: tuple[int, int]) -> Any:
    return (((summed[0],), (summed[1],)), ((), ()))


def _abstract(a: Any, b: Any, *, summed: tuple[int, int], dtype: Any) -> Any:
    # As a product of JAX has it: shape, sharding and over which mesh axes it varies.
    aval, _ = lax.dot_general_p.abstract_eval(
        a,
        b,
        dimension_numbers=_numbers(summed),
        precision=None,
        preferred_element_type=jnp.dtype(jnp.float32),
        out_sharding=None,
    )
    return aval.update(dtype=dtype)


def _cotangent(g: jax.Array, free: int, other: jax.Array, other_dim: int, own: Any, dim: int) -> jax.Array:
    """The cotangent of an operand that gave dimension ``free`` of the result and was summed over ``dim``."""
    pair = (g, 1 - free), (other, 1 - other_dim)
    (a, a_dim), (b, b_dim) = pair if dim == 1 else pair[::-1]
    return _bind(a, b, (a_dim, b_dim), own.dtype)


def _by_a(g: jax.Array, a: Any, b: jax.Array, *, summed: tuple[int, int], dtype: Any) -> jax.Array:
    del dtype
    return _cotangent(g, 0, b, summed[1], a.aval, summed[0])


def _by_b(g: jax.Array, a: jax.Array, b: Any, *, summed: tuple[int, int], dtype: Any) -> jax.Array:
    del dtype
    return _cotangent(g, 1, a, summed[0], b.aval, summed[1])


def _batched(args: Any, at: Any, *, summed: tuple[int, int], dtype: Any) -> tuple[jax.Array, int]:
    """A batch of one operand is more rows of it; of both, as many products of f32 values."""
    a, b = args
    if None not in at:
        one = functools.partial(in_f32, summed=summed, dtype=dtype)
        return jax.vmap(one, in_axes=tuple(at))(a, b), 0
    which = 0 if at[1] is None else 1
    free = 1 - summed[which]
    # The batch in front of the rows, and both before or behind what is summed.
    many = jnp.moveaxis((a, b)[which], at[which], free)
    batch, rows = many.shape[free : free + 2]
    many = lax.collapse(many, free, free + 2)
    out = _bind(*((many, b) if which == 0 else (a, many)), summed, dtype)
    return out.reshape(*out.shape[:which], batch, rows, *out.shape[which + 1 :]), which


@functools.partial(jax.jit, static_argnames=("summed", "dtype"))
def _run(a: jax.Array, b: jax.Array, *, summed: tuple[int, int], dtype: Any) -> jax.Array:
    return _bind(a, b, summed, dtype)


_product.def_impl(_run)
_product.def_abstract_eval(_abstract)
ad.defbilinear(_product, _by_a, _by_b)
batching.primitive_batchers[_product] = _batched
mlir.register_lowering(_product, mlir.lower_fun(in_f32, multiple_results=False))
mlir.register_lowering(_product, mlir.lower_fun(in_parts, multiple_results=False), platform="cuda")
