"""The layer as it is usually written, for one device and without this package: what ``bench layer`` beats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.bench.cases import Case
from jax_moriep.config import MoEParams

# Contracts the last dimension of both sides: the weights are used as they lie, [E, out, in].
_BY_EXPERT = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
_HOPPER_TILE: dict[str, Any] = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4}


def layer(name: str, case: Case) -> Callable[[jax.Array, MoEParams], jax.Array]:
    """fn(x [T, H], weights) -> y [T, H] of "plain" or "plain_hopper", in which jax's kernel multiplies."""
    product = _ragged_dot if name == "plain" else _hopper

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


def _ragged_dot(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(rows, weights, sizes, _BY_EXPERT)


def _hopper(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """jax's own kernel for Hopper GPUs; it has no derivative."""
    # Imported here, for it takes its time, and is not there with every jax.
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    blocks = weights.shape[1] // _HOPPER_TILE["block_n"]
    width = next(width for width in (8, 4, 2, 1) if blocks % width == 0)
    return ragged_dot_mgpu.ragged_dot(
        rows, weights, group_sizes=sizes, transpose_rhs=True, grid_block_n=width, **_HOPPER_TILE
    )
