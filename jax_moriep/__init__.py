"""Expert-parallel mixture-of-experts for JAX; see docs/design.md for the words and the contracts."""

import importlib
from types import ModuleType

from jax_moriep import interop, weights
from jax_moriep.balance import update_score_bias
from jax_moriep.config import MoEConfig, MoEParams, MoEStats
from jax_moriep.errors import (
    CapacityOverflow,
    ConfigError,
    LibraryError,
    MoriepError,
    ShardingError,
    TransportError,
)
from jax_moriep.exchange import checkpoint_policy, combine, dispatch, initialize
from jax_moriep.experts import expert_mlp
from jax_moriep.explain import explain
from jax_moriep.layer import ep_moe
from jax_moriep.padding import pad_like, unpad_params
from jax_moriep.params import init_params, pad_params, param_specs
from jax_moriep.plan import Dispatched, Plan
from jax_moriep.prepare import prepare_params, quantize_params
from jax_moriep.routing import ROUTERS, Route, route
from jax_moriep.stats import check_stats
from jax_moriep.tuning_options import Tuning
from jax_moriep.version import __version__

__all__ = [
    "ROUTERS",
    "CapacityOverflow",
    "ConfigError",
    "Dispatched",
    "LibraryError",
    "MoEConfig",
    "MoEParams",
    "MoEStats",
    "MoriepError",
    "Plan",
    "Route",
    "ShardingError",
    "TransportError",
    "Tuning",
    "__version__",
    "check_stats",
    "checkpoint_policy",
    "combine",
    "dispatch",
    "ep_moe",
    "expert_mlp",
    "explain",
    "flax",
    "init_params",
    "initialize",
    "interop",
    "maxtext",
    "pad_like",
    "pad_params",
    "param_specs",
    "prepare_params",
    "quantize_params",
    "route",
    "unpad_params",
    "update_score_bias",
    "weights",
]


def __dir__() -> list[str]:
    """The public names; the modules that hold them are not public."""
    return __all__


def __getattr__(name: str) -> ModuleType:
    """Imports ``jm.flax`` and ``jm.maxtext`` on first use, so that jax_moriep itself needs no Flax."""
    if name in ("flax", "maxtext"):
        return importlib.import_module(f"jax_moriep.{name}")
    raise AttributeError(f"module 'jax_moriep' has no attribute {name!r}")
