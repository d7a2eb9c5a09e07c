"""What a layer measures while it runs, and the host-side check that reads it when the caller chooses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_moriep import routing
from jax_moriep.config import MoEConfig, MoEStats
from jax_moriep.errors import CapacityOverflow
from jax_moriep.plan import ExchangeShape, kept_counts
from jax_moriep.runtime import group


def collect(
    route: routing.Route,
    token_mask: jax.Array | None,
    cfg: MoEConfig,
    shape: ExchangeShape,
    ep_axis: str,
    token_axes: tuple[str, ...],
) -> MoEStats:
    """Measures one call; inside shard_map, without a sync.

    Args:
      route: this rank's routes, masked tokens having id -1.
      token_mask: bool[T] or None.
      cfg: the layer.
      shape: sizes of the exchange.
      ep_axis: the axis of the ranks.
      token_axes: the axes over which tokens are split.

    Returns:
      The statistics, the same on every rank.
    """
    ids = route.ids.reshape(-1)
    valid = (ids >= 0) & (ids < cfg.num_experts)
    counts = jnp.bincount(jnp.where(valid, ids, cfg.num_experts), length=cfg.num_experts + 1)[:-1].astype(
        jnp.int32
    )
    sums = routing.router_sums(route, token_mask)
    other_axes = tuple(axis for axis in token_axes if axis != ep_axis)

    group_counts = lax.psum(counts, ep_axis)
    padding = shape.num_ranks * shape.num_local_experts - cfg.num_experts
    wanted = jnp.pad(group_counts, (0, padding)).reshape(shape.num_ranks, shape.num_local_experts)
    kept = jax.vmap(lambda c: kept_counts(c, shape.block, shape.capacity))(wanted)
    recv_rows = wanted.sum(1)
    dropped = jnp.sum(wanted - kept)
    if other_axes:
        group_counts = lax.psum(group_counts, other_axes)
        recv_rows = lax.pmax(recv_rows, other_axes)
        dropped = lax.psum(dropped, other_axes)
    load_balance_loss, z_loss, entropy = routing.losses(lax.psum(sums, token_axes), group_counts, cfg)
    return MoEStats(
        expert_counts=group_counts,
        recv_rows=recv_rows,
        dropped=dropped,
        overflow=dropped > 0,
        load_balance_loss=load_balance_loss,
        z_loss=z_loss,
        router_entropy=entropy,
    )


def check_stats(stats: MoEStats) -> None:
    """Waits for the statistics and raises if any route was dropped; call it as often as you can afford.

    On GPUs it also raises what went wrong in an exchange that XLA replayed, which nothing else reports.

    Args:
      stats: of one call, or stacked over layers or steps.

    Raises:
      CapacityOverflow: routes were dropped; the text has the numbers and the cure.
      TransportError: an exchange of this process has failed on a GPU.
    """
    dropped = int(np.sum(np.asarray(stats.dropped)))
    group.check_failures()
    if not dropped:
        return
    routes = int(np.sum(np.asarray(stats.expert_counts)))
    recv = np.asarray(stats.recv_rows)
    recv = recv.reshape(-1, recv.shape[-1])
    layer, rank = np.unravel_index(int(recv.argmax()), recv.shape)
    where = f"rank {rank}" if len(recv) == 1 else f"rank {rank} in entry {layer}"
    raise CapacityOverflow(
        f"dropped={dropped} of {routes} routes did not fit; {where} was asked to hold {recv.max()} rows "
        f"while the mean over the ranks is {recv[layer].mean():.0f}; raise capacity_factor to at least "
        f"{recv.max() / max(1.0, recv[layer].mean()):.2f}, use capacity_factor=None, or balance the router"
    )
