"""What a config.json of Hugging Face says of a model's MoE block: its family, and the fields of MoEConfig.

The keys and what stands for a missing one are those of transformers 5.24. It is about dicts only, so that
``MoEConfig`` can use it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax_moriep.errors import ConfigError, rule

FILE = "config.json"
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where a model of several kinds of input keeps its language model's config."""
_NUM_EXPERTS = ("n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts")
_TOP_K = ("num_experts_per_tok", "moe_k")
_NUM_LAYERS = "num_hidden_layers"
_REQUIRED = object()
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu"}


class Described(NamedTuple):
    """What a config says.

    Attributes:
      model_type: of the language model.
      family: of ``jm.weights``.
      fields: the arguments of MoEConfig.
    """

    model_type: str
    family: str
    fields: dict[str, Any]


def describe(config: Any) -> Described:
    """Reads a config.

    Args:
      config: a config object of transformers, the dict of a config.json, or the path of one or of its folder.

    Raises:
      ConfigError: it is none of these, is not of a model in ``MODELS``, or lacks a key.
    """
    whole = to_dict(config)
    part = _language_part(whole)
    if part is None:
        raise ConfigError(
            rule(
                "config['model_type']",
                whole.get("model_type"),
                f"be one of {tuple(MODELS)}, there or in {_TEXT_PARTS[0]!r}",
                "for a model whose MoE block is that of one of these, pass the dict with that model_type",
            )
        )
    model_type = part["model_type"]
    family, fields_of = MODELS[model_type]
    keys = _Keys(part)
    fields = {
        "num_experts": keys.get(*_NUM_EXPERTS),
        "top_k": keys.get(*_TOP_K),
        "hidden_size": keys.get("hidden_size"),
        "activation": keys.activation(),
        "expert_quant": _scheme(part.get("quantization_config") or whole.get("quantization_config")),
        **fields_of(keys),
    }
    return Described(model_type, family, fields)


def num_layers(config: Any) -> int | None:
    """How many decoder layers a model runs, of whatever model_type; None where the config does not say.

    Files may hold more, such as the layer of DeepSeek-V3 that predicts two tokens ahead.

    Args:
      config: as for ``describe``.

    Raises:
      ConfigError: it is no config, or the number is none.
    """
    found = decoder_part(config).get(_NUM_LAYERS)
    if found is not None and type(found) is not int:
        raise ConfigError(
            rule(f"config[{_NUM_LAYERS!r}]", found, "be an integer", f"pass the model's own {FILE}")
        )
    return found


def decoder_part(config: Any) -> Mapping[str, Any]:
    """The part of a config that has the decoder's layers; empty where none has."""
    whole = to_dict(config)
    return _language_part(whole) or _part_with(whole, _NUM_LAYERS) or {}


def to_dict(config: Any) -> dict[str, Any]:
    """The dict of a config object, of a dict, or of a config.json."""
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        path = path / FILE if path.is_dir() else path
        cure = "pass the folder of a checkpoint, or its config.json"
        try:
            found = json.loads(path.read_text())
        except OSError:
            raise ConfigError(rule("config", str(config), f"have a {FILE} that can be read", cure)) from None
        except ValueError as e:
            raise ConfigError(rule("config", str(path), f"be JSON ({e})", cure)) from None
        if not isinstance(found, dict):
            raise ConfigError(rule("config", str(path), "hold a JSON object", cure))
        return found
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    raise ConfigError(
        rule(
            "config",
            type(config).__name__,
            "be a config object of transformers, a dict or a path",
            f"pass the folder of a checkpoint, or what its {FILE} holds",
        )
    )


