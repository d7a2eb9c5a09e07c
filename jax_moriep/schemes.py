"""How experts' weights and rows are quantised: the schemes of ``MoEConfig.expert_quant``.

=============  =======================  ============================  ======  ==============================
scheme         a scale of w1 and w2     a scale of the experts' rows  codes   scale
=============  =======================  ============================  ======  ==============================
fp8_block      128 x 128 weights        128 columns of a row          float8  the power of two of ``quant``
fp8_token      a row of weights         a row                         float8  the power of two of ``quant``
int8_token     a row of weights         a row                         int8    largest magnitude / 127
=============  =======================  ============================  ======  ==============================

Activated rows, which the second product reads, have one scale for 128 columns in every scheme. A value is its
code times its scale. Sums run in float32, so an implementation may multiply codes and scale the partial sums,
or multiply the values: that is the same up to the order of a sum.

Groups of tiny numbers are zeros with scale 0, and one with an infinity or a NaN comes back as NaN, as
``quant`` has it, in every scheme. Scales that come from elsewhere may be any float32. The rows of fp8_block
and the fp8 wire have one rule, so quantising rows that came over that wire changes nothing.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_moriep import quant
from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.errors import ConfigError, rule

BLOCK = quant.GROUP
_INT8_MOST = 127.0
FORMATS = {"e4m3fn": jnp.dtype(jnp.float8_e4m3fn), "e4m3fnuz": jnp.dtype(jnp.float8_e4m3fnuz)}


class Quantised(NamedTuple):
    """Codes and their scales."""

    codes: jax.Array
    scales: jax.Array


def format_name(architecture: str) -> str:
    """The key in ``FORMATS`` of a platform's float8, see ``quant.format_of``."""
    wanted = quant.format_of(architecture)
    return next(name for name, dtype in FORMATS.items() if dtype == wanted)


def code_dtype(scheme: str, format: jnp.dtype) -> jnp.dtype:
    """Of a scheme's codes, where float8 ones are in ``format``."""
    return jnp.dtype(jnp.int8) if scheme == "int8_token" else format


def is_codes(dtype: Any) -> bool:
    """Whether weights of a dtype are codes, not master weights; also of float8 that no scheme has."""
    return jnp.dtype(dtype).itemsize == 1


def check_weights(params: MoEParams, cfg: MoEConfig) -> None:
    """Raises ConfigError unless w1, w2 and their scales are of one kind, and of the one that cfg names: the
    codes of its scheme with scales, or floating weights without."""
    scheme, w1, w2 = cfg.expert_quant, params.w1, params.w2
    scaled = [name for name in ("w1_scale", "w2_scale") if getattr(params, name) is not None]
    kinds = {name: str(w.dtype) for name, w in (("w1", w1), ("w2", w2)) if w is not None}
    coded = [name for name, w in (("w1", w1), ("w2", w2)) if w is not None and is_codes(w.dtype)]
    if not coded:
        if scaled:
            raise ConfigError(
                rule(
                    f"params.{scaled[0]}",
                    "an array",
                    f"be None beside floating weights ({kinds})",
                    "pass what jm.quantize_params gives, or drop the scales",
                )
            )
        return
    if scheme is None:
        raise ConfigError(
            rule(
                f"params.{coded[0]}.dtype",
                kinds[coded[0]],
                "be bfloat16, float16 or float32 with expert_quant=None",
                "set expert_quant to the scheme of these weights, or dequantise them",
            )
        )
    made_by = _scheme_of(params)
    if made_by not in (None, scheme) and params.w1_scale is not None:
        raise ConfigError(
            rule(
                "expert_quant",
                scheme,
                f"be {made_by!r}, the scheme of these codes (w1 {kinds['w1']}, w1_scale "
                f"{list(params.w1_scale.shape)})",
                "set it so, or quantise the floating weights for this config (jm.quantize_params)",
            )
        )
    allowed = ["int8"] if scheme == "int8_token" else [str(dtype) for dtype in FORMATS.values()]
    if len(coded) < 2 or len(scaled) < 2 or len(set(kinds.values())) > 1 or kinds["w1"] not in allowed:
        raise ConfigError(
            f"params have {kinds} and {scaled or 'no scales'}, which must be {' or '.join(allowed)} in both, "
            f"with w1_scale and w2_scale, for expert_quant={scheme!r}; pass what jm.quantize_params gives "
            "for this config, or floating weights without scales"
        )
    for name in scaled:
        if getattr(params, name).dtype != jnp.float32:
            raise ConfigError(
                rule(f"params.{name}.dtype", str(getattr(params, name).dtype), "be float32", "cast it")
            )


