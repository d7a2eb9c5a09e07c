"""Conversions between numbers: one line each, with its meaning."""

import numpy as np

from isa.exact import f64, quiet
from isa.frame import case
from isa.kinds import BF8, FP8
from isa.table_float import ZERO_SIGN_FREE

U8, U16, U32, I32 = np.uint8, np.uint16, np.uint32, np.int32
F16, F32, F64 = np.float16, np.float32, np.float64


def to_integer(low, high, rounded=np.trunc):
    """Saturates; a NaN becomes 0."""

    @quiet
    def call(a):
        value = np.nan_to_num(np.clip(rounded(f64(a)), low, high), nan=0.0)
        return value.astype(np.int64)

    return call


def to(dtype):
    return quiet(lambda a: a.astype(dtype))


@quiet
def toward_zero_f16(x):
    """float32 -> the float16 next to it on the side of zero."""
    nearest = x.astype(F16)
    beyond = np.abs(f64(nearest)) > np.abs(f64(x))
    back = np.nextafter(nearest, F16(0))
    return np.where(beyond, back, nearest)


def normalised(low, high):
    return quiet(lambda a: np.nan_to_num(np.rint(np.clip(f64(a), -1 if low else 0, 1) * high), nan=0.0))


def both(function):
    return lambda a, b: np.stack([function(a), function(b)], axis=-1)


def half_word(old, word, high):
    """The old pair of 16-bit halves with one replaced."""
    return np.stack([old[..., 0], word] if high else [word, old[..., 1]], axis=-1)


def packed_fp8(dtype, high):
    @quiet
    def call(old, a, b):
        bytes_ = [v.astype(dtype).view(U8).astype(U16) for v in (a, b)]
        return half_word(old, bytes_[0] | (bytes_[1] << U16(8)), high)

    return call


def one_fp8(dtype, byte, rounded=lambda a: a):
    @quiet
    def call(old, a):
        out = old.copy()
        out[..., byte] = rounded(a).astype(dtype).view(U8)
        return out

    return call


def representable(dtype):
    """Numbers that the 8-bit type holds, so that no random bits can change them."""

    def adjust(lanes, state):
        rng = np.random.default_rng(29)
        codes = rng.integers(0, 256, lanes.shape[:2], dtype=U8)
        codes[codes == 0x80] = 0x11
        lanes[..., 0] = codes.view(dtype).astype(F32).view(U32)

    return adjust


def fp8():
    lines = []
    for name, dtype in (("fp8", FP8), ("bf8", BF8)):
        wide = quiet(lambda a: a.astype(F32))
        lines += [
            case(f"v_cvt_f32_{name}", f"{name} -> f32", wide),
            *(
                case(
                    f"v_cvt_f32_{name}_sdwa D, A src0_sel:BYTE_{i}",
                    f"4x{name} -> f32",
                    lambda a, i=i: a[..., i].astype(F32),
                )
                for i in range(4)
            ),
            case(f"v_cvt_pk_f32_{name}", f"2x{name} -> 2xf32", wide),
            case(
                f"v_cvt_pk_f32_{name}_sdwa D2, A src0_sel:WORD_1",
                f"4x{name} -> 2xf32",
                lambda a: a[..., 2:].astype(F32),
            ),
            case(
                f"v_cvt_pk_{name}_f32 D, A, B",
                "old:2xu16 f32 f32 -> 2xu16",
                packed_fp8(dtype, False),
                adjust=_fp8_range,
            ),
            case(
                f"v_cvt_pk_{name}_f32 D, A, B op_sel:[0,0,1]",
                "old:2xu16 f32 f32 -> 2xu16",
                packed_fp8(dtype, True),
                adjust=_fp8_range,
            ),
            case(
                f"v_cvt_pk_{name}_f32 D, -A, |B|",
                "old:2xu16 f32 f32 -> 2xu16",
                lambda old, a, b, dtype=dtype: packed_fp8(dtype, False)(old, -a, np.abs(b)),
                adjust=_fp8_range,
            ),
            *(
                case(
                    f"v_cvt_sr_{name}_f32 D, A, B op_sel:[0,0,{byte & 1},{byte >> 1}]",
                    "old:4xu8 f32 -> 4xu8",
                    one_fp8(dtype, byte),
                    adjust=representable(dtype),
                )
                for byte in range(4)
            ),
        ]
    return lines


def _fp8_range(lanes, state):
    """Magnitudes about those of the 8-bit types, ties between two codes among them."""
    rng = np.random.default_rng(31)
    for register in (0, 4):
        shape = lanes.shape[:2]
        values = rng.integers(-64, 65, shape) * np.exp2(rng.integers(-16, 10, shape))
        values = np.where(rng.random(shape) < 0.3, rng.standard_normal(shape) * 50, values)
        values = np.where(
            rng.random(shape) < 0.1, rng.choice([0.0, -0.0, np.inf, np.nan, 240, 248, 1e9], shape), values
        )
        lanes[..., register] = values.astype(F32).view(U32)


