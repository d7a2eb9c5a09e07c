"""MoEConfig.from_hf: configs of published models, missing keys, quantisation, and what is refused.

That the fields compute what the models compute is tested on checkpoints (test_weight_files.py)."""

import json

import pytest

from jax_moriep import hf_layers
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError

DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
QWEN3 = {
    "model_type": "qwen3_moe",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
LLAMA4_TEXT = {
    "model_type": "llama4_text",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
}
ERNIE = {
    "hidden_size": 2560,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 0,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "swiglu_limit": 7.0,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (
            {**DEEPSEEK_V3, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
            MoEConfig(
                256,
                8,
                7168,
                2048,
                router="deepseek_v3",
                score_bias=True,
                num_groups=8,
                top_groups=4,
                routed_scaling=2.5,
                shared_intermediate_size=2048,
                expert_quant="fp8_block",
            ),
        ),
        (QWEN3, MoEConfig(128, 8, 2048, 768)),
        # transformers 5.24 saves this model with another name for the number of experts.
        (
            {k: v for k, v in QWEN3.items() if k != "num_experts"} | {"num_local_experts": 128},
            MoEConfig(128, 8, 2048, 768),
        ),
        (
            {k: v for k, v in QWEN3.items() if k != "norm_topk_prob"},
            MoEConfig(128, 8, 2048, 768, norm_topk=False),
        ),
        (LLAMA4_TEXT, MoEConfig(16, 1, 5120, 8192, router="llama4", shared_intermediate_size=8192)),
        (
            {"model_type": "llama4", "vision_config": {"model_type": "clip"}, "text_config": LLAMA4_TEXT},
            MoEConfig(16, 1, 5120, 8192, router="llama4", shared_intermediate_size=8192),
        ),
        (
            {"model_type": "omni", "thinker_config": {"model_type": "part", "text_config": QWEN3}},
            MoEConfig(128, 8, 2048, 768),
        ),
        (
            GPT_OSS,
            MoEConfig(
                32,
                4,
                2880,
                2880,
                router="gpt_oss",
                router_bias=True,
                expert_bias=True,
                activation="swiglu_clamped",
            ),
        ),
        (
            {
                "model_type": "deepseek_v2",
                "hidden_size": 5120,
                "moe_intermediate_size": 1536,
                "n_group": 8,
                "n_routed_experts": 160,
                "n_shared_experts": 2,
                "norm_topk_prob": False,
                "num_experts_per_tok": 6,
                "routed_scaling_factor": 16.0,
                "topk_group": 3,
                "topk_method": "group_limited_greedy",
            },
            MoEConfig(
                160,
                6,
                5120,
                1536,
                router="deepseek_v2",
                norm_topk=False,
                num_groups=8,
                top_groups=3,
                routed_scaling=16.0,
                shared_intermediate_size=3072,
            ),
        ),
        (
            {"model_type": "ernie4_5_moe", **ERNIE, "moe_norm_min": 1e-12},
            MoEConfig(64, 6, 2560, 1536, router="ernie45", score_bias=True),
        ),
        (
            {
                "model_type": "granitemoe",
                "hidden_size": 1024,
                "intermediate_size": 512,
                "num_local_experts": 32,
                "num_experts_per_tok": 8,
                "hidden_act": "gelu",
            },
            MoEConfig(32, 8, 1024, 512, router="topk_softmax", activation="gelu"),
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_published_configs(config, want):
    assert MoEConfig.from_hf(config) == want


@pytest.mark.parametrize(
    ("model_type", "groups", "top_groups", "scaling", "shared", "norm_topk"),
    [
        ("deepseek_v3", 8, 4, 2.5, 2048, True),
        ("glm4_moe", 1, 1, 1.0, 2048, True),
        ("dots1", 1, 1, 1.0, None, False),
    ],
)
def test_what_stands_for_missing_keys_is_the_models_own(
    model_type, groups, top_groups, scaling, shared, norm_topk
):
    """The defaults of DeepseekV3Config, Glm4MoeConfig and Dots1Config of transformers."""
    missing = ("n_group", "topk_group", "routed_scaling_factor", "n_shared_experts", "norm_topk_prob")
    config = {k: v for k, v in DEEPSEEK_V3.items() if k not in missing} | {"model_type": model_type}
    cfg = MoEConfig.from_hf(config)
    assert (cfg.num_groups, cfg.top_groups, cfg.routed_scaling) == (groups, top_groups, scaling)
    assert (cfg.shared_intermediate_size, cfg.norm_topk) == (shared, norm_topk)


@pytest.mark.parametrize(
    "given", [ERNIE, {**DEEPSEEK_V3, "model_type": "deepseek_v2", "topk_method": "greedy"}]
)
def test_two_shared_experts_stand_for_a_missing_number_and_none_for_null(given):
    """The defaults of DeepseekV2Config and Ernie4_5_MoeConfig of transformers."""
    config = {"model_type": "ernie4_5_moe", **given}
    count = "n_shared_experts" if "n_shared_experts" in config else "moe_num_shared_experts"
    assert MoEConfig.from_hf({**config, count: None}).shared_intermediate_size is None
    del config[count]
    assert MoEConfig.from_hf(config).shared_intermediate_size == 2 * config["moe_intermediate_size"]


@pytest.mark.parametrize("model_type", ["deepseek_v3", "dots1"])
def test_norm_topk_prob_of_null_divides_by_nothing(model_type):
    """DeepseekV3Config and Dots1Config of transformers take a null, which is false where their code asks."""
    config = {**DEEPSEEK_V3, "model_type": model_type}
    assert MoEConfig.from_hf({**config, "norm_topk_prob": True}).norm_topk
    assert not MoEConfig.from_hf({**config, "norm_topk_prob": None}).norm_topk


@pytest.mark.parametrize(
    ("config", "key"),
    [
        *(({**QWEN3, "model_type": name}, "norm_topk_prob") for name in ("olmoe", "qwen2_moe", "qwen3_moe")),
        ({**DEEPSEEK_V3, "model_type": "glm4_moe"}, "norm_topk_prob"),
        ({**DEEPSEEK_V3, "model_type": "deepseek_v2"}, "routed_scaling_factor"),
        ({**DEEPSEEK_V3, "model_type": "deepseek_v2"}, "topk_method"),
        (GPT_OSS, "swiglu_limit"),
        (GPT_OSS, "swiglu_alpha"),
        (QWEN3, "hidden_act"),
    ],
)
def test_a_null_with_which_no_model_runs_is_refused(config, key):
    """The configs of transformers refuse each of these; of topk_method its model does."""
    filled = {"intermediate_size": 64, "shared_expert_intermediate_size": 64, **config}
    with pytest.raises(ConfigError, match=f"lacks '{key}'; pass the model's own"):
        MoEConfig.from_hf({**filled, key: None})


def test_a_path_a_folder_an_object_and_changes(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))

    class Config:
        def to_dict(self):
            return QWEN3

    want = MoEConfig(128, 8, 2048, 768)
    for given in (tmp_path, str(tmp_path), tmp_path / "config.json", Config(), QWEN3):
        assert MoEConfig.from_hf(given) == want
    changed = MoEConfig.from_hf(QWEN3, top_k=4, capacity_factor=1.5)
    assert changed == MoEConfig(128, 4, 2048, 768, capacity_factor=1.5)


def compressed(weights, **more):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "config_groups": groups, **more}


FLOAT8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
        ({"quant_method": "fp8"}, "fp8_token"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, None),
        ({"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.experts"]}, None),
        (
            {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.0.mlp.shared_experts"]},
            "fp8_token",
        ),
        ({"quant_method": "fp8", "modules_to_not_convert": "model.layers.0.mlp.experts"}, None),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "fp8_token"),
        (compressed(FLOAT8, ignore="re:.*mlp.experts.*"), None),
        (compressed(FLOAT8), "fp8_token"),
        (compressed({**FLOAT8, "strategy": "tensor"}), "fp8_token"),
        (compressed({**FLOAT8, "strategy": "block", "block_structure": [128, 128]}), "fp8_block"),
        (compressed({**FLOAT8, "type": "int"}), "int8_token"),
        (compressed({**FLOAT8, "num_bits": 4}), None),
        (compressed(FLOAT8, ignore=["re:.*mlp.experts.*"]), None),
        (compressed(FLOAT8, ignore=["lm_head", "re:.*mlp.gate$"]), "fp8_token"),
        ({"quant_method": "awq", "bits": 4}, None),
    ],
)
def test_schemes(quantization, scheme):
    assert MoEConfig.from_hf({**QWEN3, "quantization_config": quantization}).expert_quant == scheme
    nested = {"model_type": "several", "text_config": QWEN3, "quantization_config": quantization}
    assert MoEConfig.from_hf(nested).expert_quant == scheme


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"model_type": "llama"},
            r"config\['model_type'\]='llama' must be one of \('mixtral', .*'llama4_text'\)",
        ),
        ({}, r"config\['model_type'\]=None must be one of"),
        ({"model_type": "many", "text_config": {"model_type": "llama"}}, r"'many' must be one of"),
        (
            {k: v for k, v in QWEN3.items() if k != "moe_intermediate_size"},
            "config of model_type='qwen3_moe' lacks 'moe_intermediate_size'; pass the model's own",
        ),
        (
            {k: v for k, v in QWEN3.items() if k != "num_experts"},
            "lacks 'n_routed_experts' or 'moe_num_experts' or 'num_experts' or 'num_local_experts'",
        ),
        ({**QWEN3, "hidden_act": "relu"}, r"config\['hidden_act'\]='relu' must be one of"),
        ({**QWEN3, "num_experts": "many"}, r"num_experts='many' must be an integer"),
        (
            {**DEEPSEEK_V3, "model_type": "deepseek_v2", "topk_method": "noaux_tc"},
            r"config\['topk_method'\]='noaux_tc' must be",
        ),
        ({**DEEPSEEK_V3, "n_group": None}, "config of model_type='deepseek_v3' lacks 'n_group'"),
        ({**DEEPSEEK_V3, "scoring_func": "softmax"}, r"\['scoring_func'\]='softmax' must be 'sigmoid'; make"),
        ({**DEEPSEEK_V3, "topk_method": "greedy"}, r"\['topk_method'\]='greedy' must be 'noaux_tc'; make"),
        (
            {"model_type": "ernie4_5_moe", **ERNIE, "moe_norm_min": 0.1},
            r"\['moe_norm_min'\]=0\.1 must be 1e-12",
        ),
        ({"model_type": ["qwen3_moe"]}, r"config\['model_type'\]=\['qwen3_moe'\] must be one of"),
        ({**QWEN3, "hidden_act": ["silu"]}, r"config\['hidden_act'\]=\['silu'\] must be one of"),
        ({**QWEN3, "quantization_config": "fp8"}, r"config\['quantization_config'\]='fp8' must be an object"),
        (
            {**QWEN3, "quantization_config": {"modules_to_not_convert": 3}},
            r"\['modules_to_not_convert'\]=3 must be a list of names; pass",
        ),
        (
            {**QWEN3, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}},
            r"\['config_groups'\]=\[1\] must be an object; pass",
        ),
        ({**QWEN3, "quantization_config": compressed(8)}, r"\['group_0'\]\['weights'\]=8 must be an object"),
        (3, "config='int' must be a config object of transformers, a dict or a path"),
        ("/no/such/folder", r"config='/no/such/folder' must have a config\.json that can be read"),
    ],
)
def test_refused(config, text):
    with pytest.raises(ConfigError, match=text):
        MoEConfig.from_hf(config)