def _scheme_of(params: MoEParams) -> str | None:
    """The scheme that made the codes; None if they are none of a scheme, or are not complete."""
    w1, w2, scales = params.w1, params.w2, [s for s in (params.w1_scale, params.w2_scale) if s is not None]
    if w1 is None or w2 is None or len(scales) < 2 or w1.dtype != w2.dtype:
        return None
    axes = {scale.ndim for scale in scales}
    if w1.dtype == jnp.int8 and axes == {2}:
        return "int8_token"
    if w1.dtype not in FORMATS.values() or len(axes) > 1:
        return None
    return {2: "fp8_token", 3: "fp8_block"}.get(axes.pop())


def quantise_rows(x: jax.Array, scheme: str, dtype: jnp.dtype) -> Quantised:
    """The experts' rows.

    Args:
      x: [..., H], floating.
      scheme: a name in ``config.SCHEMES``.
      dtype: of the codes.

    Returns:
      Codes [..., H], scales f32[..., ceil(H/128)], or f32[..., 1] with a scale for each row.
    """
    return _by_columns(x, BLOCK if scheme == "fp8_block" else x.shape[-1], dtype)


def quantise_activated(h: jax.Array, dtype: jnp.dtype) -> Quantised:
    """Activated rows: h [..., I] to codes [..., I] and scales f32[..., ceil(I/128)]."""
    return _by_columns(h, BLOCK, dtype)


def dequantise_rows(quantised: Quantised) -> jax.Array:
    """f32[..., H] of what ``quantise_rows`` or ``quantise_activated`` gave."""
    codes, scales = quantised
    width, groups = codes.shape[-1], scales.shape[-1]
    group = width if groups == 1 else BLOCK
    return codes.astype(jnp.float32) * _spread(scales, -1, group, width)


