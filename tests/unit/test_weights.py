"""from_hf: layouts, both spellings of the experts, dtypes, and what it refuses."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from goldens import NAMES, Golden, by_model

from jax_moriep.config import ROUTER_NAMES, SCORE_BIAS_ROUTERS, MoEConfig
from jax_moriep.errors import ConfigError
from jax_moriep.weights import FAMILIES, from_hf

E, H, INTER, SHARED = 4, 6, 2, 5
WITH_STATE_DICT = [name for name in NAMES if Golden(name).part("hf.")]


SPELLINGS = by_model("spellings")


def make_cfg(**changes):
    return MoEConfig(E, 2, H, INTER, **changes)


def numbered(*shape):
    """Different numbers everywhere, so that a wrong transposition cannot pass."""
    numbered.next = getattr(numbered, "next", 0) + 1
    return (np.arange(np.prod(shape)).reshape(shape) + 1000 * numbered.next).astype(np.float32)


def fused(**more):
    """The block that most families share, as transformers 5 keeps it in memory."""
    return {
        "gate.weight": numbered(E, H),
        "experts.gate_up_proj": numbered(E, 2 * INTER, H),
        "experts.down_proj": numbered(E, H, INTER),
        **more,
    }


def split(block, gate, up, down):
    """The same block with one tensor per expert, as checkpoints on disk have it."""
    out = {k: v for k, v in block.items() if not k.startswith("experts.")}
    for i in range(E):
        out[f"experts.{i}.{gate}.weight"] = block["experts.gate_up_proj"][i, :INTER]
        out[f"experts.{i}.{up}.weight"] = block["experts.gate_up_proj"][i, INTER:]
        out[f"experts.{i}.{down}.weight"] = block["experts.down_proj"][i]
    return out


def shared(name):
    return {
        f"{name}.gate_proj.weight": numbered(SHARED, H),
        f"{name}.up_proj.weight": numbered(SHARED, H),
        f"{name}.down_proj.weight": numbered(H, SHARED),
    }


def arrays_of(params):
    return {k: v for k, v in vars(params).items() if v is not None and k != "layout"}


def assert_params(params, **expected):
    actual = arrays_of(params)
    assert actual.keys() == expected.keys()
    for field, value in expected.items():
        np.testing.assert_array_equal(actual[field], value, err_msg=field)


@pytest.mark.parametrize("name", WITH_STATE_DICT)
def test_golden_state_dict(name):
    golden = Golden(name)
    params = from_hf(golden.part("hf."), golden.family, golden.cfg)
    assert_params(params, **golden.part("param."))


def test_goldens_cover_gpt_oss_mixtral_and_deepseek_v3():
    assert WITH_STATE_DICT == ["deepseek_v3", "gpt_oss", "mixtral"]


def spelled(model, spelling):
    """The layer's tensors of a real model by their whole names, and the prefix of its MoE block."""
    tensors = {
        key.removeprefix(f"{spelling}/"): value
        for key, value in SPELLINGS[model].items()
        if key.startswith(f"{spelling}/")
    }
    *prefix, _ = next(iter(tensors)).split(".")[:5]
    return tensors, ".".join(prefix) + "."


def below(tensors, prefix):
    assert all(key.startswith(prefix) for key in tensors)
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def spelling_cfg(model):
    return MoEConfig(**json.loads(str(SPELLINGS[model]["cfg"])))


@pytest.mark.parametrize("model", SPELLINGS)
def test_a_model_as_saved_gives_the_same_as_in_memory(model):
    family = str(SPELLINGS[model]["family"])
    memory, disk = (
        from_hf(below(*spelled(model, spelling)), family, spelling_cfg(model))
        for spelling in ("memory", "disk")
    )
    assert_params(disk, **arrays_of(memory))
    assert len(np.unique(memory.w1)) > 80


