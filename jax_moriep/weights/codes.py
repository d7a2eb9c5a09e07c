"""Quantised weights as checkpoints hold them: codes in one tensor, their scales in another beside it.

Everything is on the host, in NumPy: of a layer's codes, gigabytes, a device gets its share only.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep.errors import ConfigError, rule
from jax_moriep.quant import GROUP, num_groups
from jax_moriep.runtime import compat
from jax_moriep.weights.files import Tensor

BLOCK, ROW = "block", "row"
FLOATS = ("float64", "float32", "float16", "bfloat16")
SCHEME = {
    ("float8_e4m3fn", BLOCK): "fp8_block",
    ("float8_e4m3fn", ROW): "fp8_token",
    ("float8_e4m3fnuz", BLOCK): "fp8_block",
    ("float8_e4m3fnuz", ROW): "fp8_token",
    ("int8", ROW): "int8_token",
}
"""By the dtype of the codes and by what has a scale of its own."""
CODES = tuple(dict.fromkeys(dtype for dtype, _ in SCHEME))
MXFP4_GROUP = 32
_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")
# What torch gives NumPy by its bits only, and as which of its own dtypes.
_AS_BITS = {"bfloat16": "int16"} | {
    name: "uint8" for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e8m0fnu")
}


class Stored(NamedTuple):
    """A weight [..., rows, columns] as a checkpoint has it.

    Attributes:
      values: floating, or codes; may be in a file.
      scales: of codes, f32: [..., blocks of rows, blocks of columns] or [..., rows]; else None.
      kind: of codes, their dtype and what has a scale; a key of ``SCHEME`` where it is a scheme's.
    """

    values: np.ndarray | Tensor
    scales: np.ndarray | None = None
    kind: tuple[str, str] | None = None


def dtype_name(value: Any) -> str:
    """The dtype of a NumPy, JAX or torch array by its NumPy name; of other things, their type's name."""
    return str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")


def check_has_values(name: str, value: Any) -> None:
    """Refuses what only stands for an array while jax traces a function, or describes one."""
    if compat.is_tracer(value) or isinstance(value, jax.ShapeDtypeStruct):
        cure = "call this outside of jax.jit, jax.grad and jax.eval_shape"
        raise ConfigError(rule(name, type(value).__name__, "be an array with values", cure))


def to_numpy(value: Any) -> np.ndarray | Tensor:
    """NumPy array of a NumPy, JAX or torch array, without importing torch and, on a CPU, without a copy; a
    tensor in a file stays there."""
    if isinstance(value, Tensor):
        return value
    if not str(value.dtype).startswith("torch."):
        return np.asarray(value)
    value, name = value.detach().cpu(), dtype_name(value)
    if name not in _AS_BITS:
        return value.numpy()
    bits = getattr(sys.modules["torch"], _AS_BITS[name])
    return value.view(bits).numpy().view(jnp.dtype(name))


def scale_names(name: str) -> tuple[str, str]:
    """What the scales of a tensor may be called: as DeepSeek has them, and as compressed-tensors."""
    return f"{name}_scale_inv", f"{name}_scale"


def static_names(name: str) -> tuple[str, str]:
    """What a fixed scale of the tensor's inputs may be called; rows are quantised by what they hold."""
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    return f"{stem}input_scale", f"{stem}activation_scale"


