"""The fp8 wire's numbers against loops in float64 that know the formats' definitions alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep import quant

FORMATS = {"e4m3fn": (7, 448.0), "e4m3fnuz": (8, 240.0)}
DTYPES = ["float32", "bfloat16", "float16"]


def value_of(code, name):
    bias, _ = FORMATS[name]
    if name == "e4m3fn" and code & 0x7F == 0x7F or name == "e4m3fnuz" and code == 0x80:
        return np.nan
    exponent, fraction = code >> 3 & 15, (code & 7) / 8
    magnitude = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
    return -magnitude if code & 0x80 else magnitude


def nearest_codes(values, name):
    _, most = FORMATS[name]
    table = np.array([v for v in (value_of(c, name) for c in range(0x80)) if v <= most])
    above = np.clip(np.searchsorted(table, np.abs(values)), 1, len(table) - 1)
    to_below, to_above = np.abs(values) - table[above - 1], table[above] - np.abs(values)
    codes = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, above - 1)
    negative = np.signbit(values) & ~((name == "e4m3fnuz") & (codes == 0))
    return codes | np.where(negative, 0x80, 0)


def packed(x, name):
    """(codes, scales) of float64 rows."""
    _, most = FORMATS[name]
    limit = 15 / 16 * 2.0 ** (16 if x.dtype == np.float16 else 128)
    x = x.astype(np.float64)
    codes = np.zeros(x.shape, np.int64)
    scales = np.zeros((len(x), -(-x.shape[1] // 128)))
    for row, group in np.ndindex(scales.shape):
        here = np.s_[row, group * 128 : (group + 1) * 128]
        largest = np.abs(x[here]).max()
        if not np.isfinite(largest):
            scales[row, group] = np.nan
        elif largest >= 2.0**-100:
            scale = 2.0**-150
            while largest / scale > most:
                scale *= 2
            scales[row, group] = scale
            codes[here] = nearest_codes(np.clip(x[here], -limit, limit) / scale, name)
    return codes, scales


def wild(dtype, width):
    """Rows whose groups are ordinary, tiny, huge, of all sizes, halfway between codes, zero or not finite."""
    rng = np.random.default_rng(width)
    shape = (24, width)
    ordinary = rng.normal(size=shape)
    info = jnp.finfo(dtype)
    low, high = float(info.minexp), float(info.maxexp)
    with np.errstate(over="ignore"):
        x = ordinary.astype(np.float32)
        x[3:6] = rng.integers(-31, 32, (3, width)) / 16
        x[6:9] = np.ldexp(1 + rng.random((3, width)), int(high) - 1) * np.sign(ordinary[6:9])
        x[9:12] = np.ldexp(rng.normal(size=(3, width)), int(low) - rng.integers(0, 6, (3, width)))
        x[12:18] = np.ldexp(ordinary[12:18], rng.integers(int(low), int(high) - 2, (6, width)))
        x[18] = -0.0
        x[19, width // 2] = np.inf
        x[20, width // 3] = np.nan
        x[21] = -float(info.max)
        x[22] = rng.choice([2.0**-100, 1.5 * 2.0**-100, 0.99 * 2.0**-100], width)
        return np.asarray(x).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 200, 1024])
@pytest.mark.parametrize("name", FORMATS)
def test_every_bit_follows_from_the_definition(name, width, dtype):
    fp8 = jnp.dtype(f"float8_{name}")
    dtype = jnp.dtype(dtype)
    x = wild(dtype, width)
    bytes_ = np.asarray(jax.jit(quant.pack, static_argnums=1)(x, fp8))
    assert bytes_.shape == (len(x), quant.packed_width(width))
    codes, scales = packed(x, name)
    groups = scales.shape[1]
    np.testing.assert_array_equal(bytes_[:, :width], codes)
    got_scales = bytes_[:, groups * 128 :].copy().view(np.float32)
    np.testing.assert_array_equal(got_scales, scales.astype(np.float32))

    back = np.asarray(jax.jit(quant.unpack, static_argnums=(1, 2, 3))(bytes_, width, dtype, fp8))
    table = np.array([value_of(code, name) for code in range(256)])
    want = (table[codes] * np.repeat(scales, 128, axis=1)[:, :width]).astype(np.float32).astype(dtype)
    assert back.dtype == dtype
    back, want = back.astype(np.float64), want.astype(np.float64)
    np.testing.assert_array_equal(back, want)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.signbit(back[finite]), np.signbit(want[finite]))


def test_what_was_finite_stays_finite():
    for dtype in map(jnp.dtype, DTYPES):
        for name in FORMATS:
            x = np.full((1, 128), jnp.finfo(dtype).max, dtype)
            fp8 = jnp.dtype(f"float8_{name}")
            back = quant.unpack(quant.pack(x, fp8), 128, dtype, fp8)
            assert np.isfinite(np.asarray(back, np.float64)).all()


def test_padding_unpacks_to_zeros():
    for name in FORMATS:
        fp8 = jnp.dtype(f"float8_{name}")
        rows = quant.unpack(jnp.zeros((3, quant.packed_width(200)), jnp.uint8), 200, jnp.bfloat16, fp8)
        np.testing.assert_array_equal(np.asarray(rows, np.float32), np.zeros((3, 200)))


def test_formats_of_platforms():
    assert quant.format_of("gfx942") == jnp.float8_e4m3fnuz
    for architecture in ("", "sm_90"):
        assert quant.format_of(architecture) == jnp.float8_e4m3fn
