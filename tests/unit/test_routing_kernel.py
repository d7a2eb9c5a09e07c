"""The kernel that routes few tokens, interpreted on a CPU, against ``routing`` and ``stats``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep import balance, routing, stats
from jax_moriep.config import GROUPED_ROUTERS, ROUTER_NAMES, SCORE_BIAS_ROUTERS, MoEConfig
from jax_moriep.routing_kernel import MOST_TOKENS, routed, sums_of, unsuited

E, K, T = 60, 5, 9


def make_cfg(name, experts=E, top_k=K, **changes):
    given = {"router": name, "score_bias": name in SCORE_BIAS_ROUTERS}
    if name in GROUPED_ROUTERS:
        given |= {"num_groups": 4, "top_groups": 2}
    return MoEConfig(experts, top_k, 16, 8, **(given | changes))


def operands(cfg, num_tokens=T, seed=0, masked=False):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(num_tokens, cfg.num_experts)) * 2, jnp.float32)
    bias = jnp.asarray(rng.normal(size=cfg.num_experts) / 4, jnp.float32) if cfg.score_bias else None
    return logits, bias, jnp.asarray(rng.random(num_tokens) < 0.6) if masked else None


def both(cfg, logits, bias, mask=None):
    """(ids, weights, words) of the kernel, and of the functions that it stands for."""
    kernel = jax.jit(functools.partial(routed, cfg, interpret=True))(logits, bias, mask)
    route = routing.chosen(logits, bias, cfg)
    ids = route.ids if mask is None else jnp.where(mask[:, None], route.ids, -1)
    words = stats.as_words(*stats.counted(ids, route, mask, cfg))
    return kernel, (ids, route.weights, words)


def check(cfg, *given):
    got, want = both(cfg, *given)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], rtol=3e-7)
    np.testing.assert_array_equal(got[2][: cfg.num_experts], want[2][: cfg.num_experts])
    sums = [jax.tree.leaves(sums_of(words, cfg.num_experts)) for words in (got[2], want[2])]
    for ours, theirs in zip(*sums, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("router", ROUTER_NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_every_router(router, masked):
    cfg = make_cfg(router)
    check(cfg, *operands(cfg, masked=masked))


@pytest.mark.parametrize(
    ("experts", "top_k", "num_tokens"), [(8, 3, 1), (128, 8, 33), (200, 16, 70), (512, 1, 20)]
)
@pytest.mark.parametrize("router", ["softmax_topk", "deepseek_v3"])
def test_sizes(router, experts, top_k, num_tokens):
    cfg = make_cfg(router, experts, top_k, routed_scaling=2.5, norm_topk=False)
    check(cfg, *operands(cfg, num_tokens, masked=True))


@pytest.mark.parametrize("router", ROUTER_NAMES)
def test_ties_zeros_and_what_is_not_finite(router):
    cfg = make_cfg(router)
    logits, bias, _ = operands(cfg)
    logits = jnp.round(logits)
    logits = logits.at[1].set(0.0).at[1, ::2].set(-0.0).at[2].set(-200.0).at[2, 7].set(300.0)
    logits = logits.at[3, 40].set(jnp.inf).at[4, 11].set(-jnp.inf).at[5].set(-jnp.inf)
    bias = None if bias is None else jnp.round(bias)
    (ids, weights, _), (want_ids, want_weights, _) = both(cfg, logits, bias)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=3e-7)


@pytest.mark.parametrize("router", ROUTER_NAMES)
def test_nan(router):
    cfg = make_cfg(router)
    logits, bias, _ = operands(cfg)
    logits = logits.at[0, 33].set(jnp.nan).at[1].set(jnp.nan)
    (ids, _, _), (want, _, _) = both(cfg, logits, bias)
    # Whether one NaN comes first or last is a matter of its sign, which is the platform's.
    np.testing.assert_array_equal(ids[1:], want[1:])
    assert all(len(set(row)) == K and min(row) >= 0 and max(row) < E for row in np.asarray(ids).tolist())


@pytest.mark.parametrize("groups", [(1, 1), (4, 4), (60, 8), (12, 3)])
@pytest.mark.parametrize("router", GROUPED_ROUTERS)
def test_groups(router, groups):
    cfg = make_cfg(router, num_groups=groups[0], top_groups=groups[1])
    if groups[0] > 16:
        assert "num_groups=60" in unsuited(cfg, T)
        return
    assert unsuited(cfg, T) is None
    check(cfg, *operands(cfg))


def test_what_it_leaves_to_xla():
    def router(logits, bias, cfg):
        return routing.softmax_topk(logits, bias, cfg)

    assert "function" in unsuited(make_cfg("softmax_topk", router=router), T)
    assert "tokens" in unsuited(make_cfg("softmax_topk"), MOST_TOKENS + 1)
    assert "tokens" in unsuited(make_cfg("softmax_topk"), 0)
    assert "E=513" in unsuited(make_cfg("softmax_topk", 513), T)


def test_sums_of_what_words_hold():
    cfg = make_cfg("softmax_topk")
    logits, bias, _ = operands(cfg)
    route = routing.chosen(logits, bias, cfg)
    counts, sums = stats.counted(route.ids, route, None, cfg)
    got = sums_of(stats.as_words(counts, sums), E)
    assert isinstance(got, balance.RouterSums)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(sums), strict=True):
        np.testing.assert_array_equal(ours, theirs)
