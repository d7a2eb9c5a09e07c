"""What ``bench kernels --quant`` times of a scheme: the MLP of codes or master weights, and kernels alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep import schemes
from jax_moriep.bench.against.grouped import with_gradients
from jax_moriep.bench.measure.programs import Work
from jax_moriep.bench.problem import shares
from jax_moriep.bench.problem.shares import Data
from jax_moriep.experts import ExpertSpec, ExpertWeights, pallas
from jax_moriep.experts.pallas.hopper import fp8 as hopper_fp8
from jax_moriep.experts.pallas.hopper import quantised as hopper_quantised
from jax_moriep.experts.pallas.hopper.support import ROWS, unsuited
from jax_moriep.experts.pallas.tiles import row_tiles
from jax_moriep.runtime import compat


def spec_of(data: Data, scheme: str) -> ExpertSpec:
    return dataclasses.replace(data.spec, scheme=scheme, format="e4m3fn")


def quantised(data: Data, scheme: str) -> ExpertWeights:
    """The experts' codes and scales."""
    w1, w2 = data.operands[3:]
    dtype = schemes.code_dtype(scheme, schemes.FORMATS["e4m3fn"])

    def one(w: jax.Array, parts: int) -> schemes.Quantised:
        # Expert by expert: in f32 all of a model's would not fit.
        return jax.lax.map(lambda w: schemes.quantise_weights(w, scheme, dtype, parts=parts), w)

    first, second = (jax.jit(one, static_argnums=1)(w, parts) for w, parts in ((w1, 2), (w2, 1)))
    return ExpertWeights(first.codes, second.codes, None, None, first.scales, second.scales)


def of_codes(data: Data, frozen: ExpertWeights, scheme: str) -> Work:
    """The MLP of codes."""
    spec = spec_of(data, scheme)

    def fn(rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any, s1: Any, s2: Any) -> tuple[jax.Array]:
        of = ExpertWeights(w1, w2, None, None, s1, s2)
        return (pallas.expert_mlp(rows, factors, sizes, of, spec),)

    weights = (frozen.w1, frozen.w2, frozen.w1_scale, frozen.w2_scale)
    return Work(fn, (*data.operands[:3], *weights))


def of_master(data: Data, scheme: str) -> Work:
    """The MLP of master weights, and its gradients."""
    spec = spec_of(data, scheme)

    def forward(rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any) -> jax.Array:
        return pallas.expert_mlp(rows, factors, sizes, ExpertWeights(w1, w2), spec)

    return Work(with_gradients(forward, True), (data.d_out, *data.operands))


def kernels(data: Data, frozen: ExpertWeights, scheme: str) -> dict[str, Work]:
    """The Hopper kernels alone, where they run."""
    rows, factors, sizes = data.operands[:3]
    spec, capacity = spec_of(data, scheme), rows.shape[0]
    if not compat.has_hopper_kernels() or unsuited(spec, rows, frozen) is not None:
        return {}

    def tiles(sizes: jax.Array) -> Any:
        return row_tiles(sizes, spec.block, capacity, ROWS)

    def gate_up(s: Any, c: Any, cs: Any, w: Any, ws: Any, f: Any) -> list[jax.Array]:
        of_rows, of_weights = schemes.Quantised(c, cs), schemes.Quantised(w, ws)
        return hopper_fp8.gate_up(of_rows, of_weights, f, tiles(s), spec, saved_rows=0, dtype=rows.dtype)

    def down(s: Any, c: Any, cs: Any, w: Any, ws: Any) -> jax.Array:
        return hopper_fp8.product(schemes.Quantised(c, cs), schemes.Quantised(w, ws), tiles(s), rows.dtype)

    def quantised(s: Any, x: Any) -> tuple[jax.Array, jax.Array]:
        return hopper_quantised.quantised_rows(x, spec, s, False)

    codes, scales = jax.jit(quantised)(sizes, rows)
    real = jnp.asarray(shares.real_rows(data.sizes, spec.block, capacity))
    operands = (sizes, codes, scales, frozen.w1, frozen.w1_scale, jnp.where(real, factors, 0))
    act, act_scales = jax.jit(gate_up)(*operands)
    return {
        "gate_up": Work(gate_up, operands),
        "down": Work(down, (sizes, act, act_scales, frozen.w2, frozen.w2_scale)),
    }
