"""load and to_hf: what transformers saved and computed, every dtype, meshes, layers, and what is refused."""

import dataclasses
import functools
import json
import mmap
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from goldens import by_model, write_checkpoint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep import hf_layers
from jax_moriep.weights import FAMILIES, from_hf, load, moe_layers, to_hf

CHECKPOINTS = by_model("checkpoints")
QUANTISED = by_model("quantised")
FAMILY = {
    "glm4_moe": "deepseek_v3",
    "dots1": "deepseek_v3",
    "ernie4_5_moe": "ernie45",
    "granitemoe": "granite",
    "llama4_text": "llama4",
}
BLOCK = {"granitemoe": "block_sparse_moe", "llama4_text": "feed_forward"} | dict.fromkeys(
    ("mixtral", "minimax_m2"), "block_sparse_moe"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each model's checkpoint, as transformers saved it."""
    made = {}
    for model, arrays in CHECKPOINTS.items():
        made[model] = write_checkpoint(arrays, tmp_path_factory.mktemp(model))
    return made


def mesh_of(ranks, **more):
    sizes = {"ep": ranks, **more}
    devices = np.array(jax.devices()[: int(np.prod(list(sizes.values())))])
    return Mesh(devices.reshape(list(sizes.values())), tuple(sizes))


def layers_of(model):
    """The layers with a MoE block, by the golden file."""
    return tuple(sorted(int(key.removeprefix("y/")) for key in CHECKPOINTS[model] if key.startswith("y/")))


def family_of(model):
    return FAMILY.get(model, model)


def tensors_of(folder):
    """All tensors of a folder, as safetensors itself reads them."""
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in safetensors.numpy.load_file(file).items()
    }


def block_of(folder, model, layer):
    prefix = f"model.layers.{layer}.{BLOCK.get(model, 'mlp')}."
    found = {k.removeprefix(prefix): v for k, v in tensors_of(folder).items() if k.startswith(prefix)}
    assert found
    return found


def arrays_of(params):
    return {k: v for k, v in vars(params).items() if v is not None and k != "layout"}


def bits(array):
    array = np.ascontiguousarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def assert_same(left, right):
    left, right = arrays_of(left), arrays_of(right)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        np.testing.assert_array_equal(bits(value), bits(right[name]), err_msg=name)


# What transformers saved and computed.


def test_goldens_have_every_family_and_files_of_both_kinds():
    assert {family_of(model) for model in CHECKPOINTS} == set(FAMILIES)
    several = [m for m, arrays in CHECKPOINTS.items() if "file/model.safetensors.index.json" in arrays]
    assert 0 < len(several) < len(CHECKPOINTS)
    assert any(0 not in layers_of(model) for model in CHECKPOINTS)


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_layers_compute_what_transformers_blocks_compute(folders, model):
    cfg = jm.MoEConfig.from_hf(folders[model])
    mesh = mesh_of(1)
    params = load(folders[model], cfg, mesh=mesh)
    layers = layers_of(model)
    assert moe_layers(folders[model]) == layers
    assert hf_layers.num_moe_layers(folders[model]) == len(layers)
    assert all(w.shape[0] == len(layers) for w in jax.tree.leaves(params))

    @jax.jit
    def run(x, params):
        def one(_, layer):
            return None, jm.ep_moe(x, layer, cfg, mesh=mesh)[0]

        return jax.lax.scan(one, None, params)[1]

    y = run(CHECKPOINTS[model]["x"], params)
    for i, layer in enumerate(layers):
        want = CHECKPOINTS[model][f"y/{layer}"]
        np.testing.assert_allclose(y[i], want, atol=1e-5 * np.abs(want).max(), err_msg=str(layer))


@pytest.mark.parametrize("model", CHECKPOINTS)
def test_the_way_back_gives_the_same_tensors(folders, model):
    cfg = jm.MoEConfig.from_hf(folders[model])
    stacked = load(folders[model], mesh=mesh_of(3))
    for i, layer in enumerate(layers_of(model)):
        prefix = f"model.layers.{layer}.{BLOCK.get(model, 'mlp')}."
        params = jax.tree.map(lambda w, i=i: w[i], stacked)
        assert_same(load(folders[model], layers=layer, mesh=mesh_of(3)), params)
        tensors = to_hf(params, family_of(model), cfg, prefix=prefix)
        want = {k: v for k, v in tensors_of(folders[model]).items() if k.startswith(prefix)}
        assert tensors.keys() == want.keys()
        for name, value in want.items():
            assert tensors[name].dtype == value.dtype
            np.testing.assert_array_equal(bits(tensors[name]), bits(value), err_msg=name)
        assert all(value.flags.c_contiguous for value in tensors.values())