def with_scales(
    name: str,
    values: np.ndarray | Tensor,
    scale_name: str,
    scales: Any,
    halves: int = 1,
    scheme: str | None = None,
) -> Stored:
    """Joins codes and their scales.

    Args:
      name: of the codes, for errors.
      values: the codes [..., rows, columns].
      scale_name: of the scales, for errors.
      scales: as the checkpoint has them: one for each block of 128 x 128 (fewer at the edges), for each row,
        or for the whole matrix, which is then every row's.
      halves: how many matrices of equal size the rows are; no block lies in two of them.
      scheme: what the config names. It decides whether the one scale of a small matrix is that of its only
        block or of all its rows; the values are the same.

    Raises:
      ConfigError: the scales have another dtype or shape.
    """
    if dtype_name(scales) not in _SCALES:
        argument, must = f"state_dict[{scale_name!r}].dtype", f"be one of {_SCALES}"
        raise ConfigError(rule(argument, dtype_name(scales), must, "dequantise the checkpoint first"))
    found = np.asarray(to_numpy(scales)).astype(np.float32)
    *lead, rows, columns = values.shape
    blocks = (*lead, halves * num_groups(rows // halves), num_groups(columns))
    # One for a matrix; of the fused gate and up, transformers has one each.
    of_matrix = {(*lead, 1): 1, (*lead,): 1, (*lead, 1, 1): 1, (*lead, halves, 1): halves}
    by_row = dtype_name(values) == "int8" or scheme in ("fp8_token", "int8_token")
    if found.shape == blocks and not (by_row and found.shape in of_matrix):
        height = rows // halves
        if halves > 1 and height % GROUP and num_groups(rows) == halves * num_groups(height):
            # Blocks of each matrix, or of all rows? The shapes are equal, and the blocks are not.
            raise ConfigError(
                f"state_dict[{scale_name!r}].shape={found.shape} must not leave open whether blocks begin "
                f"anew with each of {halves} matrices of {height} rows; pass gate and up apart, as on disk"
            )
        return Stored(values, found, (values.dtype.name, BLOCK))
    if found.shape in ((*lead, rows), (*lead, rows, 1)):
        return Stored(values, found.reshape(*lead, rows), (values.dtype.name, ROW))
    if found.shape in of_matrix:
        each = of_matrix[found.shape]
        return Stored(
            values, np.repeat(found.reshape(*lead, each), rows // each, axis=-1), (values.dtype.name, ROW)
        )
    raise ConfigError(
        rule(
            f"state_dict[{scale_name!r}].shape",
            found.shape,
            f"be {blocks} (one for each {GROUP}x{GROUP} of {name!r}), {(*lead, rows, 1)} (for each row) or "
            f"{(*lead, halves, 1)} (for the matrix)",
            "pass the model's own config, and the tensors as they are on disk",
        )
    )


def dequantised(stored: Stored, halves: int = 1) -> np.ndarray | Tensor:
    """The values, in bfloat16 where they are codes: the f32 product of code and scale, rounded.

    Args:
      stored: what ``with_scales`` gave.
      halves: as there.
    """
    scales = stored.scales
    if scales is None or stored.kind is None:
        return stored.values
    values = np.asarray(stored.values)
    *lead, rows, columns = values.shape
    result = np.empty(values.shape, jnp.bfloat16)
    # By matrices, so that no f32 copy of all experts is made.
    for index in np.ndindex(*lead):
        of_rows = scales[index]
        if stored.kind[1] == BLOCK:
            by_half = of_rows.reshape(halves, -1, of_rows.shape[-1])
            by_half = np.repeat(by_half, GROUP, axis=1)[:, : rows // halves]
            spread = np.repeat(by_half, GROUP, axis=2)[..., :columns].reshape(rows, columns)
        else:
            spread = of_rows[:, None]
        result[index] = (values[index].astype(np.float32) * spread).astype(jnp.bfloat16)
    return result


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values of OCP's MXFP4: each 32 e2m1 numbers share a power of two.

    All are exact in bfloat16, but for 2 to 6 times 2^127, which are infinite there. A scale of 255 is
    e8m0's NaN, and so are its 32 values (transformers takes it for 2^128).

    Args:
      blocks: u8[..., G, 16], two numbers a byte, the first in the low bits.
      scales: u8[..., G], exponents with a bias of 127.

    Returns:
      bfloat16 [..., G * 32].
    """
    numbers = np.arange(16, dtype=np.uint8).view(jnp.float4_e2m1fn).astype(np.float32)
    byte = np.arange(256)
    pairs = np.stack([numbers[byte & 15], numbers[byte >> 4]], axis=-1)
    *lead, groups, _ = blocks.shape
    result = np.empty((*lead, groups * MXFP4_GROUP), jnp.bfloat16)
    for index in np.ndindex(*lead[:1]):
        factors = scales[index].view(jnp.float8_e8m0fnu).astype(np.float32)
        with np.errstate(over="ignore"):
            values = pairs[blocks[index]] * factors[..., None, None]
        result[index] = values.astype(jnp.bfloat16).reshape(result[index].shape)
    return result
