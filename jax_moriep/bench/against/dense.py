"""Beside kernels: the dense matmuls of their shapes, and a copy where reading weights is most of the work."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep.bench.against import copies
from jax_moriep.bench.measure.programs import Work
from jax_moriep.bench.problem.shares import Data


def dense(data: Data, act: jax.Array, pre: jax.Array) -> dict[str, Work]:
    """For each kernel the dense matmul of its shape, FLOPs and layouts, with one expert's weights."""
    compact, count = data.compact(), data.share.rows
    act, pre = act[:count], pre[:count]
    w1, w2 = (w[0] for w in data.operands[3:])
    return {
        "gate_up": Work(_times_transposed, (compact.rows, w1)),
        "down": Work(_times_transposed, (act, w2)),
        "d_act": Work(_times, (compact.d_out, w2)),
        "d_rows": Work(_times, (pre, w1)),
        "dw1": Work(_transposed_times, (pre, compact.rows)),
        "dw2": Work(_transposed_times, (compact.d_out, act)),
    }


def chain(works: Sequence[Work]) -> Work:
    """All in one program, one behind the other."""
    counts = [len(work.operands) for work in works]

    def fn(*operands: jax.Array) -> tuple[jax.Array, ...]:
        results: list[jax.Array] = []
        for work, count in zip(works, counts, strict=True):
            own, operands = operands[:count], operands[count:]
            if results:
                own, results[-1] = lax.optimization_barrier((own, results[-1]))
            results.append(work.fn(*own))
        return tuple(results)

    return Work(fn, tuple(x for work in works for x in work.operands))


def copy(num_bytes: int) -> tuple[Work, str]:
    """The fastest pass that reads and writes so many bytes each, and a line about it."""
    x = jax.random.normal(jax.random.key(3), (num_bytes // 2,), jnp.bfloat16)
    fastest = copies.fastest_copy()
    return Work(fastest.run, (x, jnp.full(1, 2, x.dtype))), fastest.told


def _times(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def _times_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w.T


def _transposed_times(a: jax.Array, b: jax.Array) -> jax.Array:
    return a.T @ b
