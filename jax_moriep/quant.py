"""The fp8 wire: a token as float8 values with one f32 scale per 128 of them, packed into bytes.

Transports move the bytes as they are; a zero byte row, which is what padding is, unpacks to zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 128
_FORMAT = jnp.float8_e4m3fn
_SCALE_BYTES = 4


def packed_width(hidden_size: int) -> int:
    """Bytes of a packed row of ``hidden_size`` values."""
    return -(-hidden_size // GROUP) * (GROUP + _SCALE_BYTES)


def pack(x: jax.Array) -> jax.Array:
    """Quantises rows.

    Args:
      x: [T, H], floating.

    Returns:
      u8[T, packed_width(H)]: the float8 values of all groups, then their scales.
    """
    num_rows, width = x.shape
    groups = -(-width // GROUP)
    values = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * GROUP - width)))
    values = values.reshape(num_rows, groups, GROUP)
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    scales = jnp.where(largest == 0, 0.0, largest / float(jnp.finfo(_FORMAT).max))
    scaled = jnp.where(scales == 0, 0.0, values / jnp.where(scales == 0, 1.0, scales))
    value_bytes = lax.bitcast_convert_type(scaled.astype(_FORMAT), jnp.uint8).reshape(
        num_rows, groups * GROUP
    )
    scale_bytes = lax.bitcast_convert_type(scales[..., 0], jnp.uint8).reshape(num_rows, groups * _SCALE_BYTES)
    return jnp.concatenate([value_bytes, scale_bytes], axis=1)


def unpack(packed: jax.Array, hidden_size: int, dtype: jnp.dtype) -> jax.Array:
    """Restores rows that ``pack`` made.

    Args:
      packed: u8[C, packed_width(hidden_size)].
      hidden_size: H.
      dtype: of the result.

    Returns:
      [C, H].
    """
    num_rows = packed.shape[0]
    groups = -(-hidden_size // GROUP)
    value_bytes = packed[:, : groups * GROUP].reshape(num_rows, groups, GROUP)
    scale_bytes = packed[:, groups * GROUP :].reshape(num_rows, groups, _SCALE_BYTES)
    values = lax.bitcast_convert_type(value_bytes, _FORMAT).astype(jnp.float32)
    scales = lax.bitcast_convert_type(scale_bytes, jnp.float32)
    return (values * scales[..., None]).reshape(num_rows, groups * GROUP)[:, :hidden_size].astype(dtype)
