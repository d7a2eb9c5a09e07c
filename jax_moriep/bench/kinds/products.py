"""The experts' kernels one by one, each with the dense matmul of its own shape, for ``bench kernels``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.bench.against.grouped import with_gradients
from jax_moriep.bench.measure.programs import Work
from jax_moriep.bench.problem.shares import Data, Share
from jax_moriep.experts import ExpertSpec, ExpertWeights, pallas
from jax_moriep.experts.pallas import choice
from jax_moriep.experts.pallas.hopper import products as hopper
from jax_moriep.experts.pallas.hopper import tf32
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.hopper.weight_gradient import weight_gradient
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.experts.pallas.triton import passes, products, tuning
from jax_moriep.plan import run_starts
from jax_moriep.runtime import compat

FORWARD = ("gate_up", "down")
UNITS = {"gate_up": 2, "down": 1, "d_act": 1, "d_rows": 2, "dw1": 2, "dw2": 1}
"""FLOPs of each kernel in units of the product of all rows with w2."""


def flops(share: Share, names: Sequence[str]) -> int:
    """FLOPs of the real rows in some kernels."""
    return sum(UNITS[name] for name in names) * 2 * share.rows * share.hidden * share.inner


def of_rows(data: Data) -> tuple[jax.Array, jax.Array]:
    """Activations and pre-activations for kernels that run alone: random, also in padding."""
    keys = jax.random.split(jax.random.key(1), 2)
    rows, inner = data.operands[0], data.share.inner
    act = jax.random.normal(keys[0], (rows.shape[0], inner), rows.dtype)
    return act, jax.random.normal(keys[1], (rows.shape[0], 2 * inner), rows.dtype)


def kernels(data: Data, act: jax.Array, pre: jax.Array, interpret: bool) -> dict[str, Work]:
    """Each kernel that runs for ``data``; see ``of_rows`` for ``act`` and ``pre``.

    Of experts with biases none is run alone. Pallas-Mosaic's of f32 are run with the copies that they need.
    """
    if data.share.biased:
        return {}
    rows, factors, sizes, w1, w2 = data.operands
    spec, capacity = data.spec, rows.shape[0]
    chosen = choice.of(spec, rows, ExpertWeights(w1, w2), differentiated=True)
    if compat.has_hopper_kernels() and chosen.mosaic:
        tiles = functools.partial(row_tiles, block=spec.block, capacity=capacity, size=ROWS)

        def product(s: jax.Array, x: jax.Array, w: jax.Array, by_column: bool) -> jax.Array:
            return hopper.product(x, w, tiles(s), by_column=by_column)

        def gate_up(s: jax.Array, x: jax.Array, w: jax.Array, f: jax.Array) -> list[jax.Array]:
            return hopper.gate_up(x, w, f, tiles(s), spec, saved_rows=0, act=True)

        by_row = functools.partial(product, by_column=False)
        by_column, gradient = functools.partial(product, by_column=True), _gradient
        if rows.dtype == jnp.float32:
            by_column, gradient = lambda s, x, w: by_row(s, x, jnp.swapaxes(w, 1, 2)), _gradient_of_f32
        gradient = functools.partial(gradient, spec)
        return {
            "gate_up": Work(gate_up, (sizes, rows, w1, factors)),
            "down": Work(by_row, (sizes, act, w2)),
            "d_act": Work(by_column, (sizes, data.d_out, w2)),
            "d_rows": Work(by_column, (sizes, pre, w1)),
            "dw1": Work(functools.partial(gradient, unclean="right"), (sizes, pre, rows)),
            "dw2": Work(functools.partial(gradient, unclean="left"), (sizes, data.d_out, act)),
        }
    kind, table = compat.device_kind("cuda"), tuning.table()

    def of_kernel(name: str) -> Work:
        tile = tuning.lookup(table, kind, name, spec.block, rows.dtype.itemsize, tf32=spec.tf32)
        fn, operands = of_triton(data, name, tile, act, pre, interpret)
        return Work(fn, (sizes, *operands))

    return {name: of_kernel(name) for name in tuning.KERNELS}


def _gradient(spec: ExpertSpec, s: jax.Array, a: jax.Array, b: jax.Array, unclean: str) -> jax.Array:
    return weight_gradient(a, b, run_starts(s, spec.block), s, spec.block, a.dtype, unclean=unclean)


def _gradient_of_f32(spec: ExpertSpec, s: jax.Array, a: jax.Array, b: jax.Array, unclean: str) -> jax.Array:
    """With the copies that the backward pass makes, which clear all padding."""
    del unclean
    real = real_rows(s, spec.block, a.shape[0])
    left, right = (tf32.along_sums(real, x) for x in (a, b))
    return tf32.weight_gradient(left, right, run_starts(s, spec.block), s)


def of_triton(
    data: Data, name: str, tile: Any, act: jax.Array, pre: jax.Array, interpret: bool = False
) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
    """One Triton kernel: fn(group sizes, *operands), and the operands."""
    rows, factors, _, w1, w2 = data.operands
    spec, capacity = data.spec, rows.shape[0]
    gradient = functools.partial(
        products.weight_gradient, dtype=w1.dtype, tile=tile, name="moriep_" + name, interpret=interpret
    )

    def gate_up(s: Any, x: Any, f: Any, a: Any, b: Any) -> Any:
        return passes.gate_up(spec, tile, interpret, (x, f, s, ExpertWeights(a, b)))

    def down(s: Any, h: Any, x: Any, f: Any, a: Any, b: Any) -> Any:
        return passes.down(spec, tile, interpret, h, (x, f, s, ExpertWeights(a, b)))

    def d_act(s: Any, d: Any, p: Any, x: Any, f: Any, a: Any, b: Any) -> Any:
        return passes.d_activations(spec, tile, capacity, interpret, d, (p,), (x, f, s, ExpertWeights(a, b)))

    def d_rows(s: Any, p: Any, x: Any, f: Any, a: Any, b: Any) -> Any:
        return passes.d_rows(spec, tile, interpret, p, (x, f, s, ExpertWeights(a, b)))

    def dw(s: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
        return gradient(left, right, run_starts(s, spec.block), s)

    others = (rows, factors, w1, w2)
    return {
        "gate_up": (gate_up, others),
        "down": (down, (act, *others)),
        "d_act": (d_act, (data.d_out, pre, *others)),
        "d_rows": (d_rows, (pre, *others)),
        "dw1": (dw, (pre, rows)),
        "dw2": (dw, (data.d_out, act)),
    }[name]


def mlp(data: Data, backward: bool) -> Work:
    """The whole MLP: its result, and with ``backward`` the gradients."""
    spec = data.spec

    def forward(rows: Any, factors: Any, sizes: Any, *weights: Any) -> jax.Array:
        return pallas.expert_mlp(rows, factors, sizes, ExpertWeights(*weights), spec)

    return Work(with_gradients(forward, backward), (data.d_out, *data.operands, *data.biases))
