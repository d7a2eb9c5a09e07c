"""The expert MLP of ``experts/pallas``: its derivative rule, and the kernels that each platform gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jax_moriep.experts.pallas import choice
from jax_moriep.experts.pallas.hopper import passes as hopper_passes
from jax_moriep.experts.pallas.hopper import quantised as hopper_quantised
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.launch import Tile
from jax_moriep.experts.pallas.triton import passes, tuning
from jax_moriep.experts.pallas.triton import quantised as quantised_passes
from jax_moriep.experts.spec import SAVED_NAME, ExpertSpec, ExpertWeights, Operands, Stack, read_from
from jax_moriep.runtime import compat


def expert_mlp(
    rows: jax.Array,
    row_weights: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    spec: ExpertSpec,
    stack: Stack | None = None,
) -> jax.Array:
    """See ``blocked.expert_mlp``."""
    leaves, tree = jax.tree.flatten((rows, row_weights, group_sizes, weights))
    # Outside the custom VJP, so that JAX's transpose of the cast adds the psum that a shared operand needs.
    operands = jax.tree.unflatten(tree, compat.union_varying(*leaves))
    if spec.scheme is not None and spec.weight_input:
        run = functools.partial(_expert_mlp, stack=stack)
        return quantised_passes.with_weighted_input(run, spec, operands)
    return _expert_mlp(spec, operands, stack)


# A stack is read and has no cotangent: that is of the one layer's weights, whose values nobody reads then.
# It stays typed as it came: retyped, a scan would keep a copy of it for every layer's backward pass.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_mlp(spec: ExpertSpec, operands: Operands, stack: Stack | None) -> jax.Array:
    return _on_platform("forward", spec, read_from(operands, stack), 0)[0]


def _expert_mlp_fwd(spec: ExpertSpec, operands: Operands, stack: Stack | None) -> tuple[jax.Array, Any]:
    kept = saved_rows(spec, operands[0].shape[0])
    out, *saved = _on_platform("forward", spec, read_from(operands, stack), kept)
    own = operands[3] if stack is None else None
    return out, (operands[:3], own, stack, checkpoint_name(saved, SAVED_NAME))


def _expert_mlp_bwd(spec: ExpertSpec, residuals: Any, d_out: jax.Array) -> tuple[Any, None]:
    given, own, stack, saved = residuals
    operands = read_from((*given, own), stack)
    kept = saved_rows(spec, d_out.shape[0])
    d_rows, d_row_weights, *others = _on_platform("backward", spec, operands, kept, d_out, *saved)
    weights: ExpertWeights = operands[3]
    # Of codes and their scales there are no gradients.
    trained = [] if weights.frozen else ["w1", "w2"]
    trained += [] if weights.b1 is None else ["b1", "b2"]
    nothing = ExpertWeights(None, None)
    d_weights = nothing._replace(**dict(zip(trained, others, strict=True)))
    return (d_rows, d_row_weights, None, d_weights), None


_expert_mlp.defvjp(_expert_mlp_fwd, _expert_mlp_bwd)


def saved_rows(spec: ExpertSpec, capacity: int) -> int:
    """Of how many rows pre-activations are kept: whole tiles of the Hopper kernels, or all."""
    if spec.saved_rows is None:
        return capacity
    return min(-(-max(1, spec.saved_rows) // ROWS) * ROWS, capacity)


def _on_platform(name: str, spec: ExpertSpec, operands: Operands, kept: int, *of_pass: jax.Array) -> Any:
    """Runs a pass as the platform wants it for which the program is lowered, wherever it is traced."""
    rows, _, group_sizes, weights = operands
    arrays = (*of_pass[:2], operands, *of_pass[2:])
    capacity, itemsize, table = rows.shape[0], rows.dtype.itemsize, tuning.table()
    mean_run = spec.mean_run(capacity, group_sizes.size)

    def by_triton(platform: str) -> Callable[..., Any]:
        kind = compat.device_kind(platform)

        def tile_of(kernel: str) -> Tile:
            if spec.scheme is not None and kernel in tuning.FORWARD:
                mean = capacity / group_sizes.size
                return tuning.lookup_of_codes(table, kind, kernel, spec.block, mean)
            return tuning.lookup(table, kind, kernel, spec.block, itemsize, mean_run, tf32=spec.tf32)

        if spec.scheme is None:
            return functools.partial(getattr(passes, name), spec, tile_of, kept, False)
        native = compat.converts_float8(platform, spec.code_dtype(weights))
        return functools.partial(getattr(quantised_passes, name), spec, tile_of, kept, False, native)

    chosen = choice.of(spec, rows, weights, differentiated=name == "backward" or kept > 0)
    if spec.scheme is None:
        interpreted = functools.partial(getattr(passes, name), spec, _interpreted_tile, kept, True)
        by_hopper = functools.partial(getattr(hopper_passes, name), spec, kept)
    else:
        # Both ways to read codes are tested so: one float8 is converted, the other one's bits are taken.
        native = compat.converts_float8("cpu", spec.code_dtype(weights))
        interpreted = functools.partial(
            getattr(quantised_passes, name), spec, _interpreted_tile, kept, True, native
        )
        by_hopper = functools.partial(getattr(hopper_quantised, name), spec, kept, False)
        if chosen.few:
            by_hopper = functools.partial(hopper_quantised.few_rows, spec, False)
    on_rocm, on_cuda = by_triton("rocm"), by_triton("cuda")
    if chosen.mosaic and compat.has_hopper_kernels():
        on_cuda = by_hopper
        if spec.scheme is not None and kept:
            others = hopper_quantised.kept(spec, weights, group_sizes.size)
            interpreted, on_rocm = (_without(others, name, fn) for fn in (interpreted, on_rocm))
    with spec.multiplying():
        results = lax.platform_dependent(*arrays, cpu=interpreted, rocm=on_rocm, default=on_cuda)
    # jax 0.10.2 forgets over which mesh axes a kernel's results vary.
    axes = _axes_of(arrays)
    return tuple(compat.pcast_varying(x, axes) for x in results)


def _without(
    kept: tuple[tuple[tuple[int, ...], Any], ...], name: str, run: Callable[..., Any]
) -> Callable[..., Any]:
    """A pass that keeps no more than pre-activations, as the Hopper one is called that keeps more.

    Every platform's pass must take and give the same arrays, also in a program that is lowered for another
    platform than that of this process's GPUs.
    """
    if name == "backward":
        return lambda *arrays: run(*arrays[: len(arrays) - len(kept)])

    def padded(*arrays: Any) -> tuple[jax.Array, ...]:
        nothing = [jnp.zeros(shape, dtype) for shape, dtype in kept]
        axes = _axes_of(arrays)
        return (*run(*arrays), *(compat.pcast_varying(x, axes) for x in nothing))

    return padded


def _axes_of(arrays: Any) -> frozenset[str]:
    """Over which mesh axes any of them varies."""
    return frozenset().union(*(compat.varying_axes(x) for x in jax.tree.leaves(arrays)))


def _interpreted_tile(kernel: str) -> Tile:
    """Small, of uneven sides and with few programs, so that tests meet every mask and every turn."""
    del kernel
    return Tile(rows=16, cols=32, depth=16, warps=4, stages=1, programs=3, group=2)
