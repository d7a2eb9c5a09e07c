"""The fp8 wire: a token as float8 values with one f32 scale per 128 of them.

What a token becomes, to the bit, here and in the kernels of ``csrc/gpu`` (``fp8.h``, ``moves.h``):

- The scale of a group is the smallest power of two that brings its largest magnitude into the format's range.
  So dividing by it is exact, whether done by a division or by the reciprocal, on every platform.
- A code is the float8 nearest to value / scale, of two the even one. Magnitudes beyond 15/16 of 2^128, or of
  2^16 in float16, count as that: the next float8 would be an infinity of the token's dtype.
- A group whose magnitudes are all below 2^-100 is zeros, scale 0: platforms differ in what they flush there.
- A group with an infinity or a NaN comes back as NaN, all of it: its scale is NaN, its codes are zeros.

Transports that do not quantise by themselves move ``pack``'s bytes as they are; a zero byte row, which is
what padding is, unpacks to zeros.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 128
_SCALE_BYTES = 4
SMALLEST = 2.0**-100
_INFINITY_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000


def format_of(architecture: str) -> jnp.dtype:
    """The float8 of a platform: AMD's MI300 series computes in e4m3fnuz, others in e4m3fn.

    Args:
      architecture: of the devices, as ``plan.Link`` has it; "" for those that are no GPUs.
    """
    return jnp.dtype(jnp.float8_e4m3fnuz if architecture.startswith("gfx") else jnp.float8_e4m3fn)


def num_groups(hidden_size: int) -> int:
    """Scales of a row of ``hidden_size`` values; its last group may have fewer values than the others."""
    return -(-hidden_size // GROUP)


def packed_width(hidden_size: int) -> int:
    """Bytes of a packed row of ``hidden_size`` values."""
    return num_groups(hidden_size) * (GROUP + _SCALE_BYTES)


def pack(x: jax.Array, format: jnp.dtype) -> jax.Array:
    """Quantises rows.

    Args:
      x: [T, H], floating.
      format: the float8.

    Returns:
      u8[T, packed_width(H)]: the float8 values of all groups, then their scales.
    """
    num_rows, width = x.shape
    groups = num_groups(width)
    values = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * GROUP - width)))
    codes, scales = quantised(values.reshape(num_rows, groups, GROUP), format, float16=x.dtype == jnp.float16)
    code_bytes = lax.bitcast_convert_type(codes, jnp.uint8).reshape(num_rows, groups * GROUP)
    scale_bytes = lax.bitcast_convert_type(scales[..., 0], jnp.uint8).reshape(num_rows, groups * _SCALE_BYTES)
    return jnp.concatenate([code_bytes, scale_bytes], axis=1)


def quantised(values: jax.Array, format: jnp.dtype, *, float16: bool = False) -> tuple[jax.Array, jax.Array]:
    """Groups of values as codes and scales, by the rules above.

    Args:
      values: f32[..., G], a group along the last dimension.
      format: the float8.
      float16: the values were of that dtype, whose infinity is nearer.

    Returns:
      Codes [..., G] in the format, and scales f32[..., 1].
    """
    scales, inverses = _scales(values, format)
    most = 15 / 16 * 2.0 ** (16 if float16 else 128)
    scaled = jnp.where(inverses == 0, 0.0, jnp.clip(values, -most, most) * inverses)
    return rounded(scaled, format).astype(format), scales


def unpack(packed: jax.Array, hidden_size: int, dtype: jnp.dtype, format: jnp.dtype) -> jax.Array:
    """Restores rows that ``pack`` made.

    Args:
      packed: u8[C, packed_width(hidden_size)].
      hidden_size: H.
      dtype: of the result.
      format: the float8.

    Returns:
      [C, H].
    """
    num_rows = packed.shape[0]
    groups = num_groups(hidden_size)
    code_bytes = packed[:, : groups * GROUP].reshape(num_rows, groups, GROUP)
    scale_bytes = packed[:, groups * GROUP :].reshape(num_rows, groups, _SCALE_BYTES)
    values = lax.bitcast_convert_type(code_bytes, format).astype(jnp.float32)
    scales = lax.bitcast_convert_type(scale_bytes, jnp.float32)
    return (values * scales[..., None]).reshape(num_rows, groups * GROUP)[:, :hidden_size].astype(dtype)


def _scales(values: jax.Array, format: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """f32[..., 1] each: a group's scale and its reciprocal, by the bits of its largest magnitude.

    As integers, infinities and NaNs are larger than all numbers. The reciprocal is 0 where codes are zeros.
    """
    fraction, exponent = math.frexp(float(jnp.finfo(format).max))
    mantissa = int((2 * fraction - 1) * 2**23)
    bits = lax.bitcast_convert_type(values, jnp.uint32) & 0x7FFFFFFF
    largest = jnp.max(bits, axis=-1, keepdims=True)
    # A mantissa beyond that of the format's largest number carries into the exponent.
    power = ((largest + (0x7FFFFF - mantissa)) >> 23) - (exponent - 1)
    smallest = (127 + int(math.log2(SMALLEST))) << 23
    used = (largest >= smallest) & (largest < _INFINITY_BITS)
    unused = jnp.where(largest < smallest, jnp.uint32(0), jnp.uint32(_NAN_BITS))
    scales = jnp.where(used, power << 23, unused)
    inverses = jnp.where(used, (254 - power) << 23, jnp.uint32(0))
    return lax.bitcast_convert_type(scales, jnp.float32), lax.bitcast_convert_type(inverses, jnp.float32)


def rounded(scaled: jax.Array, format: jnp.dtype) -> jax.Array:
    """The nearest values that the format has, so that a cast to it has nothing left to round."""
    info = jnp.finfo(format)
    step = float(info.smallest_subnormal)
    near_zero = jnp.round(scaled * (1 / step)) * step
    normal = lax.reduce_precision(scaled, exponent_bits=8, mantissa_bits=info.nmant)
    return jnp.where(jnp.abs(scaled) < float(info.smallest_normal), near_zero, normal)