@pytest.mark.parametrize(("content", "text"), [("{", r"must be JSON \("), ("[1]", "must hold a JSON object")])
def test_files_that_hold_something_else(tmp_path, content, text):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=text):
        MoEConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"num_hidden_layers": 61, "first_k_dense_replace": 3, "moe_layer_freq": 1}, 58),
        ({"num_hidden_layers": 48, "mlp_only_layers": [0, 5], "decoder_sparse_step": 1}, 46),
        ({"num_hidden_layers": 9, "decoder_sparse_step": 2}, 4),
        ({"num_hidden_layers": 28, "moe_layer_start_index": 1, "moe_layer_end_index": 27}, 27),
        ({"num_hidden_layers": 28, "moe_layer_start_index": 1, "moe_layer_end_index": -1}, 27),
        ({"num_hidden_layers": 48, "interleave_moe_layer_step": 2}, 24),
        ({"num_hidden_layers": 48, "moe_layers": [1, 3], "interleave_moe_layer_step": 1}, 2),
        ({"num_hidden_layers": 32, "mlp_only_layers": None}, 32),
        ({}, None),
    ],
)
def test_dense_layers_are_not_counted(keys, layers):
    assert hf_layers.num_moe_layers({**QWEN3, **keys}) == layers
    assert hf_layers.num_moe_layers({"model_type": "outer", "text_config": {**QWEN3, **keys}}) == layers


@pytest.mark.parametrize(("name", "value"), [("first_k_dense_replace", [1]), ("decoder_sparse_step", 0)])
def test_a_number_of_layers_that_is_none_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        hf_layers.num_moe_layers({**QWEN3, "num_hidden_layers": 4, name: value})