def scale_shapes(scheme: str, num_experts: int, hidden: int, inner: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of w1_scale and w2_scale for [E, 2*I, H] and [E, H, I]."""
    if scheme == "fp8_block":
        tall, wide = -(-inner // BLOCK), -(-hidden // BLOCK)
        return (num_experts, 2 * tall, wide), (num_experts, wide, tall)
    return (num_experts, 2 * inner), (num_experts, hidden)


def quantise_weights(w: jax.Array, scheme: str, dtype: jnp.dtype, *, parts: int) -> Quantised:
    """Weights of experts.

    Args:
      w: [..., N, D], floating; a product contracts D.
      scheme: a name in ``config.SCHEMES``.
      dtype: of the codes.
      parts: 2 for w1, whose N are gate and up: no block has rows of both; 1 for w2.

    Returns:
      Codes [..., N, D], and scales f32[..., parts * ceil(N/parts/128), ceil(D/128)] or f32[..., N].
    """
    if scheme != "fp8_block":
        codes, scales = _by_columns(w, w.shape[-1], dtype)
        return Quantised(codes, scales[..., 0])
    *lead, tall, wide = w.shape
    blocks = _blocks(w.astype(jnp.float32), parts)
    rows, cols = blocks.shape[-4], blocks.shape[-2]
    codes, scales = _codes_of(jnp.swapaxes(blocks, -3, -2).reshape(*lead, rows, cols, -1), dtype)
    codes = jnp.swapaxes(codes.reshape(*lead, rows, cols, BLOCK, BLOCK), -3, -2)
    codes = codes.reshape(*lead, parts, rows // parts * BLOCK, cols * BLOCK)
    codes = codes[..., : tall // parts, :wide]
    return Quantised(codes.reshape(*lead, tall, wide), scales[..., 0])


def dequantise_weights(codes: jax.Array, scales: jax.Array, scheme: str, *, parts: int) -> jax.Array:
    """f32[..., N, D] of weights as ``quantise_weights`` gives them."""
    return codes.astype(jnp.float32) * spread_weight_scales(scales, scheme, codes.shape[-2:], parts=parts)


def spread_weight_scales(scales: jax.Array, scheme: str, shape: tuple[int, ...], *, parts: int) -> jax.Array:
    """The scale of each weight of [..., N, D], ``shape`` being (N, D); [..., N, 1] with one for each row."""
    if scheme != "fp8_block":
        return scales[..., None]
    tall, wide = shape
    *lead, rows, _ = scales.shape
    by_part = scales.reshape(*lead, parts, rows // parts, scales.shape[-1])
    spread = _spread(_spread(by_part, -2, BLOCK, tall // parts), -1, BLOCK, wide)
    return spread.reshape(*lead, tall, wide)


def convert_weights(
    codes: jax.Array, scales: jax.Array, scheme: str, format: jnp.dtype, *, parts: int
) -> Quantised:
    """Float8 weights in the other float8 format.

    The bits of an e4m3fn code are half its value in e4m3fnuz, so codes stay and scales double; the negative
    zero and the NaNs, which have other bits there, become 0 and NaN. The way back halves scales, but for the
    groups that hold a +-240, which e4m3fn lacks a code for: there the scale stays and the codes are rounded
    to their own value, which is exact for all but odd multiples of 2**-10.

    Args:
      codes: [..., N, D].
      scales: as ``quantise_weights`` gives them.
      scheme: one of float8.
      format: the one wanted.
      parts: see ``quantise_weights``.

    Returns:
      The same weights in ``format``.
    """
    if codes.dtype == format:
        return Quantised(codes, scales)
    bits = lax.bitcast_convert_type(codes, jnp.uint8)
    if format == FORMATS["e4m3fnuz"]:
        bits = jnp.where(bits == 0x80, 0, jnp.where(bits & 0x7F == 0x7F, 0x80, bits)).astype(jnp.uint8)
        return Quantised(lax.bitcast_convert_type(bits, format), scales * 2)
    largest = bits & 0x7F == 0x7F
    held = _any_of_group(largest, scheme, parts)
    # A NaN of e4m3fnuz has the bits of the other's negative zero.
    same = lax.bitcast_convert_type(jnp.where(bits == 0x80, 0x7F, bits).astype(jnp.uint8), format)
    own = quant.rounded(codes.astype(jnp.float32), format).astype(format)
    wide = spread_weight_scales(held.astype(jnp.float32), scheme, codes.shape[-2:], parts=parts)
    return Quantised(jnp.where(wide > 0, own, same), jnp.where(held, scales, scales / 2))


def _any_of_group(flags: jax.Array, scheme: str, parts: int) -> jax.Array:
    """Whether any of a scale's weights is flagged, in the shape of the scales."""
    if scheme != "fp8_block":
        return jnp.any(flags, axis=-1)
    return jnp.any(_blocks(flags, parts), axis=(-3, -1))


def _blocks(w: jax.Array, parts: int) -> jax.Array:
    """[..., N, D] as [..., rows of blocks, 128, blocks in a row, 128]; zeros fill a part's last blocks."""
    *lead, tall, wide = w.shape
    height = tall // parts
    rows, cols = -(-height // BLOCK), -(-wide // BLOCK)
    padding = [(0, 0)] * (len(lead) + 1) + [(0, rows * BLOCK - height), (0, cols * BLOCK - wide)]
    blocks = jnp.pad(w.reshape(*lead, parts, height, wide), padding)
    return blocks.reshape(*lead, parts * rows, BLOCK, cols, BLOCK)


def _by_columns(x: jax.Array, group: int, dtype: jnp.dtype) -> Quantised:
    """Codes [..., W] of x [..., W], and a scale for every ``group`` of its columns."""
    *lead, width = x.shape
    groups = -(-width // group)
    values = jnp.pad(x.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, groups * group - width)])
    codes, scales = _codes_of(values.reshape(*lead, groups, group), dtype)
    return Quantised(codes.reshape(*lead, groups * group)[..., :width], scales[..., 0])


def _codes_of(values: jax.Array, dtype: jnp.dtype) -> Quantised:
    """Codes of groups [..., G] and their scales [..., 1]."""
    if dtype != jnp.int8:
        return Quantised(*quant.quantised(values, dtype))
    largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
    finite, used = jnp.isfinite(largest), largest >= quant.SMALLEST
    scales = jnp.where(used, largest / _INT8_MOST, 0.0)
    # A division: a product with the reciprocal would be off by one code at times.
    codes = jnp.where(used & finite, jnp.round(values / jnp.where(used, scales, 1.0)), 0.0)
    return Quantised(codes.astype(dtype), jnp.where(finite, scales, math.nan))


def _spread(scales: jax.Array, axis: int, size: int, length: int) -> jax.Array:
    """Each scale ``size`` times along an axis, ``length`` in all."""
    return lax.slice_in_dim(jnp.repeat(scales, size, axis), 0, length, axis=axis)
