"""experts="aiter" as far as it goes without a GPU: finding and checking kernels, their layout, refusals."""

import dataclasses
import functools
import hashlib
import re
import struct

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_moriep as jm
from jax_moriep import experts, fused
from jax_moriep.aiter import code_object, kernels, layout, wheel
from jax_moriep.errors import ConfigError, LibraryError, ShardingError, TransportError
from jax_moriep.experts import ExpertSpec, ExpertWeights, aiter
from jax_moriep.runtime import compat, settings, targets
from jax_moriep.runtime.place import Place
from tests.unit.test_mori_wheel import make_wheel

MI300 = Place("gpu", "gfx942")
# (offset, size) of AITER's arguments, as its host code has them.
ARGUMENTS = [
    *((16 * i, 8, name) for i, name in enumerate("O X G U D XQ GQ DQ SMQ STP SW SEP".split())),
    *((192 + 16 * i, 4, name) for i, name in enumerate("dim hdim batch eprt Xs GUs Ds Os".split())),
    *((320 + 16 * i, 4, name) for i, name in enumerate("eGUs eDs eGUQs eDQs eSMQs topk".split())),
    *((416 + 16 * i, 4, name) for i, name in enumerate("total_tgs ps_deno".split())),
]


def make_image(symbol, arguments=ARGUMENTS, size=448):
    """An ELF file with nothing but the notes of one kernel."""
    described = []
    for offset, length, name in arguments:
        described.append({".name": name, ".offset": offset, ".size": length, ".value_kind": "by_value"})
        described.append({".name": "pad", ".offset": offset + length, ".size": 16 - length})
    kernel = {".name": symbol, ".args": described, ".kernarg_segment_size": size, ".wavefront_size": 64}
    notes = msgpack.packb(
        {"amdhsa.kernels": [kernel], "amdhsa.version": [1, 0], "x": [None, True, -1, -200, 70000]}
    )
    note = struct.pack("<III", 7, len(notes), 32) + b"AMDGPU\0\0" + notes
    note += b"\0" * (-len(note) % 4)
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 0x20, 64)
    struct.pack_into("<HH", header, 0x36, 56, 1)
    return bytes(header) + struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4) + note


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """A folder with an unpacked amd-aiter of another version and without code objects."""
    (tmp_path / wheel.CODE / kernels.FOLDER).mkdir(parents=True)
    info = tmp_path / "amd_aiter-0.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: amd-aiter\nVersion: 0.2.0\n")
    monkeypatch.setenv(settings.AITER_DIR.name, str(tmp_path))
    return tmp_path


def test_a_named_folder(unpacked):
    assert wheel.find() == wheel.Wheel(unpacked / wheel.CODE, "0.2.0")
    assert wheel.unavailable_reason() is None


def test_no_wheel(monkeypatch, tmp_path):
    monkeypatch.delenv(settings.AITER_DIR.name, raising=False)
    with pytest.raises(LibraryError, match=f"amd-aiter is not installed; .*amd-aiter=={wheel.VERSION}"):
        wheel.find()
    monkeypatch.setenv(settings.AITER_DIR.name, str(tmp_path))
    with pytest.raises(LibraryError, match="JAX_MORIEP_AITER_DIR=.* must hold the folder aiter_meta"):
        wheel.find()


def test_another_file_of_the_same_name(unpacked):
    kernel = kernels.KERNELS["fp8_token"][0]
    with pytest.raises(LibraryError, match=r"amd-aiter 0.2.0 must hold .*32x512.co; run: pip install"):
        kernels.read(kernel)
    image = make_image(kernel.symbol)
    (unpacked / wheel.CODE / kernels.FOLDER / f"{kernel.name}.co").write_bytes(image)
    with pytest.raises(LibraryError, match="must be the file of version .*, whose results were tested"):
        kernels.read(kernel)
    same = dataclasses.replace(kernel, digest=hashlib.sha256(image).hexdigest()[:16])
    assert kernels.read(same) == image