SPELLINGS = by_model("spellings")


@pytest.mark.parametrize("model", SPELLINGS)
@pytest.mark.parametrize("spelling", ["memory", "disk"])
def test_both_spellings_of_the_way_back(model, spelling):
    arrays = SPELLINGS[model]
    cfg, family = jm.MoEConfig(**json.loads(str(arrays["cfg"]))), str(arrays["family"])
    whole = {k.removeprefix(f"{spelling}/"): v for k, v in arrays.items() if k.startswith(f"{spelling}/")}
    prefix = ".".join(next(iter(whole)).split(".")[:4]) + "."
    params = from_hf({k.removeprefix(prefix): v for k, v in whole.items()}, family, cfg)
    tensors = to_hf(params, family, cfg, spelling=spelling, prefix=prefix)
    assert tensors.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(bits(tensors[name]), bits(value), err_msg=name)


# Where the weights go.


@pytest.mark.parametrize("model", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text"])
@pytest.mark.parametrize("axes", [{"ep": 3}, {"ep": 8}, {"ep": 2, "tp": 2}, {"data": 2, "ep": 2}])
def test_shards_are_those_of_weights_that_were_read_whole(folders, model, axes):
    """E=5 or 4: on 8 ranks some hold padding alone."""
    cfg = jm.MoEConfig.from_hf(folders[model])
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(list(axes.values()))
    mesh = Mesh(devices, tuple(axes))
    tp = "tp" if "tp" in axes else None
    found = load(folders[model], cfg, mesh=mesh, tp_axis=tp)
    blocks = [
        jm.pad_params(from_hf(block_of(folders[model], model, i), family_of(model), cfg), axes["ep"])
        for i in layers_of(model)
    ]
    whole = jax.tree.map(lambda *of_layers: np.stack(of_layers), *blocks)
    specs = jm.param_specs(cfg, "ep", tp)
    for name, want in arrays_of(whole).items():
        sharding = NamedSharding(mesh, P(None, *getattr(specs, name)))
        got = getattr(found, name)
        assert got.sharding == sharding
        for shard, right in zip(
            got.addressable_shards, jax.device_put(want, sharding).addressable_shards, strict=True
        ):
            assert shard.device == right.device
            np.testing.assert_array_equal(shard.data, right.data, err_msg=name)


def test_without_a_mesh_weights_stay_on_the_host(folders):
    params = load(folders["qwen2_moe"])
    assert all(isinstance(w, np.ndarray) for w in arrays_of(params).values())
    assert params.w1.shape == (2, 5, 8, 8)
    cfg = jm.MoEConfig.from_hf(folders["qwen2_moe"])
    one = load(folders["qwen2_moe"], layers=np.int64(2))
    assert_same(one, from_hf(block_of(folders["qwen2_moe"], "qwen2_moe", 2), "qwen2_moe", cfg))
    for number in (np.array(2), jnp.array(2)):
        assert_same(load(folders["qwen2_moe"], layers=number), one)
    for several in ([2, 1], np.array([2, 1]), jnp.array([2, 1])):
        np.testing.assert_array_equal(load(folders["qwen2_moe"], layers=several).w1, params.w1[::-1])
    assert load(folders["qwen2_moe"], layers=jnp.array([2])).w1.shape == (1, 5, 8, 8)


def test_a_cpu_takes_large_weights_where_they_were_read(tmp_path):
    """Else loading would take twice the memory, as soon as jax decides to copy."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256}
    rng, block = np.random.default_rng(5), {"gate.weight": np.ones((3, 512), np.float32)}
    for i in range(3):
        for name, shape in (("gate_proj", (256, 512)), ("up_proj", (256, 512)), ("down_proj", (512, 256))):
            block[f"experts.{i}.{name}.weight"] = rng.normal(size=shape).astype(np.float32)
    write_model(tmp_path, {**QWEN, **sizes}, {0: block, 1: block})
    params = load(tmp_path, mesh=mesh_of(2))
    want = jm.pad_params(from_hf(block, "qwen3_moe", jm.MoEConfig.from_hf(tmp_path)), 2)
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(getattr(params, name), np.stack([getattr(want, name)] * 2))
        for shard in getattr(params, name).addressable_shards:
            assert shard.data.unsafe_buffer_pointer() % mmap.PAGESIZE == 0


def test_dtype_is_that_of_all_but_the_score_bias(folders):
    kept, cast = (
        load(folders["deepseek_v3"]),
        load(folders["deepseek_v3"], dtype=jnp.bfloat16, mesh=mesh_of(2)),
    )
    for name, value in arrays_of(kept).items():
        wanted = np.float32 if name == "score_bias" else jnp.bfloat16
        got = getattr(cast, name)
        assert got.dtype == wanted, name
        np.testing.assert_array_equal(got, value.astype(wanted), err_msg=name)


# Dtypes. The files are written by safetensors.


def write_model(folder, config, blocks, block="mlp"):
    """A checkpoint with one file for each layer, and what they hold."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for layer, tensors in blocks.items():
        named = {f"model.layers.{layer}.{block}.{name}": value for name, value in tensors.items()}
        file = f"model-{layer:05}.safetensors"
        safetensors.numpy.save_file(named, folder / file)
        weight_map |= dict.fromkeys(named, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


QWEN = {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "hidden_size": 200,
    "moe_intermediate_size": 140,
    "norm_topk_prob": True,
}


def qwen_block(rng, dtype=np.float32, scales=None, scale_name="weight_scale_inv"):
    """A block of three experts. With scales those of shape ``scales(rows, columns)`` lie beside each."""
    block = {"gate.weight": rng.normal(size=(3, 200)).astype(np.float32)}
    for i in range(3):
        for name, shape in (("gate_proj", (140, 200)), ("up_proj", (140, 200)), ("down_proj", (200, 140))):
            values = rng.normal(size=shape) * (40 if dtype == np.int8 else 1)
            block[f"experts.{i}.{name}.weight"] = values.astype(dtype)
            if scales is not None:
                block[f"experts.{i}.{name}.{scale_name}"] = rng.uniform(1, 2, scales(*shape)).astype(
                    np.float32
                )
    return block


CODES = {
    "fp8_block": (
        jnp.float8_e4m3fn,
        lambda rows, columns: (-(-rows // 128), -(-columns // 128)),
        "weight_scale_inv",
    ),
    "fp8_token": (jnp.float8_e4m3fn, lambda rows, columns: (rows, 1), "weight_scale"),
    "int8_token": (np.int8, lambda rows, columns: (rows, 1), "weight_scale"),
}
COMPRESSED = {
    "fp8_token": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "int8_token": {"num_bits": 8, "type": "int", "strategy": "channel"},
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, jnp.bfloat16])
def test_floating_dtypes(tmp_path, dtype):
    rng = np.random.default_rng(0)
    blocks = {layer: qwen_block(rng, dtype) for layer in (0, 1)}
    write_model(tmp_path, QWEN, blocks)
    cfg = jm.MoEConfig.from_hf(tmp_path)
    for layer, block in blocks.items():
        assert_same(load(tmp_path, layers=layer), from_hf(block, "qwen3_moe", cfg))
    if dtype == np.float64:  # which jax has only when it is told so
        with pytest.raises(jm.ConfigError, match=r"params\.w1\.dtype='float64' must be one that jax has"):
            load(tmp_path, layers=1, mesh=mesh_of(3))
        assert load(tmp_path, layers=1, mesh=mesh_of(3), dtype=np.float32).w1.dtype == np.float32
        with jax.enable_x64(True):
            on_mesh = load(tmp_path, layers=1, mesh=mesh_of(3))
    else:
        on_mesh = load(tmp_path, layers=1, mesh=mesh_of(3))
    assert_same(on_mesh, from_hf(blocks[1], "qwen3_moe", cfg))


@pytest.mark.parametrize("scheme", CODES)
def test_codes_stay_codes_there_and_back(tmp_path, scheme):
    dtype, scales, scale_name = CODES[scheme]
    rng = np.random.default_rng(1)
    blocks = {layer: qwen_block(rng, dtype, scales, scale_name) for layer in (0, 1)}
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    if scheme in COMPRESSED:
        groups = {"group_0": {"targets": ["Linear"], "weights": COMPRESSED[scheme]}}
        quantization = {"quant_method": "compressed-tensors", "config_groups": groups}
    write_model(tmp_path, {**QWEN, "quantization_config": quantization}, blocks)
    cfg = jm.MoEConfig.from_hf(tmp_path)
    assert cfg.expert_quant == scheme
    stacked = load(tmp_path, cfg, mesh=mesh_of(2))
    for layer, block in blocks.items():
        want = from_hf(block, "qwen3_moe", cfg)
        assert_same(
            jax.tree.map(lambda w, i=layer: w[i][:3] if w.ndim > 2 and w.shape[1] == 4 else w[i], stacked),
            want,
        )
        assert_same(
            load(tmp_path, cfg, layers=layer, dequantize=True),
            from_hf(block, "qwen3_moe", cfg, dequantize=True),
        )
        back = to_hf(jax.tree.map(lambda w, i=layer: w[i], stacked), "qwen3_moe", cfg)
        assert back.keys() == block.keys()
        for name, value in block.items():
            assert back[name].dtype == value.dtype
            np.testing.assert_array_equal(bits(back[name]), bits(value), err_msg=name)
    # Padding has scales of zero and codes of zero.
    assert not np.asarray(stacked.w1_scale)[:, 3].any()
    np.testing.assert_array_equal(bits(stacked.w1)[:, 3], 0)
    with pytest.raises(jm.ConfigError, match=r"expert_quant=None must be '" + scheme):
        load(tmp_path, dataclasses.replace(cfg, expert_quant=None))


def test_codes_are_split_over_tp(tmp_path):
    dtype, scales, scale_name = CODES["fp8_block"]
    block = qwen_block(np.random.default_rng(2), dtype, scales, scale_name)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_model(tmp_path, {**QWEN, "quantization_config": quantization}, {0: block})
    cfg, mesh = jm.MoEConfig.from_hf(tmp_path), mesh_of(3, tp=2)
    found = load(tmp_path, cfg, layers=0, mesh=mesh, tp_axis="tp")
    whole = from_hf(block, "qwen3_moe", cfg)
    assert_same(found, whole)
    for sharding in (found.w1.sharding, found.w1_scale.sharding):
        assert sharding.spec == P("ep", None, "tp")  # pyright: ignore[reportAttributeAccessIssue]
    assert found.w1.addressable_shards[0].data.shape == (1, 280, 100)


def test_mxfp4_becomes_bfloat16(tmp_path):
    arrays = QUANTISED["gpt_oss"]
    ours = json.loads(str(arrays["cfg"]))
    disk = {
        k.removeprefix("disk/"): v.view(jnp.dtype(str(arrays[f"dtype/{k}"])))
        for k, v in arrays.items()
        if k.startswith("disk/")
    }
    config = {
        "model_type": "gpt_oss",
        "num_local_experts": ours["num_experts"],
        "num_experts_per_tok": ours["top_k"],
        "hidden_size": ours["hidden_size"],
        "intermediate_size": ours["intermediate_size"],
        "quantization_config": {"quant_method": "mxfp4"},
    }
    write_model(tmp_path, config, {0: disk})
    found = load(tmp_path, layers=0, mesh=mesh_of(2))
    assert_same(found, from_hf(disk, "gpt_oss", jm.MoEConfig(**ours)))
    assert found.w1.dtype == jnp.bfloat16


def test_the_language_model_among_others(tmp_path, folders):
    """As Llama 4's checkpoints have it: below a name of its own, beside tensors of a model of pictures."""
    folder = folders["llama4_text"]
    config = {"model_type": "llama4", "text_config": json.loads((folder / "config.json").read_text())}
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = {f"language_model.{name}": value for name, value in tensors_of(folder).items()}
    pictures = {"vision_model.model.layers.0.mlp.fc1.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(named | pictures, tmp_path / "model.safetensors")
    assert moe_layers(tmp_path) == layers_of("llama4_text")
    assert_same(load(tmp_path), load(folder))


# Which layers.


def test_layers_behind_the_last_are_read_only_when_named(tmp_path):
    """As layer 61 of DeepSeek-V3 is there to predict further tokens."""
    rng = np.random.default_rng(3)
    write_model(tmp_path, {**QWEN, "num_hidden_layers": 3}, {layer: qwen_block(rng) for layer in (1, 2, 3)})
    assert moe_layers(tmp_path) == (1, 2)
    assert load(tmp_path).w1.shape[0] == 2
    np.testing.assert_array_equal(
        load(tmp_path, layers=3).w1[0, :140],
        tensors_of(tmp_path)["model.layers.3.mlp.experts.0.gate_proj.weight"],
    )


@pytest.mark.parametrize("nested", [False, True])
def test_layers_behind_the_last_of_a_model_that_the_package_does_not_know(tmp_path, nested):
    config = {"model_type": "another", "num_hidden_layers": 2}
    write_names(tmp_path, [name for layer in range(3) for name in block_names(layer)])
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    assert moe_layers(tmp_path, family="qwen3_moe") == (0, 1)
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": "2"}))
    with pytest.raises(jm.ConfigError, match=r"config\['num_hidden_layers'\]='2' must be an integer"):
        moe_layers(tmp_path, family="qwen3_moe")
    (tmp_path / "config.json").unlink()
    assert moe_layers(tmp_path, family="qwen3_moe") == (0, 1, 2)


NORM = "model.layers.{}.input_layernorm.weight"


def write_names(folder, names, **more):
    """A checkpoint of which only the names matter."""
    (folder / "config.json").write_text(json.dumps({**QWEN, **more}))
    safetensors.numpy.save_file(
        {name: np.ones(1, np.float32) for name in names}, folder / "model.safetensors"
    )


def block_names(layer, block="mlp", router="gate.weight", expert="experts.0.up_proj.weight"):
    return [f"model.layers.{layer}.{block}.{name}" for name in (router, expert)]


@pytest.mark.parametrize("model", CHECKPOINTS)
@pytest.mark.parametrize("part", ["router", "experts"])
def test_half_a_block_is_no_dense_layer(tmp_path, folders, model, part):
    layer, layout = layers_of(model)[-1], FAMILIES[family_of(model)]
    prefix = f"model.layers.{layer}.{BLOCK.get(model, 'mlp')}."
    lost = tuple(
        prefix + name
        for name in (
            layout.router_names if part == "router" else ("experts.", "input_linear.", "output_linear.")
        )
    )
    tensors = {k: v for k, v in tensors_of(folders[model]).items() if not k.startswith(lost)}
    (tmp_path / "config.json").write_bytes((folders[model] / "config.json").read_bytes())
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    text = f"have {'a router' if part == 'router' else 'experts'} below '{prefix}'"
    for function in (load, moe_layers):
        with pytest.raises(jm.ConfigError, match=text):
            function(tmp_path)
    if len(layers_of(model)) > 1:
        load(tmp_path, layers=layers_of(model)[0])
    with pytest.raises(jm.ConfigError, match=f"layers={layer} must be of layers"):
        load(tmp_path, layers=layer)


def test_an_attention_may_have_a_gate_and_a_layer_behind_the_last_half_a_block(tmp_path):
    names = [*block_names(0), *block_names(1), "model.layers.0.self_attn.gate.weight", block_names(2)[1]]
    write_names(tmp_path, [*names, NORM.format(0), NORM.format(1)], num_hidden_layers=2)
    assert moe_layers(tmp_path) == (0, 1)


def test_lost_layers(tmp_path):
    norms = [NORM.format(0), NORM.format(1)]
    write_names(tmp_path, [*block_names(1), *norms], num_hidden_layers=3)
    with pytest.raises(jm.ConfigError, match=r"must have tensors of layer 2, .* num_hidden_layers=3;"):
        moe_layers(tmp_path)
    # A dense layer has its norm, and a folder of MoE blocks alone has nothing of dense layers.
    for names in ([*block_names(1), *norms, NORM.format(2)], block_names(1)):
        write_names(tmp_path, names, num_hidden_layers=3)
        assert moe_layers(tmp_path) == (1,)


def test_lost_files_without_an_index(tmp_path, folders):
    for name in ("config.json", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"):
        (tmp_path / name).write_bytes((folders["mixtral"] / name).read_bytes())
    with pytest.raises(jm.ConfigError, match=r"must have 'model-00002-of-00003\.safetensors', as it has"):
        load(tmp_path)
    name = "model-00002-of-00003.safetensors"
    (tmp_path / name).write_bytes((folders["mixtral"] / name).read_bytes())
    assert_same(load(tmp_path), load(folders["mixtral"]))


def test_layers_of_other_dtypes_are_loaded_apart(tmp_path):
    rng = np.random.default_rng(4)
    write_model(tmp_path, QWEN, {0: qwen_block(rng), 1: qwen_block(rng, jnp.bfloat16)})
    with pytest.raises(jm.ConfigError, match="layers have w1 in float32 and in bfloat16.*load them apart"):
        load(tmp_path)
    assert load(tmp_path, layers=[1]).w1.dtype == jnp.bfloat16
    assert load(tmp_path, dtype=jnp.bfloat16).w1.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (0, r"layers=0 must be of layers with a MoE block, which are 1 to 2 here; leave out dense layers"),
        ([1, 7], r"layers=7 must be of layers"),
        ([], r"layers=\[\] must name at least one of 1 to 2"),
        (["1"], r"layers='1' must be an integer"),
        (True, r"layers=True must be an integer or several; leave out"),
        (1.5, r"layers=1\.5 must be an integer"),
        (1.0, r"layers=1\.0 must be an integer"),
        ([1.0], r"layers=1\.0 must be an integer"),
        ([[1]], r"layers=\[1\] must be an integer"),
        (np.array(1.0), r"layers=array\(1\.\) must be an integer"),
    ],
)
def test_layers_that_are_not_there(folders, layers, text):
    with pytest.raises(jm.ConfigError, match=text):
        load(folders["deepseek_v3"], layers=layers)


# What is refused.


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


NAME = "model.layers.0.mlp.gate.weight"
GATE = {NAME: entry(), "model.layers.0.mlp.experts.0.up_proj.weight": entry()}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "has 0 bytes; download it again"),
        (b"\x05\x00\x00", "has 3 bytes"),
        (
            struct.pack("<Q", 1 << 40) + b"{}",
            "says that its header has 1099511627776 bytes, and has 10 itself",
        ),
        (struct.pack("<Q", 4) + b"{}{}", "has a header that is no JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "has a header that is no JSON"),
        (header([1, 2]), "has a header that is no JSON object"),
        (header(GATE | {NAME: entry(offsets=(0, 28))}, b"\0" * 28), "at bytes 0 to 28 of 28"),
        (header(GATE, b"\0" * 20), "at bytes 0 to 24 of 20"),
        (header(GATE | {NAME: entry(offsets=(24, 0))}, b"\0" * 24), "at bytes 24 to 0 of 24"),
        (header(GATE | {NAME: entry(shape=(2, -3))}, b"\0" * 24), r"with shape \[2, -3\]"),
        (header(GATE | {NAME: entry(shape=(1 << 40, 1 << 40))}, b"\0" * 24), "at bytes 0 to 24 of 24"),
        (header(GATE | {NAME: {"dtype": "F32"}}, b"\0" * 24), r"data_offsets \[\]"),
        (header(GATE | {NAME: "gone"}, b"\0" * 24), "has .* as 'gone' in its header"),
        (header(GATE | {NAME: entry("F4", (2, 24), (0, 24))}, b"\0" * 24), "of dtype 'F4', which is none of"),
    ],
)
def test_damaged_files(tmp_path, content, text):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "num_experts": 2, "hidden_size": 3}))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(jm.ConfigError, match=text) as raised:
        load(tmp_path)
    assert "model.safetensors" in str(raised.value)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "must be JSON"),
        ("[]", "must have a 'weight_map'"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "must have a 'weight_map'"),
        ('{"weight_map": {"a": 3}}', "must have a 'weight_map'"),
        (
            json.dumps({"weight_map": dict.fromkeys(GATE, "gone.safetensors")}),
            r"gone\.safetensors' must be readable",
        ),
        (json.dumps({"weight_map": dict.fromkeys(GATE, "other.safetensors")}), r"lacks 'model\.layers\.0"),
    ],
)
def test_damaged_indices(tmp_path, index, text):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    safetensors.numpy.save_file({"a": np.ones(3, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(jm.ConfigError, match=text):
        load(tmp_path)


def test_folders_that_are_no_checkpoints(tmp_path, folders):
    with pytest.raises(jm.ConfigError, match=r"must have a config\.json that can be read; pass the folder"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    with pytest.raises(jm.ConfigError, match=r"must have a \*\.safetensors file, or several and"):
        load(tmp_path)
    dense = {"model.layers.0.mlp.up_proj.weight": np.ones(3, np.float32)}
    safetensors.numpy.save_file(dense, tmp_path / "a.safetensors")
    with pytest.raises(
        jm.ConfigError, match=r"has no layer with a router such as 'model\.layers\.0\.mlp\.gate"
    ):
        load(tmp_path)
    safetensors.numpy.save_file(dense, tmp_path / "b.safetensors")
    with pytest.raises(
        jm.ConfigError, match=r"in 'a\.safetensors', in 'b\.safetensors' and no model\.safetensors"
    ):
        load(tmp_path)


def test_a_config_that_does_not_fit_the_files(folders):
    folder = folders["mixtral"]
    cfg = jm.MoEConfig.from_hf(folder)
    for changes, text in (
        ({"num_experts": 4}, r"'gate\.weight'\]\.shape=\(5, 8\) must be \(4, 8\)"),
        ({"intermediate_size": 3}, r"'experts\.0\.w1\.weight'\]\.shape=\(4, 8\) must be \(3, 8\)"),
        ({"router": "llama4"}, "router='llama4' must be 'softmax_topk' for family='mixtral'"),
        ({"router_bias": True}, "router_bias=True must be unset for family='mixtral'"),
    ):
        with pytest.raises(jm.ConfigError, match=text):
            load(folder, dataclasses.replace(cfg, **changes))


def test_arguments_of_another_kind(folders):
    folder = folders["mixtral"]
    for error, arguments, text in (
        (jm.ConfigError, {"cfg": {"num_experts": 5}}, r"cfg='dict' must be a jm\.MoEConfig"),
        (jm.ConfigError, {"family": "mistral"}, r"family='mistral' must be one of"),
        (jm.ConfigError, {"family": ["mixtral"]}, r"family=\['mixtral'\] must be one of"),
        (
            jm.ShardingError,
            {"mesh": mesh_of(2), "tp_axis": "ep"},
            r"tp_axis='ep' must differ from ep_axis",
        ),
        (jm.ConfigError, {"dtype": jnp.int8}, r"dtype=.*int8.* must be a floating dtype of 16 bits"),
        (jm.ConfigError, {"dtype": "half a float"}, r"dtype='half a float' must be a floating dtype"),
        (jm.ShardingError, {"mesh": 4}, r"mesh='int' must be a jax\.sharding\.Mesh"),
        (jm.ShardingError, {"mesh": mesh_of(2), "ep_axis": "expert"}, "expert"),
        (
            jm.ShardingError,
            {"mesh": mesh_of(2, tp=3), "tp_axis": "tp"},
            r"must divide params\.w1 of shape \(6, 8, 8\)",
        ),
    ):
        with pytest.raises(error, match=text):
            load(folder, **arguments)


def test_a_model_that_the_package_does_not_know_is_read_as_a_family(tmp_path, folders):
    config = json.loads((folders["mixtral"] / "config.json").read_text()) | {"model_type": "mixture"}
    for file in folders["mixtral"].glob("model*"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(jm.ConfigError, match=r"config\['model_type'\]='mixture' must be one of \('mixtral',"):
        load(tmp_path)
    cfg = jm.MoEConfig.from_hf({**config, "model_type": "mixtral"})
    assert_same(load(tmp_path, cfg, family="mixtral"), load(folders["mixtral"]))
    assert moe_layers(tmp_path, family="mixtral") == layers_of("mixtral")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"spelling": "torch"}, r"spelling='torch' must be one of \('memory', 'disk'\)"),
        ({"prefix": "model.layers.3.mlp"}, r"prefix='.*mlp' must .* end with '\.'.*; pass 'model.*mlp\.'"),
        ({"prefix": None}, r"prefix=None must be empty or end with '\.'"),
        ({"family": "mistral"}, r"family='mistral' must be one of"),
        ({"family": "deepseek_v3"}, r"router='softmax_topk' must be 'deepseek_v3'"),
        ({"params": 3}, r"params='int' must be a jm\.MoEParams"),
        ({"params": {"layout": "aiter"}}, r"params\.layout='aiter' must be 'plain'"),
        ({"params": {"w1": np.ones((2, 5, 8, 8))}}, r"must be one layer's; pass jax\.tree\.map"),
        ({"params": {"w1": np.ones((5, 8, 7))}}, r"params\.w1\.shape=\(5, 8, 7\) must be"),
        (
            {"cfg": {"router_bias": True}, "params": {"router_bias": np.ones(5)}},
            r"params\.router_bias.* must be None",
        ),
        (
            {"family": "gpt_oss", "cfg": {"router": "gpt_oss", "activation": "swiglu_clamped"}},
            r"must be an array",
        ),
    ],
)
def test_weights_that_have_no_names(folders, changes, text):
    folder = folders["mixtral"]
    params, cfg = load(folder, layers=0), jm.MoEConfig.from_hf(folder)
    replaced = changes.get("params", {})
    arguments = {
        "params": dataclasses.replace(params, **replaced) if isinstance(replaced, dict) else replaced,
        "family": changes.get("family", "mixtral"),
        "cfg": dataclasses.replace(cfg, **changes.get("cfg", {})),
    }
    more = {name: changes[name] for name in ("spelling", "prefix") if name in changes}
    with pytest.raises(jm.ConfigError, match=text):
        to_hf(**arguments, **more)


def test_traced_weights_have_no_values(folders):
    """from_hf and to_hf say so, where NumPy would, or would make objects of shapes."""
    params, cfg = load(folders["mixtral"], layers=0), jm.MoEConfig.from_hf(folders["mixtral"])
    shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), params)
    state = to_hf(params, "mixtral", cfg)
    for call in (
        lambda: jax.jit(lambda params: to_hf(params, "mixtral", cfg))(params),
        lambda: to_hf(shapes, "mixtral", cfg),
        lambda: jax.jit(lambda state: from_hf(state, "mixtral", cfg))(state),
    ):
        with pytest.raises(
            jm.ConfigError, match=r"must be an array with values; call this outside of jax\.jit"
        ):
            call()


