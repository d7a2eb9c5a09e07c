"""from_hf on quantised checkpoints as they are on disk: codes, scales, values, and what it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from goldens import by_model

from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError
from jax_moriep.weights import from_hf

GOLDENS = by_model("quantised")
SCHEMES = {
    "deepseek_v3": "fp8_block",
    "qwen3_moe": "fp8_block",
    "minimax_m2": "fp8_block",
    "glm4_moe": "fp8_token",
}
E, H, INTER = 2, 200, 140
"""Two blocks each way, the second of them cut off."""
FP8 = jnp.float8_e4m3fn


# What transformers makes of the same files.


def golden(model, part):
    """The tensors of a model on disk or in memory, in their own dtypes."""
    arrays = GOLDENS[model]
    return {
        key.removeprefix(f"{part}/"): value.view(jnp.dtype(str(arrays[f"dtype/{key}"])))
        for key, value in arrays.items()
        if key.startswith(f"{part}/")
    }


def golden_cfg(model, **changes):
    return MoEConfig(**json.loads(str(GOLDENS[model]["cfg"])), **changes)


def read(model, part, dequantize=False, **changes):
    family = str(GOLDENS[model]["family"])
    return from_hf(golden(model, part), family, golden_cfg(model, **changes), dequantize=dequantize)


def assert_same(left, right, but=()):
    for field in dataclasses.fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in but or (a is None and b is None) or field.name == "layout":
            continue
        assert a.dtype == b.dtype, field.name
        np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32), err_msg=field.name)


@pytest.mark.parametrize("model", GOLDENS)
def test_dequantised_it_is_what_transformers_loads(model):
    dequantised = read(model, "disk", dequantize=True)
    assert_same(dequantised, read(model, "memory"))
    assert dequantised.w1.dtype == dequantised.w2.dtype == jnp.bfloat16
    assert dequantised.w1_scale is dequantised.w2_scale is None


@pytest.mark.parametrize("model", SCHEMES)
def test_codes_stay_as_they_are_on_disk(model):
    disk, params = golden(model, "disk"), read(model, "disk", expert_quant=SCHEMES[model])
    names = ("w1", "w3", "w2") if model == "minimax_m2" else ("gate_proj", "up_proj", "down_proj")
    for i in range(2):
        gate, up, down = (disk[f"experts.{i}.{name}.weight"].view(np.uint8) for name in names)
        np.testing.assert_array_equal(params.w1[i].view(np.uint8), np.concatenate([gate, up]))
        np.testing.assert_array_equal(params.w2[i].view(np.uint8), down)
    assert params.w1.dtype == params.w2.dtype == FP8
    assert params.w1_scale.dtype == params.w2_scale.dtype == np.float32
    # The rest, shared experts too, is the same as without.
    assert_same(params, read(model, "memory"), but=("w1", "w2", "w1_scale", "w2_scale"))
    w1, w2 = values_of(params)
    np.testing.assert_allclose(w1, read(model, "memory").w1.astype(np.float64), rtol=2**-8)
    np.testing.assert_allclose(w2, read(model, "memory").w2.astype(np.float64), rtol=2**-8)


def test_goldens_have_every_kind_of_checkpoint():
    assert set(GOLDENS) == {*SCHEMES, "gpt_oss"}
    blocks = np.concatenate(
        [v.ravel() for k, v in golden("gpt_oss", "disk").items() if k.endswith("_blocks")]
    )
    assert {int(b) & 15 for b in blocks} == {int(b) >> 4 for b in blocks} == set(range(16))


# The oracle: float64, number by number and block by block.


def e4m3fn(code):
    """The value of one byte, from the format's definition."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return np.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3FN = np.array([e4m3fn(code) for code in range(256)])


