"""experts="reference": every expert computes every row, and a mask keeps the rows that are its own.

It is the statement of what the experts do, in the plainest form: L times too slow, on every platform, and
differentiated by JAX but for the products, which say what a scheme quantises on the way back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.config import MoEConfig
from jax_moriep.experts import rounding
from jax_moriep.experts.activation import gated
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights, Stack
from jax_moriep.plan import run_starts
from jax_moriep.runtime import compat
from jax_moriep.runtime.place import Place


def unavailable_reason(place: Place, cfg: MoEConfig | None) -> str | None:
    """None: it runs every layer on every platform."""
    del place, cfg
    return None


def expert_mlp(
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    spec: ExpertSpec,
    stack: Stack | None = None,
) -> jax.Array:
    """See ``blocked.expert_mlp``."""
    del stack  # The layer's own weights are the same.
    f32 = jnp.float32
    leaves, tree = jax.tree.flatten((rows, row_weights, group_sizes, weights))
    operands = jax.tree.unflatten(tree, compat.union_varying(*leaves))
    rows, row_weights, group_sizes, weights = operands
    first, second = _rules(weights, spec)
    starts = run_starts(group_sizes, spec.block)
    index = jnp.arange(rows.shape[0])[:, None]

    def add_expert(out: jax.Array, expert: tuple[Any, ...]) -> tuple[jax.Array, None]:
        start, size, of = expert
        w1, w2 = rounding.weights(of, spec) if weights.frozen else (of.w1.astype(f32), of.w2.astype(f32))
        b1, b2 = (0.0 if b is None else b.astype(f32) for b in (of.b1, of.b2))
        # An expert without rows is not computed, whatever its weights hold: NaN times a zero row is NaN.
        w1, w2, b1, b2 = (jnp.where(size > 0, w, 0) for w in (w1, w2, b1, b2))
        mine = (index >= start) & (index < start + size)
        # Before any arithmetic, so that what lies in padding reaches neither a value nor a gradient.
        x = jnp.where(mine, rows, 0).astype(f32)
        weight = jnp.where(mine, row_weights[:, None], 0)
        if spec.weight_input:
            x, weight = x * weight, jnp.ones_like(weight)
        pre: jax.Array = _product(first, x, w1, jnp.ones_like(weight))
        pre = pre + b1
        h = gated(pre, spec.activation, spec.activation_limit, spec.activation_alpha)
        y: jax.Array = _product(second, h, w2, weight)
        y = y + b2 * weight
        return out + jnp.where(mine, y, 0), None

    out = compat.zeros_like_varying(rows.shape, f32, rows)
    out, _ = lax.scan(add_expert, out, (starts, group_sizes, weights))
    return out.astype(rows.dtype)


class _Rule(NamedTuple):
    """What a product reads of its operands, and of the cotangent on the way back."""

    rows: Callable[[jax.Array], jax.Array]
    weights: Callable[[jax.Array], jax.Array]
    cotangent: Callable[[jax.Array], jax.Array]


def _rules(weights: ExpertWeights, spec: ExpertSpec) -> tuple[_Rule, _Rule]:
    """Of the first and of the second product."""

    def as_it_is(values: jax.Array) -> jax.Array:
        return values

    if spec.scheme is None:
        return _Rule(as_it_is, as_it_is, as_it_is), _Rule(as_it_is, as_it_is, as_it_is)
    dtype = spec.code_dtype(weights)

    def seen(parts: int) -> Callable[[jax.Array], jax.Array]:
        if weights.frozen:
            return as_it_is  # they have been dequantised
        return lambda w: rounding.master(w, spec, dtype, parts=parts)

    def back(rounded: Callable[[jax.Array, jnp.dtype], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return (lambda d: rounded(d, dtype)) if spec.quantises_gradients(weights) else as_it_is

    first = _Rule(lambda x: rounding.rows(x, spec, dtype), seen(2), back(rounding.halves))
    second = _Rule(lambda h: rounding.activated(h, dtype), seen(1), back(rounding.activated))
    return first, second


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(rule: _Rule, x: jax.Array, w: jax.Array, factor: jax.Array) -> jax.Array:
    """factor [t, 1] * (x [t, D] @ w [N, D].T). Rounding has the derivative of the identity."""
    return _dot(rule.rows(x), rule.weights(w).T) * factor


def _product_fwd(rule: _Rule, x: jax.Array, w: jax.Array, factor: jax.Array) -> tuple[jax.Array, Any]:
    return _product(rule, x, w, factor), (x, w, factor)


def _product_bwd(rule: _Rule, residuals: Any, d_y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, factor = residuals
    d_x = _dot(rule.cotangent(d_y), rule.weights(w))
    d_factor = jnp.sum(d_x * rule.rows(x), axis=1, keepdims=True)
    return d_x * factor, _dot((d_y * factor).T, x), d_factor


_product.defvjp(_product_fwd, _product_bwd)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """In f32, exactly rounded products also where a GPU would take TF32."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)