@pytest.mark.parametrize("transform", [jax.jit, lambda f: functools.partial(jax.eval_shape, f)])
def test_loading_to_a_mesh_is_not_traced(folders, transform):
    with pytest.raises(jm.ConfigError, match=r"load must not be traced, .*; call load outside of jax\.jit"):
        transform(lambda: load(folders["mixtral"], mesh=mesh_of(2)))()


def as_codes(params, dtype):
    """The same with codes for experts, which all are 1, and scales."""
    experts, hidden, inter = params.w2.shape
    return dataclasses.replace(
        params,
        w1=np.ones((experts, 2 * inter, hidden), dtype),
        w2=np.ones((experts, hidden, inter), dtype),
        w1_scale=np.ones((experts, 2, 1), np.float32),
        w2_scale=np.ones((experts, 1, 1), np.float32),
    )


@pytest.mark.parametrize(
    ("model", "dtype", "spelling", "text"),
    [
        ("mixtral", jnp.float8_e4m3fnuz, "disk", r"must be float8_e4m3fn, .* pass what jm\.quantize_params"),
        ("mixtral", jnp.float8_e4m3fn, "memory", "floating for family='mixtral' and spelling='memory'"),
        ("granitemoe", jnp.float8_e4m3fn, "disk", "must be floating for family='granite'"),
    ],
)
def test_codes_without_a_form(folders, model, dtype, spelling, text):
    cfg = jm.MoEConfig.from_hf(folders[model], expert_quant="fp8_block")
    codes = as_codes(load(folders[model], layers=0), dtype)
    with pytest.raises(jm.ConfigError, match=text):
        to_hf(codes, family_of(model), cfg, spelling=spelling)