def _language_part(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config itself or the part of it that is of a known model."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in MODELS:
        return dict(config)
    return next((found for part in _parts(config) if (found := _language_part(part)) is not None), None)


def _part_with(config: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """The config itself or the first part of it that has a key."""
    if config.get(key) is not None:
        return config
    return next((found for part in _parts(config) if (found := _part_with(part, key)) is not None), None)


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config[name] for name in _TEXT_PARTS if isinstance(config.get(name), Mapping)]


class _Keys:
    """The keys of one config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def get(self, *names: str, default: Any = _REQUIRED) -> Any:
        """The value of the first name that is there and not null."""
        for name in names:
            if self._config.get(name) is not None:
                return self._config[name]
        if default is _REQUIRED:
            wanted = " or ".join(map(repr, names))
            raise ConfigError(
                f"config of model_type={self._config['model_type']!r} lacks {wanted}; "
                f"pass the model's own {FILE}"
            )
        return default

    def unless_null(self, name: str, default: Any) -> Any:
        """The value, or what stands for a missing one. A null is refused: no model runs with it."""
        return self.get(name) if name in self._config else default

    def or_null_as_false(self, name: str, default: bool) -> Any:
        """The same where models run with a null: their code asks whether the value is true."""
        return (
            False if name in self._config and self._config[name] is None else self.unless_null(name, default)
        )

    def check(self, name: str, value: Any) -> None:
        """Refuses another value than the one that the router computes with."""
        found = self.get(name, default=value)
        if found != value:
            cure = "make the MoEConfig by hand, with a callable as router"
            raise ConfigError(rule(f"config[{name!r}]", found, f"be {value!r}", cure))

    def activation(self) -> str:
        name = self.unless_null("hidden_act", "silu")
        if not isinstance(name, str) or name not in _ACTIVATIONS:
            cure = "make the MoEConfig by hand if one of these is the same"
            raise ConfigError(rule("config['hidden_act']", name, f"be one of {tuple(_ACTIVATIONS)}", cure))
        return _ACTIVATIONS[name]

    def shared(self, count: str, width: str, default: int) -> int | None:
        """The width of a shared expert that is so many times as wide as a routed one; null is none."""
        return (self._config.get(count, default) or 0) * self.get(width) or None


def _mixtral(keys: _Keys) -> dict[str, Any]:
    return {"intermediate_size": keys.get("intermediate_size")}


def _minimax_m2(keys: _Keys) -> dict[str, Any]:
    return {**_mixtral(keys), "router": "sigmoid_topk", "score_bias": True}


def _olmoe(keys: _Keys) -> dict[str, Any]:
    return {**_mixtral(keys), "norm_topk": keys.unless_null("norm_topk_prob", False)}


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
    return {
        "intermediate_size": keys.get("moe_intermediate_size"),
        "norm_topk": keys.unless_null("norm_topk_prob", False),
    }


def _qwen2_moe(keys: _Keys) -> dict[str, Any]:
    shared = {"shared_intermediate_size": keys.get("shared_expert_intermediate_size"), "shared_gate": True}
    return {**_qwen3_moe(keys), **shared}


def _deepseek_v2(keys: _Keys) -> dict[str, Any]:
    fields = {
        "intermediate_size": keys.get("moe_intermediate_size"),
        "shared_intermediate_size": keys.shared("n_shared_experts", "moe_intermediate_size", 2),
        "routed_scaling": keys.unless_null("routed_scaling_factor", 1.0),
        "router": "deepseek_v2",
        # transformers' code of this model never divides by the sum, whatever norm_topk_prob says.
        "norm_topk": False,
    }
    method = keys.unless_null("topk_method", "greedy")
    if method == "greedy":
        return fields
    if method != "group_limited_greedy":
        raise ConfigError(
            rule(
                "config['topk_method']",
                method,
                "be 'greedy' or 'group_limited_greedy'",
                "make the MoEConfig by hand, with a callable as router",
            )
        )
    return {**fields, "num_groups": keys.get("n_group"), "top_groups": keys.get("topk_group")}


def _like_deepseek_v3(
    keys: _Keys, *, groups: int = 1, top_groups: int = 1, scaling: float = 1.0, shared: int, norm_topk: bool
) -> dict[str, Any]:
    """The keywords are what the models differ in: ``norm_topk`` itself, and what stands for missing keys."""
    return {
        "intermediate_size": keys.get("moe_intermediate_size"),
        "shared_intermediate_size": keys.shared("n_shared_experts", "moe_intermediate_size", shared),
        "routed_scaling": keys.unless_null("routed_scaling_factor", scaling),
        "router": "deepseek_v3",
        "score_bias": True,
        "norm_topk": norm_topk,
        "num_groups": keys.unless_null("n_group", groups),
        "top_groups": keys.unless_null("topk_group", top_groups),
    }


def _deepseek_v3(keys: _Keys) -> dict[str, Any]:
    keys.check("scoring_func", "sigmoid")
    keys.check("topk_method", "noaux_tc")
    norm_topk = keys.or_null_as_false("norm_topk_prob", True)
    return _like_deepseek_v3(keys, groups=8, top_groups=4, scaling=2.5, shared=1, norm_topk=norm_topk)


def _glm4_moe(keys: _Keys) -> dict[str, Any]:
    return _like_deepseek_v3(keys, shared=1, norm_topk=keys.unless_null("norm_topk_prob", True))


def _dots1(keys: _Keys) -> dict[str, Any]:
    return _like_deepseek_v3(keys, shared=0, norm_topk=keys.or_null_as_false("norm_topk_prob", False))


def _ernie45(keys: _Keys) -> dict[str, Any]:
    keys.check("moe_norm_min", 1e-12)
    return {
        "intermediate_size": keys.get("moe_intermediate_size"),
        "shared_intermediate_size": keys.shared("moe_num_shared_experts", "moe_intermediate_size", 2),
        "router": "ernie45",
        "score_bias": True,
    }


def _granite(keys: _Keys) -> dict[str, Any]:
    return {**_mixtral(keys), "router": "topk_softmax"}


def _gpt_oss(keys: _Keys) -> dict[str, Any]:
    return {
        **_mixtral(keys),
        "router": "gpt_oss",
        "router_bias": True,
        "expert_bias": True,
        "activation": "swiglu_clamped",
        "activation_limit": keys.unless_null("swiglu_limit", 7.0),
        "activation_alpha": keys.unless_null("swiglu_alpha", 1.702),
    }


def _llama4(keys: _Keys) -> dict[str, Any]:
    inner = keys.get("intermediate_size")
    return {"intermediate_size": inner, "shared_intermediate_size": inner, "router": "llama4"}


MODELS: dict[str, tuple[str, Callable[[_Keys], dict[str, Any]]]] = {
    "mixtral": ("mixtral", _mixtral),
    "minimax_m2": ("minimax_m2", _minimax_m2),
    "qwen3_moe": ("qwen3_moe", _qwen3_moe),
    "olmoe": ("olmoe", _olmoe),
    "qwen2_moe": ("qwen2_moe", _qwen2_moe),
    "deepseek_v2": ("deepseek_v2", _deepseek_v2),
    "deepseek_v3": ("deepseek_v3", _deepseek_v3),
    "glm4_moe": ("deepseek_v3", _glm4_moe),
    "dots1": ("deepseek_v3", _dots1),
    "ernie4_5_moe": ("ernie45", _ernie45),
    "granitemoe": ("granite", _granite),
    "gpt_oss": ("gpt_oss", _gpt_oss),
    "llama4_text": ("llama4", _llama4),
}
"""By model_type: the family of the weights, and how the rest of MoEConfig is read."""


def _scheme(given: Any) -> str | None:
    """The scheme of the experts by a quantization_config; None for one that the package has not."""
    quantization = _mapping("config['quantization_config']", given)
    kept = [*_names(quantization, "ignore"), *_names(quantization, "modules_to_not_convert")]
    if any(re.search(r"(?<!shared_)experts", str(name)) for name in kept):
        return None
    method = quantization.get("quant_method")
    if method == "fp8":
        size = quantization.get("weight_block_size")
        return "fp8_token" if size is None else _of_blocks(size)
    if method != "compressed-tensors":
        return None
    groups = _mapping("config['quantization_config']['config_groups']", quantization.get("config_groups"))
    found = set()
    for name, group in groups.items():
        path = f"config['quantization_config']['config_groups'][{name!r}]"
        weights = _mapping(f"{path}['weights']", _mapping(path, group).get("weights"))
        found.add(_scheme_of_group(weights))
    return found.pop() if len(found) == 1 else None


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(rule(name, value, "be an object", f"pass the model's own {FILE}"))
    return value


def _names(quantization: Mapping[str, Any], key: str) -> list[Any]:
    """The names of modules below a key; one may stand there without a list."""
    value = quantization.get(key)
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    if not isinstance(value, (list, tuple, set)):
        must, cure = "be a list of names", f"pass the model's own {FILE}"
        raise ConfigError(rule(f"config['quantization_config'][{key!r}]", value, must, cure))
    return list(value)


def _scheme_of_group(weights: Mapping[str, Any]) -> str | None:
    if weights.get("num_bits") != 8:
        return None
    kind, strategy = weights.get("type"), weights.get("strategy")
    if strategy in ("channel", "tensor"):
        return {"float": "fp8_token", "int": "int8_token"}.get(str(kind))
    if strategy == "block" and kind == "float":
        return _of_blocks(weights.get("block_structure"))
    return None


def _of_blocks(size: Any) -> str | None:
    return "fp8_block" if isinstance(size, (list, tuple)) and list(size) == [128, 128] else None
