"""Floating-point results rounded once, built from float64 and fractions, for any rounding mode."""

import math
from fractions import Fraction

import numpy as np

MANTISSA = {np.dtype("f2"): (11, -14, 15), np.dtype("f4"): (24, -126, 127), np.dtype("f8"): (53, -1022, 1023)}


def quiet(function):
    """A function whose floating-point operations raise no warnings."""

    def call(*args):
        with np.errstate(all="ignore"):
            return function(*args)

    return call


def f64(x):
    return np.asarray(x).astype(np.float64)


@quiet
def odd_sum(p, c):
    """p + c in float64, rounded to odd, so that a second rounding to a narrower type is right."""
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    bits = s.view(np.int64)
    inexact = np.isfinite(s) & (error != 0) & (bits & 1 == 0)
    # One step towards the exact sum makes the last bit odd.
    away = (error > 0) == (s > 0)
    return np.where(inexact, np.where(away, bits + 1, bits - 1), bits).astype(np.int64).view(np.float64)


@quiet
def fma(dtype):
    """(a, b, c) -> a * b + c rounded once; the product of two values of up to 26 bits is exact in float64."""
    if np.dtype(dtype) == np.float64:
        return np.vectorize(_fma64, otypes=[np.float64])
    return quiet(lambda a, b, c: odd_sum(f64(a) * f64(b), f64(c)).astype(dtype))


def _fma64(a, b, c):
    a, b, c = float(a), float(b), float(c)
    if not (math.isfinite(a) and math.isfinite(b)):
        with np.errstate(all="ignore"):
            return np.float64(a) * np.float64(b) + np.float64(c)
    if not math.isfinite(c):
        return c
    total = Fraction(a) * Fraction(b) + Fraction(c)
    if total == 0:
        # An exact zero has the sign that both addends share, else a plus.
        product_negative = math.copysign(1, a) * math.copysign(1, b) < 0
        both = (a == 0 or b == 0) and c == 0
        return -0.0 if both and product_negative and math.copysign(1, c) < 0 else 0.0
    try:
        return float(total) if total > 0 else -float(-total)
    except OverflowError:
        return math.inf if total > 0 else -math.inf


def round_to(dtype, value, mode):
    """A Fraction rounded to a float of `dtype`: mode is even, up, down or zero. Not for zeros."""
    bits, low, high = MANTISSA[np.dtype(dtype)]
    negative, magnitude = value < 0, abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent = exponent if Fraction(2) ** exponent <= magnitude else exponent - 1
    step = Fraction(2) ** (max(exponent, low) - bits + 1)
    count, remainder = divmod(magnitude, step)
    count = int(count)
    if remainder:
        up = {"up": not negative, "down": negative, "zero": False}.get(mode)
        if up is None:
            up = remainder * 2 > step or (remainder * 2 == step and count % 2 == 1)
        count += up
    result = count * step
    top = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** high
    if result > top:
        to_top = mode == "zero" or mode == ("down" if not negative else "up")
        result = float(top) if to_top else math.inf
    return np.array(-float(result) if negative else float(result), dtype)


def flushed(x):
    """Denormals become zeros of their sign."""
    x = np.asarray(x)
    tiny = np.finfo(x.dtype).tiny
    return np.where(np.abs(x) < tiny, np.copysign(np.zeros_like(x), x), x)