def test_spellings_have_every_family_and_differ_where_checkpoints_do():
    assert {str(arrays["family"]) for arrays in SPELLINGS.values()} == set(FAMILIES)
    same = {m for m in SPELLINGS if spelled(m, "memory")[0].keys() == spelled(m, "disk")[0].keys()}
    assert same == {"gpt_oss", "llama4_text"}


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2", "qwen3_moe", "olmoe", "deepseek_v2"])
def test_fused_and_per_expert_tensors_give_the_same(family):
    changes, more = {}, {}
    if family == "minimax_m2":
        changes = {"router": "sigmoid_topk", "score_bias": True}
        more = {"e_score_correction_bias": numbered(E)}
    block = fused(**more)
    names = (
        ("w1", "w3", "w2") if family in ("mixtral", "minimax_m2") else ("gate_proj", "up_proj", "down_proj")
    )
    expected = {
        "router": block["gate.weight"].T,
        "w1": block["experts.gate_up_proj"],
        "w2": block["experts.down_proj"],
    }
    if more:
        expected["score_bias"] = more["e_score_correction_bias"]
    for state_dict in (block, split(block, *names)):
        assert_params(from_hf(state_dict, family, make_cfg(**changes)), **expected)


def test_shared_expert_with_gate():
    block = fused(**shared("shared_expert"), **{"shared_expert_gate.weight": numbered(1, H)})
    params = from_hf(block, "qwen2_moe", make_cfg(shared_intermediate_size=SHARED, shared_gate=True))
    np.testing.assert_array_equal(params.shared_gate, block["shared_expert_gate.weight"].T)
    np.testing.assert_array_equal(params.shared_w1[:SHARED], block["shared_expert.gate_proj.weight"])
    np.testing.assert_array_equal(params.shared_w1[SHARED:], block["shared_expert.up_proj.weight"])
    np.testing.assert_array_equal(params.shared_w2, block["shared_expert.down_proj.weight"])


@pytest.mark.parametrize("prefix", ["gate.", ""])
def test_ernie_bias_in_memory_and_on_disk(prefix):
    name = f"{prefix}moe_statics.e_score_correction_bias"
    block = fused(**shared("shared_experts"), **{name: numbered(1, E)})
    cfg = make_cfg(router="ernie45", score_bias=True, shared_intermediate_size=SHARED)
    params = from_hf(block, "ernie45", cfg)
    np.testing.assert_array_equal(params.score_bias, block[name][0])


def test_granite_in_memory():
    block = {
        "router.weight": numbered(E, H),
        "experts.gate_up_proj": numbered(E, 2 * INTER, H),
        "experts.down_proj": numbered(E, H, INTER),
    }
    params = from_hf(block, "granite", make_cfg(router="topk_softmax"))
    assert_params(
        params,
        router=block["router.weight"].T,
        w1=block["experts.gate_up_proj"],
        w2=block["experts.down_proj"],
    )


def test_granite_on_disk():
    block = {
        "router.layer.weight": numbered(E, H),
        "input_linear.weight": numbered(E, 2 * INTER, H),
        "output_linear.weight": numbered(E, H, INTER),
    }
    params = from_hf(block, "granite", make_cfg(router="topk_softmax"))
    assert_params(
        params,
        router=block["router.layer.weight"].T,
        w1=block["input_linear.weight"],
        w2=block["output_linear.weight"],
    )


def test_gpt_oss_takes_gate_and_up_apart():
    gate, up = numbered(E, H, INTER), numbered(E, H, INTER)
    gate_bias, up_bias = numbered(E, INTER), numbered(E, INTER)
    block = {
        "router.weight": numbered(E, H),
        "router.bias": numbered(E),
        "experts.gate_up_proj": np.stack([gate, up], axis=-1).reshape(E, H, 2 * INTER),
        "experts.gate_up_proj_bias": np.stack([gate_bias, up_bias], axis=-1).reshape(E, 2 * INTER),
        "experts.down_proj": numbered(E, INTER, H),
        "experts.down_proj_bias": numbered(E, H),
    }
    cfg = make_cfg(router="gpt_oss", router_bias=True, expert_bias=True, activation="swiglu_clamped")
    params = from_hf(block, "gpt_oss", cfg)
    assert_params(
        params,
        router=block["router.weight"].T,
        router_bias=block["router.bias"],
        w1=np.concatenate([gate.transpose(0, 2, 1), up.transpose(0, 2, 1)], axis=1),
        b1=np.concatenate([gate_bias, up_bias], axis=1),
        w2=block["experts.down_proj"].transpose(0, 2, 1),
        b2=block["experts.down_proj_bias"],
    )


