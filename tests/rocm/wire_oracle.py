"""What the fp8 wire makes of tokens on AMD's GPUs, in NumPy and ml_dtypes alone."""

import ml_dtypes
import numpy as np

GROUP = 128
LARGEST = 240.0  # of e4m3fnuz
SMALLEST = 2.0**-100  # groups below it are zeros


def num_scales(hidden: int) -> int:
    return (hidden + GROUP - 1) // GROUP


def there(x: np.ndarray) -> np.ndarray:
    """x [..., H] as it is at its destination: of each group a float8 of value / scale, times the scale.

    The scale is the smallest power of two that brings the group into the format's range.
    """
    out = np.empty_like(x)
    for first in range(0, x.shape[-1], GROUP):
        values = x[..., first : first + GROUP].astype(np.float64)
        largest = np.abs(values).max(axis=-1, keepdims=True)
        finite = np.where(np.isfinite(largest) & (largest >= SMALLEST), largest, LARGEST)
        # The ratio is a power of two exactly where the largest value is 240 of its steps.
        scale = np.exp2(np.ceil(np.log2(finite / LARGEST)))
        with np.errstate(invalid="ignore"):
            codes = (values / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fnuz)
        restored = codes.astype(np.float64) * scale
        restored = np.where(largest < SMALLEST, 0.0, np.where(np.isfinite(largest), restored, np.nan))
        out[..., first : first + GROUP] = restored.astype(x.dtype)
    return out


def wild(rng: np.random.Generator, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Tokens [R, T, H] of many sizes, some of whose groups are zero, tiny or not finite."""
    x = np.ldexp(rng.normal(size=shape), rng.integers(-14, 12, shape))
    x[:, 1::7, :40] = -0.0
    x[:, 2::7, :GROUP] = np.ldexp(x[:, 2::7, :GROUP], -100)
    x[:, 3::7, -1] = np.inf
    x[:, 4::7, 3] = np.nan
    # Halfway between two codes, and a largest value that is the format's.
    x[:, 5::7] = rng.integers(-15, 16, x[:, 5::7].shape) / 16.0
    x[:, 5::7, 0] = 240.0 / 256
    return x.astype(dtype)
