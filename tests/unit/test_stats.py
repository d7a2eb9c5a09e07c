"""check_stats and explain: what the host is told."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jax_moriep as jm


def stats(dropped, recv=(10, 30)):
    zero = jnp.zeros(())
    return jm.MoEStats(
        expert_counts=jnp.array([20, 20]),
        recv_rows=jnp.array(recv),
        dropped=jnp.asarray(dropped),
        overflow=jnp.asarray(dropped) > 0,
        load_balance_loss=zero,
        z_loss=zero,
        router_entropy=zero,
    )


def test_nothing_dropped_is_silent():
    jm.check_stats(stats(0))


def test_the_text_has_the_numbers_and_a_factor_that_helps():
    with pytest.raises(jm.CapacityOverflow) as caught:
        jm.check_stats(stats(7))
    text = str(caught.value)
    assert "dropped=7 of 40 routes" in text
    assert "rank 1 was asked to hold 30 rows while the mean over the ranks is 20" in text
    assert "at least 1.50" in text


def test_stacked_over_layers():
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), stats(0, (20, 20)), stats(3))
    with pytest.raises(jm.CapacityOverflow, match=re.escape("rank 1 in entry 1 was asked")):
        jm.check_stats(both)


def test_explain_says_what_runs_and_why_not():
    mesh = Mesh(np.array(jax.devices()[:4]), ("ep",))
    told = jm.explain(jm.MoEConfig(8, 2, 16, 8), mesh, num_tokens=32)
    assert (told.transport, told.experts) == ("native", "blocked")
    assert told.transport_reasons["native"] is None
    assert told.transport_reasons["mori"].startswith("it needs AMD's GPUs; use transport=")
    assert told.shape.num_ranks == 4
    for part in ("transport: native", "experts: blocked", "capacity="):
        assert part in str(told)
    named = jm.explain(jm.MoEConfig(8, 2, 16, 8, transport="mori"), mesh)
    assert named.transport is None
    assert "the named one cannot run" in str(named)