def test_llama4_is_transposed():
    block = {
        "router.weight": numbered(E, H),
        "experts.gate_up_proj": numbered(E, H, 2 * INTER),
        "experts.down_proj": numbered(E, INTER, H),
        **shared("shared_expert"),
    }
    params = from_hf(block, "llama4", make_cfg(router="llama4", shared_intermediate_size=SHARED))
    np.testing.assert_array_equal(params.w1, block["experts.gate_up_proj"].transpose(0, 2, 1))
    np.testing.assert_array_equal(params.w2, block["experts.down_proj"].transpose(0, 2, 1))


def test_dtypes_are_kept_but_the_score_bias_is_float32():
    block = {k: v.astype(jnp.bfloat16) for k, v in fused(e_score_correction_bias=np.ones(E)).items()}
    params = from_hf(block, "minimax_m2", make_cfg(router="sigmoid_topk", score_bias=True))
    assert params.w1.dtype == params.w2.dtype == params.router.dtype == jnp.bfloat16
    assert params.score_bias.dtype == np.float32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors(dtype):
    torch = pytest.importorskip("torch")
    block = {k: v / 1024 for k, v in fused().items()}
    tensors = {k: torch.nn.Parameter(torch.tensor(v).to(getattr(torch, dtype))) for k, v in block.items()}
    expected = from_hf({k: v.astype(jnp.dtype(dtype)) for k, v in block.items()}, "mixtral", make_cfg())
    assert_params(from_hf(tensors, "mixtral", make_cfg()), **arrays_of(expected))


# What is refused


@pytest.mark.parametrize(
    ("family", "changes", "change", "text"),
    [
        ("gpt5", {}, {}, r"family='gpt5' must be one of \('mixtral',"),
        ("mixtral", {}, {"gate.weight": None}, r"state_dict lacks 'gate\.weight' of shape \(4, 6\)"),
        ("mixtral", {}, {"experts.down_proj": None}, r"lacks 'experts\.down_proj' of shape \(4, 6, 2\)"),
        ("mixtral", {}, {"experts.gate_up_proj": None}, r"lacks 'experts\.0\.w1\.weight' of shape \(2, 6\)"),
        (
            "mixtral",
            {},
            {"gate.weight": np.ones((H, E))},
            r"'gate\.weight'\]\.shape=\(6, 4\) must be \(4, 6\)",
        ),
        ("mixtral", {}, {"gate.weight": np.ones((E, H), np.int16)}, r"'gate\.weight'\]\.dtype='int16'"),
        ("mixtral", {}, {"gate.weight": [[1.0]]}, r"'gate\.weight'\]\.dtype='list'"),
        ("mixtral", {}, {"shared.weight": np.ones(3)}, r"state_dict has \['shared\.weight'\] \(1 in all\)"),
        ("mixtral", {"router_bias": True}, {}, r"router_bias=True must be unset for family='mixtral'"),
        ("mixtral", {"shared_intermediate_size": 3}, {}, r"shared_intermediate_size=3 must be unset"),
        (
            "deepseek_v3",
            {"router": "deepseek_v3", "score_bias": True},
            {},
            r"lacks 'gate\.e_score_correction",
        ),
        ("qwen2_moe", {"shared_intermediate_size": 3}, {}, r"lacks 'shared_expert\.gate_proj\.weight'"),
    ],
)
def test_refused(family, changes, change, text):
    block = {k: v for k, v in (fused() | change).items() if v is not None}
    with pytest.raises(ConfigError, match=text):
        from_hf(block, family, make_cfg(**changes))


