"""install and uninstall: what is put into MaxText's ``RoutedMoE``, and how it is known that it fits."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError
from jax_moriep.maxtext import options, routed
from jax_moriep.tuning_options import Tuning

_TESTED = "0.2.5"

# What is replaced and what the replacement calls, by the names of its parameters. A release in which one of
# these differs may mean something else by it.
_METHODS = {
    "sparse_matmul": (
        "self",
        "inputs",
        "gate_logits",
        "pre_bias_logits",
        "w0_kernel",
        "w1_kernel",
        "wo_kernel",
        "w0_bias",
        "w1_bias",
        "wo_bias",
        "input_ids",
        "forced_routed_experts",
    ),
    "get_topk": ("self", "gate_logits", "pre_bias_logits", "rngs", "input_ids", "forced_routed_experts"),
    "load_balance_loss": ("self", "top_k_indices", "logits", "density_prob"),
    "megatron_seq_aux_loss": ("self", "scores"),
    "should_update_load_balance": ("self",),
    "get_ragged_buffer_factor": ("self",),
    "_logical_to_mesh_axes": ("self", "logical_name"),
    "_maybe_shard_with_pspec": ("self", "inputs", "pspec", "logical_axes"),
}
_FUNCTIONS = {
    "load_balance_updates_from_counts": ("expert_counts", "num_experts", "rate"),
    "uses_megatron_seq_aux_loss": ("config",),
}

# MaxText's own methods while ours stand in their places.
_originals: dict[str, Callable[..., Any]] = {}


def install(
    *,
    transport: str = "auto",
    experts: str = "auto",
    wire_dtype: str | None = None,
    expert_quant: str | None = None,
    block: int | None = None,
    tuning: Tuning | None = None,
) -> None:
    """Lets MaxText's mixture-of-experts layers with ``sparse_matmul: true``, its default, run by ``ep_moe``.

    Call it before the model is made. ``RoutedMoE`` keeps its parameters, gate, routing and losses, so configs
    and checkpoints stay as they are; what ``sparse_matmul`` computed with the routes, ``ep_moe`` computes,
    over the ranks of the mesh axis ``expert``. Layers with ``sparse_matmul: false`` stay MaxText's own.
    Installing again takes the new options for layers that are traced from then on.

    Args:
      transport: as in ``jm.MoEConfig``, and so are all others.
      experts: likewise.
      wire_dtype: likewise.
      expert_quant: likewise; MaxText's master weights are quantised in every call.
      block: likewise.
      tuning: likewise.

    Raises:
      ImportError: MaxText is not installed.
      ConfigError: an option breaks its rule, or this MaxText's ``RoutedMoE`` is another than the one that is
        known here. A layer whose config asks for what ``ep_moe`` cannot do raises it when it is made.
    """
    layer_options = {
        "transport": transport,
        "experts": experts,
        "wire_dtype": wire_dtype,
        "expert_quant": expert_quant,
        "block": block,
        "tuning": tuning,
    }
    MoEConfig(1, 1, 1, 1, **layer_options)  # so that a wrong option is said here and not by a layer
    moe = _moe_module()
    uninstall()
    _check_fits(moe)
    replaced = moe.RoutedMoE
    made = replaced.__init__
    _originals.update(__init__=made, sparse_matmul=replaced.sparse_matmul)

    @functools.wraps(made)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        options.check(self)

    @functools.wraps(replaced.sparse_matmul)
    def sparse_matmul(self: Any, *args: Any, **kwargs: Any) -> Any:
        return routed.sparse_matmul(moe, layer_options, self, *args, **kwargs)

    replaced.__init__ = checked
    replaced.sparse_matmul = sparse_matmul


def uninstall() -> None:
    """Gives MaxText its own methods back, for layers that are traced from then on; idempotent."""
    if _originals:
        replaced = _moe_module().RoutedMoE
        for name, method in _originals.items():
            setattr(replaced, name, method)
        _originals.clear()


def _moe_module() -> Any:
    try:
        return importlib.import_module("maxtext.layers.moe")
    except ImportError as e:
        raise ImportError(
            f"jax_moriep.maxtext.install needs MaxText, and importing maxtext.layers.moe failed ({e}); "
            f"pip install maxtext=={_TESTED} (Python >= 3.12) and what docs/maxtext.md lists with it"
        ) from e


def _check_fits(moe: Any) -> None:
    """Raises ConfigError unless everything that is replaced or called is there with the parameters known."""
    for owner, known in ((getattr(moe, "RoutedMoE", None), _METHODS), (moe, _FUNCTIONS)):
        for name, want in known.items():
            method = getattr(owner, name, None)
            got = None if method is None else tuple(inspect.signature(method).parameters)
            if got != want:
                whose = "RoutedMoE." if known is _METHODS else ""
                found = "is missing" if got is None else f"takes {got} instead of {want}"
                raise ConfigError(
                    f"maxtext {_version()} must have the maxtext.layers.moe that jax_moriep knows, but "
                    f"{whose}{name} {found}; use maxtext=={_TESTED}"
                )


def _version() -> str:
    return getattr(importlib.import_module("maxtext"), "__version__", "of unknown version")
