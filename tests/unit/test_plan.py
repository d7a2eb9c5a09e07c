"""Sizes and offsets against brute force."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import jax_moriep as jm
from jax_moriep import plan


def aligned_end(counts, block):
    """Rows that the runs of these counts take, laid out one after the other."""
    end = 0
    for count in counts:
        end += -(-count // block) * block
    return end


@pytest.mark.parametrize("block", [1, 4, 8])
@pytest.mark.parametrize(
    ("num_ranks", "num_tokens", "top_k", "num_experts"), [(2, 2, 2, 4), (3, 1, 2, 7), (1, 3, 1, 3)]
)
def test_exact_capacity_holds_every_routing_and_no_more_than_needed(
    block, num_ranks, num_tokens, top_k, num_experts
):
    cfg = jm.MoEConfig(num_experts, top_k, 8, 8, block=block)
    shape = plan.ExchangeShape.of(cfg, num_ranks, num_tokens)
    rows = num_ranks * num_tokens * min(top_k, shape.num_local_experts)
    per_expert = range(num_ranks * num_tokens + 1)
    worst = max(
        aligned_end(counts, block)
        for counts in itertools.product(per_expert, repeat=shape.num_local_experts)
        if sum(counts) <= rows
    )
    assert worst <= shape.capacity < worst + block * shape.num_local_experts
    assert shape.capacity % block == 0


def test_capacity_factor_reserves_balanced_rows_whatever_the_alignment():
    cfg = jm.MoEConfig(8, 2, 8, 8, capacity_factor=1.0, block=16)
    shape = plan.ExchangeShape.of(cfg, 4, 64)
    for counts in ([64, 64], [1, 127], [128, 0], [65, 63]):
        kept = plan.kept_counts(jnp.array(counts), 16, shape.capacity)
        np.testing.assert_array_equal(kept, counts)
    exact = plan.ExchangeShape.of(jm.MoEConfig(8, 2, 8, 8, block=16), 4, 64)
    generous = plan.ExchangeShape.of(jm.MoEConfig(8, 2, 8, 8, block=16, capacity_factor=100.0), 4, 64)
    assert generous.capacity == exact.capacity
    endless = plan.ExchangeShape.of(jm.MoEConfig(8, 2, 8, 8, block=16, capacity_factor=1e308), 4, 64)
    assert endless.capacity == exact.capacity


def test_there_is_always_a_block():
    shape = plan.ExchangeShape.of(jm.MoEConfig(8, 2, 8, 8), 4, 0)
    assert shape.capacity == shape.block > 0


@pytest.mark.parametrize("seed", range(5))
def test_starts_and_kept_rows(seed):
    rng = np.random.default_rng(seed)
    counts, block = rng.integers(0, 20, size=6), int(rng.integers(1, 9))
    capacity = int(rng.integers(1, 90))
    starts, kept, row = [], [], 0
    for count in counts:
        starts.append(row)
        kept.append(sum(1 for i in range(row, row + count) if i < capacity))
        row = aligned_end([row + count], block)
    np.testing.assert_array_equal(plan.run_starts(jnp.array(counts), block), starts)
    np.testing.assert_array_equal(plan.kept_counts(jnp.array(counts), block, capacity), kept)


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "local", "want"),
    [(1024, 4, 8, 128), (0, 2, 4, 8), (64, 2, 4, 8), (256, 2, 4, 32), (4096, 8, 32, 128)],
)
def test_block_is_a_quarter_of_the_mean_run(num_tokens, top_k, local, want):
    assert plan.default_block(num_tokens, top_k, local) == want


def test_experts_are_split_evenly_and_the_last_rank_may_lack_some():
    assert [plan.experts_per_rank(10, r) for r in (1, 2, 3, 4, 8, 16)] == [10, 5, 4, 3, 2, 1]
