"""The expert MLP of ``experts/triton``: its derivative rule, and the kernels that each platform gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jax_moriep.experts.spec import ExpertSpec, ExpertWeights
from jax_moriep.experts.triton import hopper, hopper_passes, passes, tuning
from jax_moriep.experts.triton.launch import Tile
from jax_moriep.runtime import compat


def expert_mlp(
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    spec: ExpertSpec,
) -> jax.Array:
    """See ``blocked.expert_mlp``."""
    biases = () if weights.b1 is None or weights.b2 is None else (weights.b1, weights.b2)
    operands = (rows, row_weights, group_sizes, weights.w1, weights.w2, *biases)
    # Outside the custom VJP, so that JAX's transpose of the cast adds the psum that a shared operand needs.
    return _expert_mlp(spec, compat.union_varying(*operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(spec: ExpertSpec, operands: tuple[jax.Array, ...]) -> jax.Array:
    return _on_platform("forward", spec, operands[0], 0, *operands)[0]


def _expert_mlp_fwd(spec: ExpertSpec, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
    kept = saved_rows(spec, operands[0].shape[0])
    out, saved = _on_platform("forward", spec, operands[0], kept, *operands)
    return out, (operands, saved)


def _expert_mlp_bwd(spec: ExpertSpec, residuals: Any, d_out: jax.Array) -> tuple[Any]:
    operands, saved = residuals
    kept = saved_rows(spec, d_out.shape[0])
    d_rows, d_weights, *others = _on_platform("backward", spec, d_out, kept, d_out, saved, *operands)
    return ((d_rows, d_weights, None, *others),)


_expert_mlp.defvjp(_expert_mlp_fwd, _expert_mlp_bwd)


def saved_rows(spec: ExpertSpec, capacity: int) -> int:
    """Of how many rows pre-activations are kept: whole tiles of the Hopper kernels, or all."""
    if spec.saved_rows is None:
        return capacity
    return min(-(-max(1, spec.saved_rows) // hopper.ROWS) * hopper.ROWS, capacity)


def _on_platform(name: str, spec: ExpertSpec, rows: jax.Array, kept: int, *arrays: Any) -> Any:
    """Runs a pass as the platform wants it for which the program is lowered, wherever it is traced."""

    def on(platform: str) -> Callable[..., Any]:
        kind = compat.device_kind(platform)
        table = tuning.table()

        def tile_of(kernel: str) -> Tile:
            return tuning.lookup(table, kind, kernel, spec.block, rows.dtype.itemsize)

        return functools.partial(getattr(passes, name), spec, tile_of, kept, False)

    interpreted = functools.partial(getattr(passes, name), spec, _interpreted_tile, kept, True)
    on_cuda = on("cuda")
    if compat.has_hopper_kernels() and hopper.covers(spec, rows, *_operands(name, arrays)):
        on_cuda = functools.partial(getattr(hopper_passes, name), spec, kept)
    results = lax.platform_dependent(*arrays, cpu=interpreted, rocm=on("rocm"), default=on_cuda)
    # jax 0.10.2 forgets over which mesh axes a kernel's results vary.
    axes = frozenset().union(*(compat.varying_axes(x) for x in arrays))
    return tuple(compat.pcast_varying(x, axes) for x in results)


def _operands(name: str, arrays: tuple[Any, ...]) -> tuple[Any, Any, bool]:
    """w1, w2 and whether there are biases."""
    operands = arrays if name == "forward" else arrays[2:]
    return operands[3], operands[4], len(operands) > 5


def _interpreted_tile(kernel: str) -> Tile:
    """Small, of uneven sides and with few programs, so that tests meet every mask and every turn."""
    del kernel
    return Tile(rows=16, cols=32, depth=16, warps=4, stages=1, programs=3, group=2)
