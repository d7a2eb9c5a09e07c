"""Which decoder layers of a model have a MoE block, by its config.json of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_moriep.errors import ConfigError, rule
from jax_moriep.hf_config import FILE, decoder_part, num_layers


def num_moe_layers(config: Any) -> int | None:
    """How many of a model's decoder layers have a MoE block; None where the config does not say.

    What makes some of them dense is taken from the config alone: a checkpoint may not be there.

    Args:
      config: as for ``hf_config.describe``.

    Raises:
      ConfigError: it is no config, or a number is none.
    """
    if (layers := num_layers(config)) is None:
        return None
    part = decoder_part(config)
    if (named := _layers_in(part, "moe_layers")) is not None:
        return len(named)
    dense = _layers_in(part, "mlp_only_layers") or []
    first = max(_number_in(part, name, 0) for name in ("first_k_dense_replace", "moe_layer_start_index"))
    last = _number_in(part, "moe_layer_end_index", -1)
    # Which of so many consecutive layers it is: the first (DeepSeek), or the last.
    of_freq = _number_in(part, "moe_layer_freq", 1)
    steps = [
        _number_in(part, name, 1)
        for name in ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step")
    ]
    return sum(
        layer not in dense
        and first <= layer <= (last if last >= 0 else layer)
        and layer % of_freq == 0
        and all((layer + 1) % step == 0 for step in steps)
        for layer in range(layers)
    )


def _layers_in(part: Mapping[str, Any], name: str) -> list[Any] | None:
    """A config's list of layers; None where it has none, or says it in another way."""
    found = part.get(name)
    return found if isinstance(found, list) else None


def _number_in(part: Mapping[str, Any], name: str, default: int) -> int:
    """A config's number of or between layers."""
    found = part.get(name)
    if found is None:
        return default
    if type(found) is not int or (default == 1 and found < 1):
        must = "be an integer" if default < 1 else "be a positive integer"
        raise ConfigError(rule(f"config[{name!r}]", found, must, f"pass the model's own {FILE}"))
    return found
