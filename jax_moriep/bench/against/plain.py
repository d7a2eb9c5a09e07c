"""The layer as it is usually written, for one device and without this package: what ``bench layer`` beats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.names import TOKAMAX
from jax_moriep.config import MoEParams

# Contracts the last dimension of both sides: the weights are used as they lie, [E, out, in].
_BY_EXPERT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def layer(name: str, case: Case) -> Callable[[jax.Array, MoEParams], jax.Array]:
    """fn(x [T, H], weights) -> y [T, H] of "plain", or with jax's kernels for Hopper, or with tokamax's.

    Raises:
      ImportError: tokamax is not installed.
    """
    product = {"plain": _ragged_dot, "plain_hopper": _hopper, TOKAMAX: _tokamax}[name]

    def fn(x: jax.Array, weights: MoEParams) -> jax.Array:
        logits = (x @ weights.router).astype(jnp.float32)
        chosen, ids = lax.top_k(logits, case.top_k)
        shares = jax.nn.softmax(chosen, axis=-1)
        route = jnp.argsort(ids.reshape(-1), stable=True)
        token = route // case.top_k
        sizes = jnp.bincount(ids.reshape(-1), length=case.experts).astype(jnp.int32)
        gate, up = jnp.split(product(x[token], weights.w1, sizes), 2, axis=1)
        out = product(jax.nn.silu(gate) * up, weights.w2, sizes)
        out = out.astype(jnp.float32) * shares.reshape(-1)[route][:, None]
        return jnp.zeros(x.shape, jnp.float32).at[token].add(out).astype(x.dtype)

    return fn


def swapped(weights: MoEParams) -> MoEParams:
    """Experts' weights or their gradients [E, in, out], as tokamax has them, of the usual ones; and back."""
    turned = [jnp.swapaxes(w, 1, 2) for w in (weights.w1, weights.w2)]
    return dataclasses.replace(weights, w1=turned[0], w2=turned[1])


def _ragged_dot(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(rows, weights, sizes, _BY_EXPERT)


def _hopper(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """By jax's own kernels for Hopper GPUs, with the tiles that were the fastest ones for large products."""
    # Imported here, for it takes its time.
    from jax_moriep.bench.against import hopper

    tiles = hopper.HOPPER_MANY[0], hopper.HOPPER_DW[0]
    return hopper.hopper_product(*hopper.hopper_dots(), *tiles)(rows, weights, sizes)


def _tokamax(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """With the tiles of its own table for large products; of ``swapped`` weights."""
    from jax_moriep.bench.against import tokamax

    return tokamax.tokamax_product(tokamax.TOKAMAX_MANY, tokamax.TOKAMAX_DW)(rows, weights, sizes)
