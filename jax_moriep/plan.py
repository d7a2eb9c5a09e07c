"""Sizes, offsets and capacity of an exchange: pure functions of static numbers and of counts.

Nothing here knows a transport or native code; the C++ header ``moriep/plan.h`` states the same rules, and
``tests/unit/test_plan.py`` holds both against an independent oracle.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.config import MoEConfig

MAX_BLOCK = 128
MIN_BLOCK = 8

# A route in a plan is a row of this rank, or one of these.
NOT_HERE = -1
DROPPED = -2


def experts_per_rank(num_experts: int, num_ranks: int) -> int:
    """L = ceil(E / R); the last ranks may hold experts that nobody routes to, or none."""
    return -(-num_experts // num_ranks)


def default_block(num_tokens: int, top_k: int, num_local_experts: int) -> int:
    """Rows per block when the config does not say: a power of two, about a quarter of an expert's mean run.

    A run is padded by half a block on average, so a quarter bounds the padding near one eighth, and 128
    rows are enough for a matrix unit to be busy.
    """
    mean_run = max(1, num_tokens * top_k // num_local_experts)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(0, (mean_run // 4).bit_length() - 1)))


@dataclasses.dataclass(frozen=True)
class ExchangeShape:
    """The static sizes of one exchange; equal on all ranks of a group.

    Attributes:
      num_ranks: R.
      num_tokens: T, per rank.
      top_k: K.
      hidden_size: H.
      num_experts: E, as routed; ids at or above it are dropped.
      num_local_experts: L.
      block: rows per block.
      capacity: C, rows on one rank, a multiple of ``block``.
    """

    num_ranks: int
    num_tokens: int
    top_k: int
    hidden_size: int
    num_experts: int
    num_local_experts: int
    block: int
    capacity: int

    @classmethod
    def of(cls, cfg: MoEConfig, num_ranks: int, num_tokens: int) -> ExchangeShape:
        """Sizes of an exchange of ``num_tokens`` tokens per rank over ``num_ranks`` ranks."""
        num_local = experts_per_rank(cfg.num_experts, num_ranks)
        block = cfg.block or default_block(num_tokens, cfg.top_k, num_local)
        return cls(
            num_ranks=num_ranks,
            num_tokens=num_tokens,
            top_k=cfg.top_k,
            hidden_size=cfg.hidden_size,
            num_experts=cfg.num_experts,
            num_local_experts=num_local,
            block=block,
            capacity=capacity(cfg, num_ranks, num_tokens, num_local, block),
        )


def capacity(cfg: MoEConfig, num_ranks: int, num_tokens: int, num_local_experts: int, block: int) -> int:
    """C: the rows asked for by ``capacity_factor``, plus what aligning each expert's run can add.

    At most ``min(L, rows)`` runs are non-empty and each is padded by at most ``block - 1`` rows, so with
    ``capacity_factor=None`` nothing can overflow. At least one block, so that no buffer is empty.
    """
    rows = num_ranks * num_tokens * min(cfg.top_k, num_local_experts)
    if cfg.capacity_factor is not None and (some := cfg.capacity_factor * num_tokens * cfg.top_k) < rows:
        rows = math.ceil(some)  # there, where a large factor makes no infinite number of it
    padded = rows + min(num_local_experts, rows) * (block - 1)
    return max(block, padded // block * block)


def run_starts(counts: jax.Array, block: int) -> jax.Array:
    """First row of each expert's run: the exclusive prefix sum of the aligned counts.

    Args:
      counts: i32[L], rows wanted by each local expert.
      block: rows per block.

    Returns:
      i32[L].
    """
    aligned = (counts + block - 1) // block * block
    return jnp.cumsum(aligned) - aligned


def kept_counts(counts: jax.Array, block: int, capacity: int) -> jax.Array:
    """Rows of each run that lie below the capacity; the others are dropped.

    Args:
      counts: i32[L], rows wanted by each local expert.
      block: rows per block.
      capacity: C.

    Returns:
      i32[L].
    """
    return jnp.clip(capacity - run_starts(counts, block), 0, counts)


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a transport says when it has opened itself for an exchange; equal on all ranks.

    Attributes:
      group: name of the table that maps devices to groups and ranks; empty on the transports that need none.
      attributes: of its custom calls, (name, int or str) each.
      quantises: dispatch takes tokens as they are and itself sends them as float8, as ``quant`` defines it;
        otherwise an fp8 wire is ``quant``'s bytes, which are packed before it and unpacked after.
    """

    group: str = ""
    attributes: tuple[tuple[str, int | str], ...] = ()
    quantises: bool = False


@dataclasses.dataclass(frozen=True)
class Link:
    """The static side of an exchange: its sizes and who takes part. Equal on all ranks; holds no rank.

    Attributes:
      shape: the sizes.
      transport: name of the transport that runs it.
      ep_axis: mesh axis whose devices are the ranks of a group.
      platform: of the mesh's devices; None for a mesh without devices, on which programs are only lowered.
      architecture: of the devices, see ``runtime.place.Place``.
      opened: what the transport needs of itself.
    """

    shape: ExchangeShape
    transport: str
    ep_axis: str
    platform: str | None
    architecture: str = ""
    opened: Opened = Opened()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What dispatch decided and combine needs: arrays of one rank, no pointers, no host state."""

    ids: jax.Array
    """i32[T, K]: this rank's own expert ids, as given; they say where this rank's tokens went."""
    own: Any
    """The transport's own pytree of arrays."""
    link: Link = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dispatched:
    """What experts see after dispatch, on one rank."""

    rows: jax.Array
    """[C, H], sorted by local expert, then source rank, then source token; padding rows are zero."""
    row_weights: jax.Array
    """f32[C], the router weight of each row; 0 on padding."""
    group_sizes: jax.Array
    """i32[L], rows of each local expert, padding not counted."""
    plan: Plan
    """What combine needs."""
    block: int = dataclasses.field(metadata={"static": True})
    """Every expert's run starts at a multiple of it."""
