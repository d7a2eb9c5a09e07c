"""What the Hopper kernels can run, asked of a call before anything is imported: each answer has a reason."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jax_moriep import schemes
from jax_moriep.experts.spec import ExpertSpec, ExpertWeights

ROWS = 128
"""Rows of a tile: 64, the fewest that the matrix unit multiplies, for each of two warpgroups."""
FEW_ROWS = 64
"""Rows of a tile of the kernels for short runs, which both warpgroups multiply."""
LEAST_BLOCK = 32
"""The smallest block of the 16-bit kernels, whose tiles have 128 rows or 64. ``plan.default_block`` makes it
a quarter of an expert's mean run, so a smaller one says that most runs are shorter than a tile."""
_STRIP = 8
"""Rows of swizzled shared memory that belong together: tiles begin, and results leave, in multiples of it."""
F32_STEP = 32
"""The f32 values that a step of a product sums. In a weight gradient these are rows, and of one run if the
block is a multiple of it."""
_SIZE = 16
"""H and I are multiples of it: the 16-bit values that the narrowest swizzled rows of the matrix unit hold,
or the f32 values of rows twice as wide."""
FORMAT = jnp.dtype(jnp.float8_e4m3fn)
"""The float8 that the matrix unit multiplies."""


def unsuited(spec: ExpertSpec, rows: Any, weights: ExpertWeights) -> str | None:
    """Why the kernels here cannot run a call; None if they can.

    Args:
      spec: the static side.
      rows: [C, H], or its shape and dtype.
      weights: the experts, or their shapes and dtypes.
    """
    why = _unsuited_operands(spec, rows, weights)
    if why is not None:
        return why
    if spec.scheme is not None:
        whole = spec.block % ROWS == 0 and rows.shape[0] % ROWS == 0
        return None if whole else f"block={spec.block} is no multiple of {ROWS}"
    strip = _STRIP if rows.dtype != jnp.float32 else F32_STEP
    if spec.block < LEAST_BLOCK or spec.block % strip:
        return f"block={spec.block} must be a multiple of {strip} and at least {LEAST_BLOCK}"
    return None


def suited_blocks(spec: ExpertSpec) -> str:
    """What ``unsuited`` asks of the block, in words."""
    return f"at least {LEAST_BLOCK}" if spec.scheme is None else f"a multiple of {ROWS}"


def unsuited_few(spec: ExpertSpec, rows: Any, weights: ExpertWeights) -> str | None:
    """Why the kernels for short runs cannot run a call that is not differentiated; see ``unsuited``."""
    if spec.scheme is None or not weights.frozen:
        return "those for few rows have quantised weights only"
    why = _unsuited_operands(spec, rows, weights)
    if why is None and (spec.block % _STRIP or FEW_ROWS % spec.block or rows.shape[0] % spec.block):
        why = f"block={spec.block} is none of 8, 16, 32 and {FEW_ROWS}"
    return why


def _unsuited_operands(spec: ExpertSpec, rows: Any, weights: ExpertWeights) -> str | None:
    """What all kernels here ask for, whatever the runs are."""
    hidden, inner = rows.shape[1], weights.w2.shape[2]
    if rows.dtype == jnp.float32:
        if spec.scheme is not None:
            return "rows are float32, and with quantised weights must be bfloat16 or float16"
        if not spec.tf32:
            return f"jax.default_matmul_precision is {spec.precision!r}, and they multiply float32 in TF32"
    elif jnp.dtype(rows.dtype).itemsize != 2:
        return f"rows are {jnp.dtype(rows.dtype).name}, and must be bfloat16, float16 or float32"
    if spec.scheme is not None and spec.code_dtype(weights) != FORMAT:
        return f"codes are {spec.code_dtype(weights).name}, and must be {FORMAT.name}"
    if spec.scheme is not None and weights.b1 is not None:
        return "the experts have biases beside quantised weights"
    if spec.weight_input:
        return "the experts' inputs are weighted, and not their outputs"
    size = _SIZE if spec.scheme is None else schemes.BLOCK
    if hidden % size or inner % size:
        return f"H={hidden} and I={inner} must be multiples of {size}"
    return None
