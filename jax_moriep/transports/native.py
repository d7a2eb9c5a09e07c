"""transport="native": our own custom calls over memory that the ranks of one machine share.

The receiver pulls: a rank stages its tokens and publishes its routing, and each destination reads every
token that it needs once and writes it to all its expert rows, directly into XLA's result. Combine pushes one
row per (token, rank) to the token's owner, who adds them in rank order.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.errors import ConfigError, LibraryError, rule
from jax_moriep.plan import Link, Plan
from jax_moriep.runtime import compat, library, targets

_ROW_DTYPES = ("float32", "bfloat16", "float16")


def unavailable_reason(platform: str) -> str | None:
    """Why the native transport cannot run on a platform, with the cure; None if it can."""
    backend = library.backend_of(platform)
    if backend is None:
        what = "there is no GPU in this process" if platform == "gpu" else f"it has no {platform} backend"
        return f"{what}; use transport='collective'"
    if sys.platform != "linux":
        return f"it needs Linux (memfd and futex), not {sys.platform}; use transport='collective'"
    try:
        library.load(backend)
    except LibraryError as e:
        return str(e)
    return None


def dispatch(
    link: Link, x: jax.Array, ids: jax.Array, weights: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Plan, jax.Array]:
    """See ``transports.Transport.dispatch``."""
    shape = link.shape
    _check_dtype(x, (*_ROW_DTYPES, "uint8"))
    results = (
        compat.result_type(x, (shape.capacity, x.shape[1]), x.dtype),
        compat.result_type(x, (shape.capacity,), jnp.float32),
        compat.result_type(x, (shape.num_local_experts,), jnp.int32),
        compat.result_type(x, (shape.num_ranks, shape.num_tokens, shape.top_k), jnp.int32),
        compat.result_type(x, (shape.num_ranks, shape.num_tokens), jnp.int32),
        compat.result_type(x, (1,), jnp.int32),
    )
    rows, row_weights, group_sizes, routes, slots, order = targets.call(
        targets.DISPATCH, results, x, ids, weights, _rank(link, x), order, link=link
    )
    return rows, row_weights, group_sizes, Plan(routes=routes, ids=ids, slots=slots, link=link), order


def replay(link: Link, x: jax.Array, plan: Plan, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See ``transports.Transport.replay``."""
    shape = link.shape
    _check_dtype(x, _ROW_DTYPES)
    results = (
        compat.result_type(x, (shape.capacity, x.shape[1]), x.dtype),
        compat.result_type(x, (1,), jnp.int32),
    )
    rows, order = targets.call(
        targets.REPLAY, results, x, plan.routes, plan.ids, _rank(link, x), order, link=link
    )
    return rows, order


def combine(
    link: Link, rows: jax.Array, plan: Plan, order: jax.Array, row_scalars: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """See ``transports.Transport.combine``."""
    shape = link.shape
    _check_dtype(rows, _ROW_DTYPES)
    # An empty operand stands for "no scalars", so that one target serves the forward and the backward pass.
    carried = row_scalars is not None
    scalars = row_scalars if carried else compat.zeros_like_varying((0,), jnp.float32, rows)
    results = (
        compat.result_type(rows, (shape.num_tokens, rows.shape[1]), rows.dtype),
        compat.result_type(rows, (shape.num_tokens if carried else 0, shape.top_k), jnp.float32),
        compat.result_type(rows, (1,), jnp.int32),
    )
    y, token_scalars, order = targets.call(
        targets.COMBINE,
        results,
        rows,
        scalars,
        plan.routes,
        plan.slots,
        plan.ids,
        _rank(link, rows),
        order,
        link=link,
    )
    return y, token_scalars if carried else None, order


def _rank(link: Link, like: jax.Array) -> jax.Array:
    """This device's rank as data: the module is the same on all ranks, and the handler checks its table."""
    rank = lax.axis_index(link.axis_name).astype(jnp.int32).reshape(1)
    return compat.pcast_varying(rank, compat.varying_axes(like))


def _check_dtype(x: jax.Array, allowed: tuple[str, ...]) -> None:
    if str(x.dtype) not in allowed:
        raise ConfigError(
            rule(
                "dtype",
                str(x.dtype),
                f"be one of {_ROW_DTYPES} with transport='native'",
                "cast x, or use another transport",
            )
        )
