"""How an operand's 32-bit words are read, written, made up and compared: one line per kind of value."""

import dataclasses

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fnuz)
BF8 = np.dtype(ml_dtypes.float8_e5m2fnuz)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A value of `count` elements of `dtype` in `dwords` words; elements fill the words from the low end."""

    dtype: np.dtype
    count: int = 1
    specials: tuple = ()
    # What the words' remaining bits must be after a write: zero, or anything.
    rest_is_zero: bool = True

    @property
    def dwords(self):
        return -(-self.dtype.itemsize * self.count // 4)

    @property
    def is_float(self):
        return self.dtype.kind == "f" or self.dtype in (BF16, FP8, BF8)

    def decode(self, words):
        """uint32 [..., >= dwords] -> [...] or, of several elements, [..., count]."""
        words = np.ascontiguousarray(words[..., : self.dwords])
        elements = words.view(self.dtype)[..., : self.count]
        return elements[..., 0] if self.count == 1 else elements

    def encode(self, values):
        """[...] or [..., count] -> uint32 [..., dwords], the words' remaining bits zero."""
        values = np.asarray(values)
        if self.is_float:
            with np.errstate(all="ignore"):
                values = values.astype(self.dtype)
        else:
            values = values.astype(self.dtype, casting="unsafe")
        values = values[..., None] if self.count == 1 else values
        per_word = self.dwords * 4 // self.dtype.itemsize
        padded = np.zeros((*values.shape[:-1], per_word), self.dtype)
        padded[..., : self.count] = values
        return padded.view(np.uint32)

    def random(self, rng, shape):
        """Words of specials, of everyday values and of random bits, every unused bit random."""
        with np.errstate(all="ignore"):
            return self._random(rng, shape)

    def _random(self, rng, shape):
        raw = rng.integers(0, 2**32, (*shape, self.dwords), dtype=np.uint32)
        per_word = self.dwords * 4 // self.dtype.itemsize
        elements = raw.view(self.dtype)
        where = (*shape, per_word)
        if self.is_float:
            spread = {2: 4, 4: 12, 8: 40}.get(self.dtype.itemsize, 2)
            everyday = rng.standard_normal(where) * np.exp2(rng.integers(-spread, spread, where))
            everyday = np.where(rng.random(where) < 0.3, np.round(everyday), everyday)
            elements = np.where(rng.random(where) < 0.6, everyday.astype(self.dtype), elements)
            # A signalling NaN is an operand of its own tests: everywhere else NaNs are quiet.
            nans = np.isnan(elements.astype(np.float64))
            elements = np.where(nans, np.array(np.nan, self.dtype), elements)
        else:
            small = rng.integers(-40, 70, where).astype(self.dtype, casting="unsafe")
            elements = np.where(rng.random(where) < 0.3, small, elements)
        if self.specials:
            specials = np.array([np.array(s).astype(self.dtype, casting="unsafe") for s in self.specials])
            chosen = specials[rng.integers(0, len(specials), where)]
            elements = np.where(rng.random(where) < 0.3, chosen, elements)
        # The elements beyond `count` stay the raw bits that they were.
        out = raw.view(self.dtype).copy()
        out[..., : self.count] = elements[..., : self.count]
        return np.ascontiguousarray(out).view(np.uint32)

    def differing(self, got, expected, ulp):
        """uint32 words of both -> [...] where they do not agree. Any NaN is as good as another."""
        with np.errstate(all="ignore"):
            return self._differing(got, expected, ulp)

    def _differing(self, got, expected, ulp):
        if not self.is_float:
            bad = self._elements(got) != self._elements(expected)
        else:
            a, b = self._elements(got).astype(np.longdouble), self._elements(expected).astype(np.longdouble)
            if ulp:
                near = np.abs(a - b) <= ulp * np.spacing(np.abs(b.astype(self.dtype))).astype(np.longdouble)
                same = (a == b) | near
            else:
                same = (a == b) & (np.signbit(a) == np.signbit(b))
            bad = ~(same | (np.isnan(a) & np.isnan(b)))
        bad = bad.any(axis=-1)
        if self.rest_is_zero and self.dwords * 4 != self.dtype.itemsize * self.count:
            used = self.dtype.itemsize * self.count * 8 % 32
            bad |= (got[..., self.dwords - 1] >> np.uint32(used)) != 0
        return bad

    def _elements(self, words):
        return np.ascontiguousarray(words[..., : self.dwords]).view(self.dtype)[..., : self.count]


def _integer_specials(bits, signed):
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    middle = 2 ** (bits - 1) - 1
    return tuple(
        {0, 1, low, high, low + 1, high - 1, middle, high // 3, bits - 1} | ({-1} if signed else {bits})
    )


def _float_specials(dtype):
    info = ml_dtypes.finfo(dtype)
    tiny, least = float(info.tiny), float(info.smallest_subnormal)
    top, eps = float(info.max), float(info.eps)
    signed = (0.0, 1.0, 0.5, 2.5, np.inf, top, tiny, least, tiny - least, 1 + eps, 1 - eps / 2, 3 * least)
    return (*signed, *(-x for x in signed), np.nan)


def _with_halves(specials):
    """Ties, and values about the ends of the integers, for conversions."""
    edges = (2.0**31, 2.0**32, 2.0**15, 2.0**16, 255.5, 65504.0, 0.49999997)
    return (*specials, *edges, *(-x for x in edges), 1.5, -1.5, 3.5, -0.25)


KINDS: dict[str, Kind] = {}
for _bits in (8, 16, 32, 64):
    KINDS[f"u{_bits}"] = Kind(np.dtype(f"u{_bits // 8}"), 1, _integer_specials(_bits, False))
    KINDS[f"i{_bits}"] = Kind(np.dtype(f"i{_bits // 8}"), 1, _integer_specials(_bits, True))
    KINDS[f"2xu{_bits}"] = dataclasses.replace(KINDS[f"u{_bits}"], count=2)
    KINDS[f"2xi{_bits}"] = dataclasses.replace(KINDS[f"i{_bits}"], count=2)
    KINDS[f"4xu{_bits}"] = dataclasses.replace(KINDS[f"u{_bits}"], count=4)
    KINDS[f"4xi{_bits}"] = dataclasses.replace(KINDS[f"i{_bits}"], count=4)
for _name, _dtype in {
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "bf16": BF16,
}.items():
    KINDS[_name] = Kind(_dtype, 1, _float_specials(_dtype))
    KINDS[f"2x{_name}"] = dataclasses.replace(KINDS[_name], count=2)
    # Without sign or size limits that would keep conversions from their edges.
    KINDS[f"{_name}c"] = dataclasses.replace(KINDS[_name], specials=_with_halves(KINDS[_name].specials))
KINDS["2xf32c"] = dataclasses.replace(KINDS["f32c"], count=2)
KINDS["2xf16c"] = dataclasses.replace(KINDS["f16c"], count=2)
for _name, _dtype in {"fp8": FP8, "bf8": BF8}.items():
    KINDS[_name] = Kind(_dtype)
    KINDS[f"2x{_name}"] = Kind(_dtype, 2)
    KINDS[f"4x{_name}"] = Kind(_dtype, 4)
# A 16-bit result whose register's upper half may be anything: kept or cleared, as the instruction likes.
for _name in ("f16", "u16", "i16", "2xfp8", "2xbf8"):
    KINDS[f"{_name}lo"] = dataclasses.replace(KINDS[_name], rest_is_zero=False)