@pytest.mark.parametrize(
    ("model", "changes", "text"),
    [
        (
            "gpt_oss",
            {"activation": "silu"},
            r"activation='silu' must be 'swiglu_clamped' for family='gpt_oss'",
        ),
        ("gpt_oss", {"router": "softmax_topk"}, r"router='softmax_topk' must be 'gpt_oss' or 'topk_softmax'"),
        ("gpt_oss", {"routed_scaling": 2.0}, r"routed_scaling=2\.0 must be 1\.0 for family='gpt_oss'"),
        ("qwen3_moe", {"router": "deepseek_v3"}, r"router='deepseek_v3' must be 'softmax_topk'"),
        (
            "qwen3_moe",
            {"activation": "swiglu_clamped"},
            r"activation='swiglu_clamped' must be 'silu' or 'gelu'",
        ),
        ("qwen2_moe", {"router": "topk_softmax"}, r"router='topk_softmax' must be 'softmax_topk'"),
        ("olmoe", {"router": "llama4"}, r"router='llama4' must be 'softmax_topk'"),
        ("mixtral", {"norm_topk": False}, r"norm_topk=False must be True for family='mixtral'"),
        ("mixtral", {"router": "sigmoid_topk"}, r"router='sigmoid_topk' must be 'softmax_topk'"),
        ("minimax_m2", {"norm_topk": False}, r"norm_topk=False must be True for family='minimax_m2'"),
        ("minimax_m2", {"router": "deepseek_v3"}, r"router='deepseek_v3' must be 'sigmoid_topk'"),
        ("deepseek_v2", {"router": "llama4"}, r"router='llama4' must be 'deepseek_v2' or 'softmax_topk'"),
        ("deepseek_v3", {"router": "sigmoid_topk"}, r"router='sigmoid_topk' must be 'deepseek_v3'"),
        ("ernie4_5_moe", {"norm_topk": False}, r"norm_topk=False must be True for family='ernie45'"),
        ("ernie4_5_moe", {"router": "sigmoid_topk"}, r"router='sigmoid_topk' must be 'ernie45'"),
        ("granitemoe", {"router": "softmax_topk"}, r"router='softmax_topk' must be 'topk_softmax' or"),
        ("llama4_text", {"router": "topk_softmax"}, r"router='topk_softmax' must be 'llama4'"),
    ],
)
def test_a_config_that_contradicts_the_family(model, changes, text):
    family, cfg = str(SPELLINGS[model]["family"]), dataclasses.replace(spelling_cfg(model), **changes)
    for spelling in ("memory", "disk"):
        with pytest.raises(ConfigError, match=text):
            from_hf(below(*spelled(model, spelling)), family, cfg)


@pytest.mark.parametrize("model", SPELLINGS)
def test_every_family_takes_one_formula_only(model):
    """Of all routers, those that no model of the family has are refused; a callable is the user's own."""
    family, cfg = str(SPELLINGS[model]["family"]), spelling_cfg(model)
    block = below(*spelled(model, "memory"))
    same_formula = ({"gpt_oss", "topk_softmax"}, {"deepseek_v2", "softmax_topk"})
    fits = next((pair for pair in same_formula if cfg.router in pair), {cfg.router})
    if family != "deepseek_v2" and cfg.router == "softmax_topk":
        fits = {"softmax_topk"}
    for router in SCORE_BIAS_ROUTERS if cfg.score_bias else ROUTER_NAMES:
        changed = dataclasses.replace(cfg, router=router)
        if router in fits:
            from_hf(block, family, changed)
        else:
            with pytest.raises(ConfigError, match=f"router={router!r} must be"):
                from_hf(block, family, changed)
    from_hf(block, family, dataclasses.replace(cfg, router=lambda logits, bias, cfg: None))


