"""What a layer measures while it runs, and the host-side check that reads it when the caller chooses."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_moriep import balance, routing
from jax_moriep.config import MoEConfig, MoEStats, check_type
from jax_moriep.errors import CapacityOverflow
from jax_moriep.plan import ExchangeShape, kept_counts
from jax_moriep.runtime import compat, group


def counted(
    ids: jax.Array, route: routing.Route, token_mask: jax.Array | None, cfg: MoEConfig
) -> tuple[jax.Array, balance.RouterSums]:
    """Measures this rank's tokens.

    Args:
      ids: i32[T, K], those of the route, -1 where a token is masked.
      route: this rank's routes.
      token_mask: bool[T] or None.
      cfg: the layer.

    Returns:
      i32[E], the routes to each expert; and what the losses need, as sums over the tokens.
    """
    ids = ids.reshape(-1)
    valid = (ids >= 0) & (ids < cfg.num_experts)
    counts = jnp.bincount(jnp.where(valid, ids, cfg.num_experts), length=cfg.num_experts + 1)[:-1]
    return counts.astype(jnp.int32), balance.router_sums(route, token_mask)


def as_words(counts: jax.Array, sums: balance.RouterSums) -> jax.Array:
    """One rank's measurements as the i32[W] words that its dispatch carries to every rank."""
    # XLA for GPUs puts sums into what concatenates them, where one thread adds up a number for each token.
    sums = lax.optimization_barrier(sums)
    return jnp.concatenate([counts, lax.bitcast_convert_type(_flat(sums), jnp.int32)])


def collected(
    all_words: jax.Array,
    sums: balance.RouterSums,
    cfg: MoEConfig,
    shape: ExchangeShape,
    ep_axis: str,
    token_axes: tuple[str, ...],
) -> MoEStats:
    """The statistics of a call, from what dispatch brought from all ranks; inside shard_map, without a sync.

    No collective runs along the axis of the ranks: one that waited for a missing rank beside the exchange
    would keep the exchange's error from being reported. Other axes over which tokens are split take a psum.

    Args:
      all_words: i32[R, W], the ``as_words`` of every rank.
      sums: this rank's own, through which the gradients of the losses flow.
      cfg: the layer.
      shape: sizes of the exchange.
      ep_axis: the axis of the ranks.
      token_axes: the axes over which tokens are split.

    Returns:
      The statistics, the same on every rank.
    """
    all_counts, all_sums = all_words[:, : cfg.num_experts], all_words[:, cfg.num_experts :]
    group_counts = all_counts.sum(0, dtype=jnp.int32)
    total = _unflat(_total(ep_axis, _flat(sums), lax.bitcast_convert_type(all_sums, jnp.float32)), sums)

    padding = shape.num_ranks * shape.num_local_experts - cfg.num_experts
    wanted = jnp.pad(group_counts, (0, padding)).reshape(shape.num_ranks, shape.num_local_experts)
    kept = jax.vmap(lambda c: kept_counts(c, shape.block, shape.capacity))(wanted)
    recv_rows = wanted.sum(1, dtype=jnp.int32)
    dropped = jnp.sum(wanted - kept, dtype=jnp.int32)
    other_axes = tuple(axis for axis in token_axes if axis != ep_axis)
    if other_axes:
        group_counts = lax.psum(group_counts, other_axes)
        recv_rows = lax.pmax(recv_rows, other_axes)
        dropped = lax.psum(dropped, other_axes)
        total = lax.psum(total, other_axes)
    load_balance_loss, z_loss, entropy = balance.losses(total, group_counts, cfg)
    return MoEStats(
        expert_counts=group_counts,
        recv_rows=recv_rows,
        dropped=dropped,
        overflow=dropped > 0,
        load_balance_loss=load_balance_loss,
        z_loss=z_loss,
        router_entropy=entropy,
    )


def _flat(sums: balance.RouterSums) -> jax.Array:
    """All of a rank's sums in one f32 array, in the order of their tree."""
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(sums)])


def _unflat(flat: jax.Array, like: balance.RouterSums) -> balance.RouterSums:
    leaves, tree = jax.tree.flatten(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = jnp.split(flat, ends[:-1].tolist())
    return jax.tree.unflatten(
        tree, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(ep_axis: str, own: jax.Array, of_all: jax.Array) -> jax.Array:
    """The sum over the ranks, f32[R, S] -> f32[S]; its gradient in ``own`` f32[S] is that of a psum."""
    del ep_axis, own
    return of_all.sum(0)


def _total_fwd(ep_axis: str, own: jax.Array, of_all: jax.Array) -> tuple[jax.Array, None]:
    return _total(ep_axis, own, of_all), None


def _total_bwd(ep_axis: str, residuals: None, cotangent: jax.Array) -> tuple[jax.Array, None]:
    del residuals
    return compat.pcast_varying(cotangent, frozenset({ep_axis})), None


_total.defvjp(_total_fwd, _total_bwd)


def check_stats(stats: MoEStats) -> None:
    """Waits for the statistics and raises if any route was dropped; call it as often as you can afford.

    On GPUs it also raises what went wrong in an exchange that XLA replayed, which nothing else reports.

    Args:
      stats: of one call, or stacked over layers or steps.

    Raises:
      CapacityOverflow: routes were dropped; the text has the numbers and the cure.
      ConfigError: ``stats`` is no MoEStats.
      TransportError: an exchange of this process has failed on a GPU.
    """
    check_type("stats", stats, MoEStats, "pass the second result of ep_moe")
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