def _eighths(lanes, state):
    """Numbers whose sum with a half is exact, for how it is rounded is not said anywhere."""
    rng = np.random.default_rng(37)
    shape = lanes.shape[:2]
    values = rng.integers(-(2**18), 2**18, shape) / 8
    values = np.where(
        rng.random(shape) < 0.2, rng.choice([np.inf, -np.inf, np.nan, 1e10, -1e10, 0.5, -0.5], shape), values
    )
    lanes[..., 0] = values.astype(F32).view(U32)


def _byte(i):
    return lambda a: (a >> U32(8 * i)) & U32(0xFF)


def plain():
    i32, u32 = (-(2**31), 2**31 - 1), (0, 2**32 - 1)
    i16, u16 = (-(2**15), 2**15 - 1), (0, 2**16 - 1)
    half_up = quiet(lambda a: np.floor(a + 0.5))
    return [
        case("v_cvt_f32_i32", "i32 -> f32", to(F32)),
        case("v_cvt_f32_u32", "u32 -> f32", to(F32)),
        case("v_cvt_f64_i32", "i32 -> f64", to(F64)),
        case("v_cvt_f64_u32", "u32 -> f64", to(F64)),
        case("v_cvt_f16_u16", "u16 -> f16", to(F16)),
        case("v_cvt_f16_i16", "i16 -> f16", to(F16)),
        case("v_cvt_f16_f32", "f32c -> f16", to(F16)),
        case("v_cvt_f32_f16", "f16 -> f32", to(F32)),
        case("v_cvt_f64_f32", "f32 -> f64", to(F64)),
        case("v_cvt_f32_f64", "f64 -> f32", to(F32)),
        case("v_cvt_i32_f32", "f32c -> i32", to_integer(*i32)),
        case("v_cvt_u32_f32", "f32c -> u32", to_integer(*u32)),
        case("v_cvt_i32_f64", "f64c -> i32", to_integer(*i32)),
        case("v_cvt_u32_f64", "f64c -> u32", to_integer(*u32)),
        case("v_cvt_i16_f16", "f16c -> i16lo", to_integer(*i16)),
        case("v_cvt_u16_f16", "f16c -> u16lo", to_integer(*u16)),
        case("v_cvt_rpi_i32_f32", "f32c -> i32", to_integer(*i32, half_up), adjust=_eighths),
        case("v_cvt_flr_i32_f32", "f32c -> i32", to_integer(*i32, np.floor)),
        *(
            case(f"v_cvt_f32_ubyte{i}", "u32 -> f32", lambda a, i=i: _byte(i)(a).astype(F32))
            for i in range(4)
        ),
        case("v_cvt_off_f32_i4", "u32 -> f32", lambda a: ((((a & 15) ^ 8).astype(I32) - 8) / 16).astype(F32)),
        case("v_cvt_norm_i16_f16", "f16 -> i16lo", normalised(True, 32767)),
        case("v_cvt_norm_u16_f16", "f16 -> u16lo", normalised(False, 65535)),
        case("v_cvt_pkrtz_f16_f32", "f32 f32 -> 2xf16", both(toward_zero_f16)),
        case("v_cvt_pknorm_i16_f32", "f32 f32 -> 2xi16", both(normalised(True, 32767))),
        case("v_cvt_pknorm_u16_f32", "f32 f32 -> 2xu16", both(normalised(False, 65535))),
        case("v_cvt_pknorm_i16_f16", "f16 f16 -> 2xi16", both(normalised(True, 32767))),
        case("v_cvt_pknorm_u16_f16", "f16 f16 -> 2xu16", both(normalised(False, 65535))),
        case("v_cvt_pk_i16_i32", "i32 i32 -> 2xi16", both(lambda a: np.clip(a, *i16))),
        case("v_cvt_pk_u16_u32", "u32 u32 -> 2xu16", both(lambda a: np.clip(a, *u16))),
        case("v_cvt_f32_f16_e64 D, -|A| clamp", "f16 -> f32", quiet(_clamped_negative), ulp=ZERO_SIGN_FREE),
        case("v_cvt_f16_f32_e64 D, -A", "f32 -> f16", quiet(lambda a: (-a).astype(F16))),
        case("v_cvt_f32_u32_e64 D, A mul:2", "u32 -> f32", lambda a: a.astype(F32) * F32(2)),
        case("v_cvt_f32_f16_sdwa D, A src0_sel:WORD_1", "2xf16 -> f32", lambda a: a[..., 1].astype(F32)),
        case(
            "v_cvt_f16_f32_sdwa D, A dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:DWORD",
            "old:2xu16 f32 -> 2xu16",
            quiet(lambda old, a: half_word(old, a.astype(F16).view(U16), True)),
        ),
        case(
            "v_cvt_off_f32_i4_sdwa D, A src0_sel:BYTE_2",
            "u32 -> f32",
            lambda a: (((((a >> U32(16)) & U32(15)) ^ U32(8)).astype(I32) - 8) / 16).astype(F32),
        ),
    ]


def _clamped_negative(a):
    value = -np.abs(a.astype(F32))
    return np.where(np.isnan(value), 0, np.clip(value, 0, 1)) + F32(0)


CASES = [*plain(), *fp8()]