@pytest.mark.parametrize("model", SPELLINGS)
@pytest.mark.parametrize("spelling", ["memory", "disk"])
def test_whole_names_are_answered_with_their_prefix(model, spelling):
    family, cfg = str(SPELLINGS[model]["family"]), spelling_cfg(model)
    tensors, prefix = spelled(model, spelling)
    attention = {prefix.rsplit(".", 2)[0] + ".self_attn.gate.weight": np.ones((4, 8), np.float32)}
    with pytest.raises(ConfigError) as raised:
        from_hf(tensors | attention, family, cfg)
    text = str(raised.value)
    assert f"pass the names below {prefix!r} without that prefix" in text
    assert f"({len(tensors) + 1} in all)" in text
    # Below the layer only, as some loaders have it.
    layer, block = prefix.rsplit(".", 2)[0] + ".", prefix.split(".")[-2] + "."
    with pytest.raises(ConfigError, match=f"below '{block}' without that prefix"):
        from_hf(below(tensors, layer), family, cfg)


def test_prefixes_of_several_layers_come_in_their_order():
    block = fused()
    layers = {f"model.layers.{i}.mlp.{k}": v for i in (10, 2, 9) for k, v in block.items()}
    layer = r"'model\.layers\.{}\.mlp\.'"
    text = f"below {layer.format(2)} or {layer.format(9)} without that prefix " + r"\(3 blocks in all\)"
    with pytest.raises(ConfigError, match=text):
        from_hf(layers, "mixtral", make_cfg())


@pytest.mark.parametrize(
    ("family", "router", "usual"),
    [
        ("mixtral", "softmax_topk", "'model.layers.<i>.mlp.' or 'model.layers.<i>.block_sparse_moe.'"),
        ("granite", "topk_softmax", "'model.layers.<i>.block_sparse_moe.'"),
        ("llama4", "llama4", "'model.layers.<i>.feed_forward.'"),
    ],
)
def test_names_without_a_block(family, router, usual):
    cfg = make_cfg(router=router)
    one = "it has ['lm_head.weight'] (1 in all)"
    for state_dict, there in (({}, "it is empty"), ({"lm_head.weight": np.ones(3)}, one)):
        with pytest.raises(ConfigError) as raised:
            from_hf(state_dict, family, cfg)
        assert there in str(raised.value)
        assert f"usually {usual}, without that prefix" in str(raised.value)


def test_arguments_of_another_type():
    for args, text in (
        (([np.ones(3)], "mixtral", make_cfg()), "state_dict='list' must be a mapping"),
        ((fused(), "mixtral", {"num_experts": E}), r"cfg='dict' must be a jm\.MoEConfig"),
    ):
        with pytest.raises(ConfigError, match=text):
            from_hf(*args)


@pytest.mark.parametrize("field", ["router_bias", "expert_bias"])
def test_config_must_ask_for_the_biases_that_are_there(field):
    golden = Golden("gpt_oss")
    cfg = dataclasses.replace(golden.cfg, **{field: False})
    with pytest.raises(ConfigError, match=f"{field}=False must be set for family='gpt_oss'"):
        from_hf(golden.part("hf."), "gpt_oss", cfg)


def test_config_must_ask_for_the_shared_expert_and_the_score_bias():
    golden = Golden("deepseek_v3")
    for changes in ({"shared_intermediate_size": None}, {"score_bias": False}):
        with pytest.raises(ConfigError, match=r"state_dict has \['(shared_experts|gate\.e_score)"):
            from_hf(golden.part("hf."), "deepseek_v3", dataclasses.replace(golden.cfg, **changes))


def test_a_missing_expert_is_named():
    block = split(fused(), "w1", "w3", "w2")
    del block["experts.3.w3.weight"]
    with pytest.raises(ConfigError, match=r"lacks 'experts\.3\.w3\.weight'"):
        from_hf(block, "mixtral", make_cfg())


def test_every_family_has_a_golden_or_shares_the_layout_of_one():
    assert {Golden(name).family for name in NAMES} | {"olmoe"} == set(FAMILIES)