def values_of(params):
    """w1 and w2 in float64, from codes and scales in the layout that MoEParams says."""
    made = []
    for name, halves in (("w1", 2), ("w2", 1)):
        codes, scales = getattr(params, name), getattr(params, name + "_scale").astype(np.float64)
        values = codes.astype(np.float64) if codes.dtype == np.int8 else E4M3FN[codes.view(np.uint8)]
        if scales.ndim == 2:
            made.append(values * scales[:, :, None])
            continue
        rows = codes.shape[1] // halves
        for half in range(halves):
            for i in range(-(-rows // 128)):
                for j in range(-(-codes.shape[2] // 128)):
                    first, end = half * rows + 128 * i, half * rows + min(rows, 128 * (i + 1))
                    scale = scales[:, half * -(-rows // 128) + i, j]
                    values[:, first:end, 128 * j : 128 * (j + 1)] *= scale[:, None, None]
        made.append(values)
    return made


class Matrix:
    """A random matrix of codes, its scales in the shape of a checkpoint, and its values in float64."""

    def __init__(self, rng, rows, columns, kind, dtype):
        if dtype == np.int8:
            self.codes = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
            values = self.codes.astype(np.float64)
        else:
            bits = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
            bits[np.isnan(E4M3FN[bits])] = 0
            self.codes, values = bits.view(dtype), E4M3FN[bits]
        blocks = (-(-rows // 128), -(-columns // 128))
        shape = {"block": blocks, "row": (rows, 1), "flat row": (rows,), "matrix": (), "one": (1,)}[kind]
        self.scales = rng.uniform(0.001, 2, shape).astype(np.float32)
        self.values = np.empty((rows, columns))
        for r in range(rows):
            for c in range(0, columns, 128):
                at = {"block": (r // 128, c // 128), "row": (r, 0), "flat row": (r,), "matrix": (), "one": 0}
                self.values[r, c : c + 128] = values[r, c : c + 128] * np.float64(self.scales[at[kind]])


def make(kind, dtype=FP8, suffix="_scale_inv", experts=E, hidden=H, inter=INTER):
    """A block of Qwen3 by experts, and the values of w1 and w2."""
    rng = np.random.default_rng(0)
    block = {"gate.weight": rng.normal(size=(experts, hidden)).astype(np.float32)}
    w1, w2 = [], []
    for i in range(experts):
        gate, up = (Matrix(rng, inter, hidden, kind, dtype) for _ in range(2))
        down = Matrix(rng, hidden, inter, kind, dtype)
        for name, matrix in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            block[f"experts.{i}.{name}.weight"] = matrix.codes
            block[f"experts.{i}.{name}.weight{suffix}"] = matrix.scales
        w1.append(np.concatenate([gate.values, up.values]))
        w2.append(down.values)
    return block, np.stack(w1), np.stack(w2)


def fused(block):
    """The same as transformers holds it: one tensor for all experts, its scales too."""

    def of(half, end=""):
        return np.stack([block[f"experts.{i}.{half}.weight{end}"] for i in range(E)])

    made = {"gate.weight": block["gate.weight"]}
    for end in ("", "_scale_inv"):
        gate_up = np.concatenate([of("gate_proj", end), of("up_proj", end)], axis=1)
        made |= {f"experts.gate_up_proj{end}": gate_up, f"experts.down_proj{end}": of("down_proj", end)}
    return made


def make_cfg(scheme=None, hidden=H, inter=INTER):
    return MoEConfig(E, 2, hidden, inter, expert_quant=scheme)


def assert_values(params, w1, w2):
    for got, want in zip(values_of(params), (w1, w2), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-15)


CASES = [
    ("block", FP8, "_scale_inv", "fp8_block"),
    ("block", FP8, "_scale", "fp8_block"),
    ("row", FP8, "_scale", "fp8_token"),
    ("flat row", FP8, "_scale", "fp8_token"),
    ("matrix", FP8, "_scale_inv", "fp8_token"),
    ("one", FP8, "_scale", "fp8_token"),
    ("row", np.int8, "_scale", "int8_token"),
]


@pytest.mark.parametrize(("kind", "dtype", "suffix", "scheme"), CASES)
def test_codes_and_scales(kind, dtype, suffix, scheme):
    block, w1, w2 = make(kind, dtype, suffix)
    params = from_hf(block, "qwen3_moe", make_cfg(scheme))
    blocks = {"w1_scale": (E, 4, 2), "w2_scale": (E, 2, 2)}
    rows = {"w1_scale": (E, 2 * INTER), "w2_scale": (E, H)}
    for field, shape in (blocks if kind == "block" else rows).items():
        assert getattr(params, field).shape == shape
        assert getattr(params, field).dtype == np.float32
    assert params.w1.dtype == params.w2.dtype == dtype
    assert params.layout == "plain"
    assert_values(params, w1, w2)


@pytest.mark.parametrize(("kind", "dtype", "suffix", "scheme"), CASES)
def test_dequantised(kind, dtype, suffix, scheme):
    block, w1, w2 = make(kind, dtype, suffix)
    for cfg in (make_cfg(), make_cfg(scheme), make_cfg("fp8_block")):
        params = from_hf(block, "qwen3_moe", cfg, dequantize=True)
        assert params.w1.dtype == params.w2.dtype == jnp.bfloat16
        assert params.w1_scale is params.w2_scale is None
        np.testing.assert_allclose(params.w1.astype(np.float64), w1, rtol=2**-8)
        np.testing.assert_allclose(params.w2.astype(np.float64), w2, rtol=2**-8)


@pytest.mark.parametrize(
    ("hidden", "inter"), [(128, 128), (130, 127), (64, 32), (129, 256), (384, 257), (1, 1)]
)
def test_blocks_at_ragged_edges(hidden, inter):
    block, w1, w2 = make("block", hidden=hidden, inter=inter)
    cfg = make_cfg("fp8_block", hidden, inter)
    assert_values(from_hf(block, "qwen3_moe", cfg), w1, w2)
    params = from_hf(block, "qwen3_moe", cfg, dequantize=True)
    np.testing.assert_allclose(params.w1.astype(np.float64), w1, rtol=2**-8)
    np.testing.assert_allclose(params.w2.astype(np.float64), w2, rtol=2**-8)


@pytest.mark.parametrize("kind", ["block", "row"])
def test_fused_in_memory(kind):
    block, w1, w2 = make(kind)
    scheme = "fp8_block" if kind == "block" else "fp8_token"
    assert_values(from_hf(fused(block), "qwen3_moe", make_cfg(scheme)), w1, w2)
    params = from_hf(fused(block), "qwen3_moe", make_cfg(), dequantize=True)
    np.testing.assert_allclose(params.w1.astype(np.float64), w1, rtol=2**-8)


def test_fused_in_memory_with_a_scale_for_each_matrix():
    block, w1, w2 = make("one")
    state_dict = fused(block)
    assert state_dict["experts.gate_up_proj_scale_inv"].shape == (E, 2)
    state_dict["experts.gate_up_proj_scale_inv"] = state_dict["experts.gate_up_proj_scale_inv"][..., None]
    assert_values(from_hf(state_dict, "qwen3_moe", make_cfg("fp8_token")), w1, w2)


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_the_one_scale_of_a_small_matrix_is_what_the_config_says(suffix):
    """A matrix of 64 x 32 has one block, so a scale [1, 1] may be that of the block or of the matrix."""
    block, w1, w2 = make("block", suffix=suffix, hidden=64, inter=32)
    by_block = from_hf(block, "qwen3_moe", make_cfg("fp8_block", 64, 32))
    assert by_block.w1_scale.shape == (E, 2, 1)
    assert_values(by_block, w1, w2)
    by_row = from_hf(block, "qwen3_moe", make_cfg("fp8_token", 64, 32))
    assert (by_row.w1_scale.shape, by_row.w2_scale.shape) == ((E, 64), (E, 64))
    assert_values(by_row, w1, w2)
    codes = {
        k: v.astype(np.float32).astype(np.int8) if k.endswith("proj.weight") else v for k, v in block.items()
    }
    assert from_hf(codes, "qwen3_moe", make_cfg("int8_token", 64, 32)).w1_scale.shape == (E, 64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e8m0fnu"])
def test_dtypes_of_scales(dtype):
    block, _, _ = make("block")
    scales = {k: np.exp2(np.round(np.log2(v))) for k, v in block.items() if k.endswith("_scale_inv")}
    expected = from_hf(block | scales, "qwen3_moe", make_cfg("fp8_block"))
    narrow = {k: v.astype(jnp.dtype(dtype)) for k, v in scales.items()}
    assert_same(from_hf(block | narrow, "qwen3_moe", make_cfg("fp8_block")), expected)


def test_the_format_of_amd_is_kept():
    block, _, _ = make("block")
    amd = {k: v.view(jnp.float8_e4m3fnuz) if v.dtype == FP8 else v for k, v in block.items()}
    assert from_hf(amd, "qwen3_moe", make_cfg("fp8_block")).w1.dtype == jnp.float8_e4m3fnuz


def test_fixed_scales_of_inputs_are_not_used():
    block, w1, w2 = make("one", suffix="_scale")
    block |= {
        f"{k.removesuffix('weight')}input_scale": np.ones(1) for k in block if k.endswith("proj.weight")
    }
    assert_values(from_hf(block, "qwen3_moe", make_cfg("fp8_token")), w1, w2)


def test_floating_experts_are_master_weights():
    block, w1, w2 = make("block")
    floating = from_hf(block, "qwen3_moe", make_cfg(), dequantize=True)
    masters = {
        "gate.weight": block["gate.weight"],
        "experts.gate_up_proj": floating.w1,
        "experts.down_proj": floating.w2,
    }
    params = from_hf(masters, "qwen3_moe", make_cfg("fp8_block"))
    assert params.w1.dtype == jnp.bfloat16
    assert params.w1_scale is None


def test_nan_codes_and_scales_stay_nan():
    block, _, _ = make("block")
    block["experts.0.gate_proj.weight"].view(np.uint8)[3, 5] = 0x7F
    block["experts.1.down_proj.weight_scale_inv"][1, 0] = np.nan
    params = from_hf(block, "qwen3_moe", make_cfg(), dequantize=True)
    assert np.argwhere(np.isnan(params.w1.astype(np.float32))).tolist() == [[0, 3, 5]]
    assert np.isnan(params.w2[1, 128:, :128].astype(np.float32)).all()
    assert np.isnan(params.w2.astype(np.float32)).sum() == (H - 128) * 128


@pytest.mark.parametrize("kind", ["block", "row"])
def test_torch_tensors_are_not_copied(kind):
    torch = pytest.importorskip("torch")

    def tensor(array):
        if array.dtype == FP8:
            return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(array)

    block, _, _ = make(kind)
    cfg = make_cfg("fp8_block" if kind == "block" else "fp8_token")
    tensors = {name: tensor(array) for name, array in block.items()}
    assert_same(from_hf(tensors, "qwen3_moe", cfg), from_hf(block, "qwen3_moe", cfg))
    memory = {name: tensor(array) for name, array in fused(block).items()}
    params = from_hf(memory, "qwen3_moe", cfg)
    assert np.asarray(params.w1).__array_interface__["data"][0] == memory["experts.gate_up_proj"].data_ptr()


# gpt-oss


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def mxfp4_block():
    disk = golden("gpt_oss", "disk")
    return disk, golden_cfg("gpt_oss")


@pytest.mark.parametrize("scale", [0, 1, 126, 127, 128, 252, 253, 254, 255])
def test_every_code_of_mxfp4(scale):
    disk, cfg = mxfp4_block()
    blocks, scales = disk["experts.down_proj_blocks"], disk["experts.down_proj_scales"]
    blocks[...] = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)[np.arange(64) % 16]
    scales[...] = scale
    params = from_hf(disk, "gpt_oss", cfg)
    for row in range(16):
        for i in range(16):
            byte = 16 * row + i
            for at, code in ((2 * i, byte & 15), (2 * i + 1, byte >> 4)):
                want = np.nan if scale == 255 else E2M1[code] * 2.0 ** (scale - 127)
                got = float(params.w2[1, row, at])
                # bfloat16 ends below 2^128, as float32 does.
                want = np.copysign(np.inf, want) if abs(want) >= 2.0**128 else want
                np.testing.assert_equal(got, want)
                assert np.isnan(want) or np.signbit(got) == np.signbit(want)


def test_mxfp4_takes_gate_and_up_apart():
    disk, cfg = mxfp4_block()
    params = from_hf(disk, "gpt_oss", cfg)
    blocks, scales = disk["experts.gate_up_proj_blocks"], disk["experts.gate_up_proj_scales"]
    for row in (0, 1, 2, 37, 63):
        codes = np.stack([blocks[1, row] & 15, blocks[1, row] >> 4], axis=-1).reshape(2, 32)
        with np.errstate(over="ignore"):
            factors = 2.0 ** (scales[1, row].astype(np.float64) - 127)
            want = (np.array(E2M1)[codes] * factors[:, None]).ravel().astype(np.float32).astype(jnp.bfloat16)
        np.testing.assert_array_equal(params.w1[1, row // 2 + 32 * (row % 2)], want)


# What is refused


def changed(change, kind="block", **options):
    block, _, _ = make(kind, **options)
    for name, value in change.items():
        if value is None:
            del block[name]
        else:
            block[name] = value
    return block


def half_quantised():
    """Floats for down only."""
    block, _, w2 = make("block")
    for i in range(E):
        block[f"experts.{i}.down_proj.weight"] = w2[i].astype(np.float32)
        del block[f"experts.{i}.down_proj.weight_scale_inv"]
    return block


GATE, DOWN = "experts.0.gate_proj.weight", "experts.1.down_proj.weight"


@pytest.mark.parametrize(
    ("scheme", "block", "text"),
    [
        (
            None,
            changed({}),
            r"expert_quant=None must be 'fp8_block', for the experts of the state_dict are float8_e4m3fn "
            r"with a scale for each block; set it so in MoEConfig, or pass dequantize=True",
        ),
        (
            "fp8_token",
            changed({}),
            r"expert_quant='fp8_token' must be 'fp8_block', .* scale for each block",
        ),
        (
            "fp8_block",
            changed({}, "row"),
            r"'fp8_block' must be 'fp8_token', .* scale for each row",
        ),
        ("fp8_token", changed({}, "row", dtype=np.int8), r"expert_quant='fp8_token' must be 'int8_token'"),
        (
            "fp8_block",
            changed({GATE + "_scale_inv": None}),
            r"'experts\.0\.gate_proj\.weight'\]\.dtype='float8_e4m3fn' must come with its scales, "
            r"'experts\.0\.gate_proj\.weight_scale_inv' or 'experts\.0\.gate_proj\.weight_scale'; pass",
        ),
        (
            "fp8_block",
            changed({GATE + "_scale_inv": np.ones((3, 2), np.float32)}),
            r"gate_proj\.weight_scale_inv'\]\.shape=\(3, 2\) must be \(2, 2\) \(one for each 128x128 of "
            r"'experts.0.gate_proj.weight'\), \(140, 1\) \(for each row\) or \(1, 1\) \(for the matrix\)",
        ),
        (
            "fp8_block",
            changed({DOWN + "_scale_inv": np.ones((2, 2), np.uint8)}),
            r"down_proj\.weight_scale_inv'\]\.dtype='uint8' must be one of \('float32', 'bfloat16'",
        ),
        (
            "fp8_block",
            changed({GATE: np.ones((INTER, H + 1), FP8)}),
            r"'experts\.0\.gate_proj\.weight'\]\.shape=\(140, 201\) must be \(140, 200\)",
        ),
        (
            "fp8_block",
            changed({GATE: np.ones((INTER, H), jnp.float8_e5m2)}),
            r"\.dtype='float8_e5m2' must be float64, .* or int8; dequantise the checkpoint first",
        ),
        (
            "fp8_block",
            changed({GATE: np.ones((INTER, H), np.uint8)}),
            r"'experts\.0\.gate_proj\.weight'\]\.dtype='uint8' must be float64",
        ),
        (
            "fp8_block",
            changed({GATE: np.ones((INTER, H), np.float32), GATE + "_scale_inv": None}),
            r"state_dict has float32 in 'experts\.0\.gate_proj\.weight' and float8_e4m3fn with a scale for "
            r"each block in 'experts\.0\.up_proj\.weight', and experts must be quantised alike; pass deq",
        ),
        (
            "fp8_block",
            changed({DOWN: np.ones((H, INTER), np.int8)}),
            r"int8 with a scale for each block in 'experts\.1\.down_proj\.weight', and experts must be",
        ),
        (
            "fp8_block",
            half_quantised(),
            r"has float8_e4m3fn with a scale for each block for gate and up and float32 for down, and",
        ),
        (
            "fp8_block",
            changed({}, dtype=np.int8),
            r"experts of int8 with a scale for each block, which is none of the schemes .*; pass deq",
        ),
        (
            "fp8_block",
            changed({"experts.0.gate_proj.weight_zero_point": np.zeros(1)}),
            r"state_dict has \['experts\.0\.gate_proj\.weight_zero_point'\] \(1 in all\)",
        ),
        (
            "fp8_block",
            changed({"gate.weight": np.ones((E, H), FP8)}),
            r"'gate\.weight'\]\.dtype='float8_e4m3fn'",
        ),
    ],
)
def test_refused(scheme, block, text):
    with pytest.raises(ConfigError, match=text):
        from_hf(block, "qwen3_moe", make_cfg(scheme))


@pytest.mark.parametrize("kind", ["mixed", "int8"])
def test_what_no_scheme_has_can_be_dequantised(kind):
    block, w1, w2 = make("block", np.int8 if kind == "int8" else FP8)
    if kind == "mixed":
        block = half_quantised()
    params = from_hf(block, "qwen3_moe", make_cfg(), dequantize=True)
    np.testing.assert_allclose(params.w1.astype(np.float64), w1, rtol=2**-8)
    np.testing.assert_allclose(params.w2.astype(np.float64), w2, rtol=2**-8)


def test_fused_blocks_over_gate_and_up_are_refused():
    """transformers holds ceil(2*I/128) rows of scales, of which one may be gate's and up's."""
    state_dict = fused(changed({}))
    state_dict["experts.gate_up_proj_scale_inv"] = state_dict["experts.gate_up_proj_scale_inv"][:, :3]
    text = r"'experts\.gate_up_proj_scale_inv'\]\.shape=\(2, 3, 2\) must be \(2, 4, 2\) .*as they are on disk"
    with pytest.raises(ConfigError, match=text):
        from_hf(state_dict, "qwen3_moe", make_cfg("fp8_block"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"experts.down_proj_scales": None}, r"lacks 'experts\.down_proj_scales' of shape \(2, 64, 1\)"),
        ({"experts.down_proj_blocks": None}, r"lacks 'experts\.down_proj' of shape \(2, 32, 64\)"),
        (
            {"experts.down_proj_blocks": np.zeros((2, 64, 16), np.uint8)},
            r"_blocks'\]\.shape=\(2, 64, 16\) must be \(2, 64, 1, 16\)",
        ),
        (
            {"experts.down_proj_scales": np.ones((2, 64, 1), np.int8)},
            r"_scales'\]\.dtype='int8' must be uint8",
        ),
        (
            {"experts.down_proj_blocks": np.zeros((2, 64, 1, 16), np.float32)},
            r"_blocks'\]\.dtype='float32' must be uint8",
        ),
    ],
)
def test_mxfp4_refused(change, text):
    disk, cfg = mxfp4_block()
    with pytest.raises(ConfigError, match=text):
        from_hf({k: v for k, v in (disk | change).items() if v is not None}, "gpt_oss", cfg)


def test_mxfp4_needs_whole_groups():
    disk, cfg = mxfp4_block()
    with pytest.raises(
        ConfigError, match=r"'experts\.gate_up_proj_blocks', which must have a multiple of 32 col"
    ):
        from_hf(
            {k: v[:, :72] if k == "router.weight" else v for k, v in disk.items()}
            | {"router.weight": np.ones((2, 72), np.float32)},
            "gpt_oss",
            dataclasses.replace(cfg, hidden_size=72),
        )


def test_blocks_of_fused_rows_that_may_begin_anew_or_not():
    """224 rows of gate have two blocks, and so has half of 448: where the second begins, nothing says."""
    cfg = MoEConfig(2, 1, 128, 224, expert_quant="fp8_block")
    fp8 = ml_dtypes.float8_e4m3fn
    state = {
        "gate.weight": np.zeros((2, 128), np.float32),
        "experts.gate_up_proj": np.zeros((2, 448, 128), fp8),
        "experts.gate_up_proj_scale_inv": np.ones((2, 4, 1), np.float32),
        "experts.down_proj": np.zeros((2, 128, 224), fp8),
        "experts.down_proj_scale_inv": np.ones((2, 1, 2), np.float32),
    }
    with pytest.raises(ConfigError, match="must not leave open whether blocks begin anew"):
        from_hf(state, "qwen3_moe", cfg)


def test_codes_in_a_form_that_no_scheme_has_are_not_dequantised_unasked():
    cfg = MoEConfig(2, 1, 128, 128, router="topk_softmax", expert_quant="fp8_token")
    fp8 = ml_dtypes.float8_e4m3fn
    state = {
        "router.layer.weight": np.zeros((2, 128), np.float32),
        "input_linear.weight": np.zeros((2, 256, 128), fp8),
        "input_linear.weight_scale": np.ones((2, 256, 1), np.float32),
        "output_linear.weight": np.zeros((2, 128, 128), fp8),
        "output_linear.weight_scale": np.ones((2, 128, 1), np.float32),
    }
    with pytest.raises(ConfigError, match=r"input_linear.weight'\].dtype='float8_e4m3fn' must be"):
        from_hf(state, "granite", cfg)
    params = from_hf(state, "granite", cfg, dequantize=True)
    assert params.w1.dtype == ml_dtypes.bfloat16