def test_arguments_are_compared_with_the_notes():
    check = functools.partial(code_object.check, "file.co")
    check(make_image("kernel"), "kernel")
    with pytest.raises(LibraryError, match=r"file.co must hold the kernel other, not \['kernel'\]"):
        check(make_image("kernel"), "other")
    moved = [(offset + 16 * (name == "topk"), size, name) for offset, size, name in ARGUMENTS]
    with pytest.raises(LibraryError, match=r"differs in \['topk \(400, 4\)', 'topk \(416, 4\)'\]"):
        check(make_image("kernel", moved), "kernel")
    with pytest.raises(LibraryError, match="takes 416 bytes"):
        check(make_image("kernel", ARGUMENTS[:-2], 416), "kernel")
    for broken in (b"", b"\x7fELF\x02", make_image("kernel")[:200]):
        with pytest.raises(LibraryError, match="must be a code object with notes"):
            check(broken, "kernel")


def test_the_layout_is_aiters():
    codes = np.arange(2 * 32 * 64, dtype=np.int64).reshape(2, 32, 64)
    found = np.asarray(layout.shuffled(jnp.asarray(codes)))
    for n, k in np.ndindex(32, 64):
        # As AITER's shuffle_weight numbers the bytes of an expert.
        at = ((n // 16) * 2 + k // 32) * 512 + (k % 32) // 16 * 256 + (n % 16) * 16 + k % 16
        assert (found.reshape(2, -1)[:, at] == codes[:, n, k]).all()
    np.testing.assert_array_equal(layout.unshuffled(jnp.asarray(found)), codes)


@pytest.mark.parametrize(
    ("scheme", "hidden", "inner", "name"),
    [
        ("fp8_block", 7168, 2048, "blockscaleFp8_g1u1_novs_silu_1tg_32x256"),
        ("fp8_token", 7168, 2048, "pertokenFp8_g1u1_vs_silu_1tg_32x512"),
        ("fp8_token", 4096, 1408, "pertokenFp8_g1u1_silu_1tg_32x128"),
        ("fp8_token", 768, 1536, "pertokenFp8_g1u1_silu_1tg_32x512"),
        ("int8_token", 768, 2688, "pertokenInt8_g1u1_vs_silu_1tg_32x448"),
    ],
)
def test_the_widest_tile_is_taken(scheme, hidden, inner, name):
    kernel = kernels.choose(scheme, hidden, inner)
    assert isinstance(kernel, kernels.Kernel)
    assert kernel.name == f"fmoe_bf16_{name}"
    assert kernel.races == (scheme == "fp8_block")


@pytest.mark.parametrize(
    ("scheme", "hidden", "inner", "text"),
    [
        ("fp8_block", 768, 512, "hidden_size=768 wrong, which must be a multiple of 512"),
        ("fp8_block", 1024, 384, "intermediate_size=384 wrong, which must be a multiple of 256"),
        ("fp8_token", 256, 512, "hidden_size=256 wrong, which must be a multiple of 256 and at least 512"),
        ("int8_token", 640, 512, "hidden_size=640 wrong"),
        ("int8_token", 512, 576 + 64 * 4 + 8, r"multiple of one of \[128, 192, "),
    ],
)
def test_sizes_that_kernels_get_wrong(scheme, hidden, inner, text):
    cfg = make_cfg(expert_quant=scheme, hidden_size=hidden, intermediate_size=inner)
    with pytest.raises(ConfigError, match=text):
        aiter.lay_out(make_params(cfg), cfg)


def make_cfg(hidden_size=512, intermediate_size=256, **more):
    settings = {"experts": "aiter", "expert_quant": "fp8_token"} | more
    return jm.MoEConfig(4, 2, hidden_size, intermediate_size, **settings)


def make_params(cfg):
    @jax.jit
    def make(key):
        params = jm.init_params(key, cfg)
        return params if cfg.expert_quant is None else jm.quantize_params(params, cfg, "e4m3fnuz")

    return make(jax.random.key(0))


@pytest.fixture
def on_rocm(monkeypatch, unpacked):
    """A place whose GPUs are AMD's, with our library and a wheel that holds anything."""
    monkeypatch.setattr(compat, "gpu_backend", lambda: "rocm")
    monkeypatch.setattr(targets, "register_aiter", lambda backend: None)
    monkeypatch.setattr(kernels, "read", lambda kernel: b"")


@pytest.mark.parametrize(
    ("place", "more", "text"),
    [
        (Place("cpu"), {}, "it needs AMD's GPUs; use"),
        (Place("gpu", "gfx950"), {}, r"for the MI300 series \(gfx942\), and this is gfx950"),
        (MI300, {"expert_quant": None}, "expert_quant is None"),
        (MI300, {"activation": "gelu"}, "activation='silu' only, not 'gelu'"),
        (MI300, {"expert_bias": True}, "no biases"),
        (MI300, {"router": "llama4", "top_k": 1}, "router='llama4' weights their inputs"),
        (MI300, {"hidden_size": 640}, "hidden_size=640 wrong"),
        (MI300, {"intermediate_size": 100}, "intermediate_size=100 wrong"),
    ],
)
def test_layers_and_places_that_are_refused(on_rocm, place, more, text):
    cfg = dataclasses.replace(make_cfg(), **more)
    assert aiter.unavailable_reason(MI300, make_cfg()) is None
    with pytest.raises(TransportError, match=f"experts='aiter' cannot run .*{text}"):
        experts.choose(cfg, place)
    assert aiter.unavailable_reason(MI300, None) is None


def test_what_is_missing_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "gpu_backend", lambda: "rocm")
    monkeypatch.setenv("JAX_MORIEP_LIB_DIR", str(tmp_path))
    assert "libmoriep_rocm.so" in aiter.unavailable_reason(MI300, make_cfg())
    monkeypatch.setattr(targets, "register_aiter", lambda backend: None)
    monkeypatch.delenv(settings.AITER_DIR.name, raising=False)
    assert "amd-aiter is not installed" in aiter.unavailable_reason(MI300, None)


def test_auto_takes_it_for_prepared_weights_only(on_rocm):
    cfg = make_cfg(experts="auto")
    assert experts.choose(cfg, MI300) == "aiter"
    assert experts.choose(cfg, MI300, prepared=False) == "triton"
    assert experts.choose(make_cfg(experts="auto", expert_quant=None), MI300) == "triton"


def test_opening_a_layer_loads_its_kernel(on_rocm, monkeypatch):
    loaded = []
    monkeypatch.setattr(kernels, "load", lambda backend, kernel: loaded.append((backend, kernel.name)))
    experts.open_for(make_cfg(), MI300)
    experts.open_for(make_cfg(experts="triton", expert_quant=None), MI300)
    name = "fmoe_bf16_pertokenFp8_g1u1_vs_silu_1tg_32x256"
    assert loaded == [("rocm", name)]
    # The library with the one call has its own.
    experts.open_for(make_cfg(), MI300, "mori")
    assert loaded[1:] == [("rocm", name), ("mori", name)]


def test_what_it_tells(on_rocm):
    def told(cfg):
        return experts.describe("aiter", MI300, cfg)

    assert "barrier is missing" in told(make_cfg(expert_quant="fp8_block"))
    assert "barrier" not in told(make_cfg())
    assert told(make_cfg(activation="gelu")) is None
    assert told(None) is None


def lowered(cfg, params, capacity=64, **more):
    """The text of a program for AMD GPUs that runs the experts."""
    spec = ExpertSpec("silu", 0.0, 0.0, False, 16, scheme=cfg.expert_quant, format="e4m3fnuz")
    weights = ExpertWeights(params.w1, params.w2, w1_scale=params.w1_scale, w2_scale=params.w2_scale)
    weights = weights._replace(**more)

    def run(rows, row_weights, sizes, weights):
        return aiter.expert_mlp(rows, row_weights, sizes, weights, spec)

    rows = jax.ShapeDtypeStruct((capacity, cfg.hidden_size), jnp.float32)
    row_weights = jax.ShapeDtypeStruct((capacity,), jnp.float32)
    sizes = jax.ShapeDtypeStruct((weights.w2.shape[0],), jnp.int32)
    traced = jax.jit(run).trace(rows, row_weights, sizes, weights)
    return traced.lower(lowering_platforms=("rocm",)).as_text()


@pytest.mark.parametrize("scheme", kernels.KERNELS)
def test_it_is_one_custom_call(scheme):
    cfg = make_cfg(expert_quant=scheme)
    params = jax.jit(lambda p: aiter.lay_out(p, cfg))(make_params(cfg))
    assert params.layout == "aiter"
    text = lowered(cfg, params)
    assert text.count("custom_call @moriep_aiter_experts") == 1
    assert f'scheme = "{scheme}"' in text
    kernel = kernels.choose(scheme, 512, 256)
    assert isinstance(kernel, kernels.Kernel)
    assert f'kernel = "{kernel.name}"' in text


def test_sizes_that_kernels_do_not_count():
    cfg = make_cfg()
    params = make_params(cfg)
    with pytest.raises(ConfigError, match="rows.shape=.* must be fewer than 2\\*\\*24 rows and 4 GiB"):
        lowered(cfg, params, capacity=2**22)
    huge = {
        "w1": jax.ShapeDtypeStruct((2**14, 512, 512), jnp.float8_e4m3fnuz),
        "w2": jax.ShapeDtypeStruct((2**14, 512, 256), jnp.float8_e4m3fnuz),
    }
    with pytest.raises(ConfigError, match="w1.shape=.* must be smaller than 4 GiB on a rank"):
        lowered(cfg, params, **huge)


def test_floating_weights_are_refused():
    cfg = make_cfg()
    params = jm.init_params(jax.random.key(0), cfg)
    with pytest.raises(ConfigError, match="must have quantised w1 and w2, .* jm.prepare_params"):
        lowered(cfg, params)


@pytest.mark.parametrize(
    ("layout", "options", "error", "text"),
    [
        (
            "plain",
            {},
            ConfigError,
            "params.layout='plain' must be 'aiter' for experts='aiter'; pass the",
        ),
        (
            "aiter",
            {"tp_axis": "tp"},
            ShardingError,
            "must be 'plain' with tp_axis='tp'",
        ),
    ],
)
def test_weights_in_the_wrong_layout(layout, options, error, text):
    cfg = make_cfg(transport="native")
    params = dataclasses.replace(make_params(cfg), layout=layout)
    mesh = jax.sharding.AbstractMesh((2, 2), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2)

    def layer(x):
        return jm.ep_moe(x, params, cfg, mesh=mesh, **options)[0]

    with pytest.raises(error, match=text):
        jax.jit(layer).trace(jnp.ones((8, 512), jnp.bfloat16)).lower(lowering_platforms=("rocm",))


def test_a_scale_that_is_nan_reaches_the_result_in_int8():
    cfg = make_cfg(expert_quant="int8_token")
    params = make_params(cfg)
    params = dataclasses.replace(params, w1_scale=params.w1_scale.at[2, 5].set(jnp.nan))
    scale = aiter.lay_out(params, cfg).w2_scale
    assert jnp.isnan(scale).all(axis=1).tolist() == [False, False, True, False]
    assert not jnp.isnan(scale[jnp.array([0, 1, 3])]).any()


def test_what_one_call_needs():
    cfg = make_cfg()
    assert fused.is_one_call(cfg, "mori", "aiter", jnp.bfloat16)
    for changed in (
        ("native", "aiter", jnp.bfloat16),
        ("mori", "triton", jnp.bfloat16),
        ("mori", "aiter", jnp.float32),
    ):
        assert not fused.is_one_call(cfg, *changed)
    assert not fused.is_one_call(make_cfg(capacity_factor=1.5), "mori", "aiter", jnp.bfloat16)


@pytest.mark.parametrize("wire", [None, "fp8"])
@pytest.mark.parametrize("scheme", kernels.KERNELS)
def test_the_layer_is_one_custom_call_unless_it_is_differentiated(scheme, wire, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_MORIEP_MORI_DIR", str(make_wheel(tmp_path)))
    cfg = make_cfg(expert_quant=scheme, transport="mori", wire_dtype=wire)
    params = jax.jit(lambda p: aiter.lay_out(p, cfg))(make_params(cfg))
    mesh = jax.sharding.AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,))

    def layer(x, params):
        return jm.ep_moe(x, params, cfg, mesh=mesh)[0]

    def loss(x, params):
        return layer(x, params).astype(jnp.float32).sum()

    def calls(run):
        x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
        text = jax.jit(run).trace(x, params).lower(lowering_platforms=("rocm",)).as_text()
        return re.findall(r"custom_call @moriep_(\w+)", text)

    assert calls(layer) == ["fused_experts"]
    differentiated = calls(jax.grad(loss))
    assert {"send", "resend", "give_back"} <= set(differentiated)
    assert "fused_experts" not in differentiated
    if scheme == "int8_token":
        return  # jax itself refuses a gradient of integers
    with pytest.raises(ConfigError, match="params.w1 is quantised and must not be differentiated"):
        calls(lambda x, params: jax.grad(lambda w1: loss(x, dataclasses.replace(params, w1=w1)))(params.w1))
