"""Where a model's tokens go, by the name of a routing or by a file of what was measured."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Callable

import numpy as np

from jax_moriep.bench.problem import destinations
from jax_moriep.bench.problem.destinations import Destinations
from jax_moriep.config import MoEConfig
from jax_moriep.errors import ConfigError, rule


def routing(kind: str, cfg: MoEConfig) -> Callable[[int, int], Destinations]:
    """Where tokens go, as a function of R and P.

    Args:
      kind: "uniform", "zipf", or the path of a file: i[E], how often each expert was chosen, or routes
        i[N, K].
      cfg: the layer's.

    Raises:
      ConfigError: there is no such file, or it does not fit the config.
    """
    if kind in ("uniform", "zipf"):
        popularity = np.ones(cfg.num_experts) if kind == "uniform" else destinations.zipf(cfg.num_experts)
    else:
        measured = _measured(kind, cfg)
        if measured.ndim == 2:
            return functools.partial(_counted, measured, cfg)
        popularity = destinations.fitted(measured, cfg.top_k)
    if cfg.num_groups is not None and cfg.top_groups is not None and cfg.top_groups < cfg.num_groups:
        two_best = cfg.router != "deepseek_v2"
        ids = destinations.sampled(popularity, cfg.top_k, cfg.num_groups, cfg.top_groups, two_best=two_best)
        if np.ptp(popularity) > 0:
            return functools.partial(_counted, ids, cfg)
        return lambda ranks, per_node: destinations.evened(
            _counted(ids, cfg, ranks, per_node), cfg.num_experts
        )
    chosen = destinations.chosen_from(popularity, cfg.top_k, np.arange(cfg.num_experts))
    return lambda ranks, per_node: destinations.of_popularity(popularity, cfg.top_k, ranks, per_node, chosen)


def _counted(ids: np.ndarray, cfg: MoEConfig, ranks: int, per_node: int) -> Destinations:
    return destinations.of_ids(ids, cfg.num_experts, ranks, per_node, of_all=False)


def _measured(path: str, cfg: MoEConfig) -> np.ndarray:
    try:
        # Opened here, for np.load leaves open what it cannot read.
        with open(path, "rb") as file:
            found = np.load(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        must = f"be uniform, zipf, or a file of NumPy ({error})"
        raise ConfigError(rule("routing", path, must, "correct it")) from None
    shapes = f"[{cfg.num_experts}] or [N, {cfg.top_k}]"
    fits = isinstance(found, np.ndarray) and np.issubdtype(found.dtype, np.integer)
    if not fits or not (found.shape == (cfg.num_experts,) or found.shape[1:] == (cfg.top_k,)):
        shape = f"{found.dtype}{list(found.shape)}" if isinstance(found, np.ndarray) else "an archive"
        must = f"hold integers {shapes}, and holds {shape}"
        raise ConfigError(rule("routing", path, must, "save counts of experts, or tokens' routes"))
    # Counts are how often, routes are which.
    leads_somewhere = found.any() if found.ndim == 1 else ((found >= 0) & (found < cfg.num_experts)).any()
    if not leads_somewhere:
        must = f"lead to at least one of the {cfg.num_experts} experts"
        raise ConfigError(rule("routing", path, must, "save what tokens of this model chose"))
    return found
