"""experts="reference": every expert computes every row, and a mask keeps the rows that are its own.

It is the statement of what the experts do, in the plainest form: L times too slow, on every platform, and
differentiated by JAX.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.config import MoEConfig
from jax_moriep.experts.activation import gated
from jax_moriep.experts.spec import ExpertSpec
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
    w1: jax.Array,
    w2: jax.Array,
    b1: jax.Array | None,
    b2: jax.Array | None,
    spec: ExpertSpec,
) -> jax.Array:
    """See ``blocked.expert_mlp``."""
    f32 = jnp.float32
    if b1 is None or b2 is None:
        b1, b2 = jnp.zeros(w1.shape[:2], f32), jnp.zeros(w2.shape[:2], f32)
    operands = compat.union_varying(rows, row_weights, group_sizes, w1, w2, b1, b2)
    rows, row_weights, group_sizes, w1, w2, b1, b2 = operands
    starts = run_starts(group_sizes, spec.block)
    index = jnp.arange(rows.shape[0])[:, None]

    def add_expert(out: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        start, size, *weights = expert
        # An expert without rows is not computed, whatever its weights hold: NaN times a zero row is NaN.
        w1, w2, b1, b2 = (jnp.where(size > 0, w, 0) for w in weights)
        mine = (index >= start) & (index < start + size)
        # Before any arithmetic, so that what lies in padding reaches neither a value nor a gradient.
        x = jnp.where(mine, rows, 0).astype(f32)
        weight = jnp.where(mine, row_weights[:, None], 0)
        if spec.weight_input:
            x, weight = x * weight, 1.0
        pre = _dot(x, w1) + b1.astype(f32)
        h = gated(pre, spec.activation, spec.activation_limit, spec.activation_alpha)
        y = (_dot(h, w2) + b2.astype(f32)) * weight
        return out + jnp.where(mine, y, 0), None

    out = compat.zeros_like_varying(rows.shape, f32, rows)
    out, _ = lax.scan(add_expert, out, (starts, group_sizes, w1, w2, b1, b2))
    return out.astype(rows.dtype)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T in f32, exactly rounded products also where a GPU would take TF32."""
    return jnp.dot(x, w.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
