"""Routers against the blocks of transformers and against NumPy; the losses and the bias update."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import NAMES, Golden
from jax.test_util import check_grads

from jax_moriep.balance import losses, router_sums, update_score_bias
from jax_moriep.config import GROUPED_ROUTERS, ROUTER_NAMES, SCORE_BIAS_ROUTERS, MoEConfig, MoEParams
from jax_moriep.errors import ConfigError
from jax_moriep.routing import ROUTERS, Route, _best, _keep_best_groups, _sum_of_two_best, route

E, K, H, T = 12, 3, 16, 20


def make_cfg(router, **changes):
    given = {"router": router, "score_bias": router in SCORE_BIAS_ROUTERS}
    if router in GROUPED_ROUTERS:
        given |= {"num_groups": 4, "top_groups": 2}
    return MoEConfig(E, K, H, 8, **(given | changes))


def make_params(cfg, seed=0):
    rng = np.random.default_rng(seed)
    return MoEParams(
        router=jnp.asarray(rng.normal(size=(H, E)) / 2, jnp.float32),
        w1=None,
        w2=None,
        router_bias=jnp.asarray(rng.normal(size=E), jnp.float32) if cfg.router_bias else None,
        score_bias=jnp.asarray(rng.normal(size=E) / 4, jnp.float32) if cfg.score_bias else None,
    )


def tokens(*lead, dtype=jnp.float32, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*lead, H)), dtype)


def by_id(ids, *others):
    """Each token's routes in the order of their ids: a block may hand them on in any order."""
    order = np.argsort(np.asarray(ids), axis=-1)
    return [np.take_along_axis(np.asarray(a), order, axis=-1) for a in (ids, *others)]


# Goldens


def gated(h, cfg):
    gate, up = jnp.split(h, 2, axis=-1)
    if cfg.activation == "swiglu_clamped":
        gate = jnp.minimum(gate, cfg.activation_limit)
        up = jnp.clip(up, -cfg.activation_limit, cfg.activation_limit)
        return (up + 1) * gate * jax.nn.sigmoid(cfg.activation_alpha * gate)
    return jax.nn.silu(gate) * up


def dense_moe(x, params, cfg):
    """The whole block from what ``route`` says: every expert sees every token."""
    r = route(x, params, cfg)
    b1 = jnp.zeros(params.w1.shape[:2]) if params.b1 is None else params.b1
    b2 = jnp.zeros(params.w2.shape[:2]) if params.b2 is None else params.b2
    y = jnp.zeros_like(x)
    for e in range(cfg.num_experts):
        weight = jnp.where(r.ids == e, r.weights, 0).sum(axis=-1, keepdims=True)
        before, after = (weight, 1) if cfg.router == "llama4" else (1, weight)
        y += after * (gated(before * x @ params.w1[e].T + b1[e], cfg) @ params.w2[e].T + b2[e])
    if params.shared_w1 is not None:
        shared = gated(x @ params.shared_w1.T, cfg) @ params.shared_w2.T
        y += shared if params.shared_gate is None else jax.nn.sigmoid(x @ params.shared_gate) * shared
    return y


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    golden = Golden(name)
    cfg, params = golden.cfg, jax.tree.map(jnp.asarray, golden.params)
    r = route(jnp.asarray(golden["x"]), params, cfg)
    ids, weights = by_id(r.ids, r.weights)
    expected_ids, expected_weights = by_id(golden["ids"], golden["weights"])
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(weights, expected_weights, rtol=2e-6, atol=1e-9)

    def objective(x, params):
        y = dense_moe(x, params, cfg)
        return (y * golden["cotangent"]).sum(), y

    (_, y), (dx, dparams) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(
        jnp.asarray(golden["x"]), params
    )
    np.testing.assert_allclose(y, golden["y"], rtol=1e-5, atol=1e-5 * np.abs(golden["y"]).max())
    expected = {"x": golden["grad.x"], **golden.part("grad.", but="x")}
    actual = {"x": dx, **{k: v for k, v in vars(dparams).items() if hasattr(v, "shape")}}
    assert actual.keys() == expected.keys()
    for field, value in expected.items():
        np.testing.assert_allclose(
            actual[field], value, rtol=1e-4, atol=1e-5 * max(np.abs(value).max(), 1e-6), err_msg=field
        )


def test_goldens_reach_every_router_and_the_rare_branches():
    goldens = {name: Golden(name) for name in NAMES}
    assert {g.cfg.router for g in goldens.values()} == set(ROUTER_NAMES)
    # The clamp of gpt-oss bites on both halves.
    oss = goldens["gpt_oss"]
    h = np.einsum("th,eih->tei", oss["x"], oss.params.w1) + oss.params.b1
    assert (np.abs(h) > oss.cfg.activation_limit).mean() > 0.05
    # With 0.0 in place of a masked expert of DeepSeek-V3, some tokens would go elsewhere.
    for name in (
        "deepseek_v3_negative_bias",
        "deepseek_v3_one_group",
        "glm4_moe_one_group",
        "dots1_one_group",
    ):
        golden = goldens[name]
        logits = golden["x"] @ golden.params.router
        zeroed = oracle("deepseek_v3", logits, golden.params.score_bias, golden.cfg, masked=0.0)[0]
        assert (np.sort(zeroed) != np.sort(golden["ids"])).any(), name


# NumPy oracle


def oracle(name, logits, bias, cfg, masked=None):
    """Ids, weights and scores by loops in float64; ``masked`` stands for experts outside the kept groups."""
    if masked is None:
        masked = 0.0 if name == "deepseek_v2" else -np.inf
    all_ids, all_weights, all_scores = [], [], []
    for row in np.asarray(logits, np.float64):
        softmax = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        sigmoid = 1 / (1 + np.exp(-row))
        uses_sigmoid = name in ("sigmoid_topk", "deepseek_v3", "llama4")
        scores = sigmoid if uses_sigmoid else softmax
        choice = row.copy() if name in ("topk_softmax", "gpt_oss", "llama4") else scores.copy()
        if name in SCORE_BIAS_ROUTERS and bias is not None:
            choice = choice + np.asarray(bias, np.float64)
        if cfg.num_groups is not None:
            size = len(row) // cfg.num_groups
            best = []
            for g in range(cfg.num_groups):
                members = sorted(choice[g * size : (g + 1) * size], reverse=True)
                best.append(sum(members[:2]) if name == "deepseek_v3" else members[0])
            kept = sorted(range(cfg.num_groups), key=lambda g: -best[g])[: cfg.top_groups]
            for e in range(len(row)):
                if e // size not in kept:
                    choice[e] = masked
        ids = sorted(range(len(row)), key=lambda e: (-choice[e], e))[: cfg.top_k]
        if name in ("topk_softmax", "gpt_oss"):
            weights = np.exp(row[ids] - row[ids].max())
            weights /= weights.sum()
        else:
            weights = scores[ids]
            if cfg.norm_topk and name != "llama4":
                weights = weights / weights.sum()
        all_ids.append(ids)
        all_weights.append(weights * cfg.routed_scaling)
        all_scores.append(scores)
    return np.array(all_ids), np.array(all_weights), np.array(all_scores)


@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_router_equals_numpy(name, norm_topk, scaling):
    cfg = make_cfg(name, norm_topk=norm_topk, routed_scaling=scaling)
    params = make_params(cfg)
    r = route(tokens(T), params, cfg)
    ids, weights, scores = oracle(name, r.logits, params.score_bias, cfg)
    # In falling order of choice, not only the same set.
    np.testing.assert_array_equal(r.ids, ids)
    np.testing.assert_allclose(r.weights, weights, rtol=1e-5)
    np.testing.assert_allclose(r.scores, scores, rtol=1e-5)
    assert (r.ids.dtype, r.weights.dtype, r.scores.dtype) == (jnp.int32, jnp.float32, jnp.float32)


@pytest.mark.parametrize("name", ["sigmoid_topk", "deepseek_v3", "deepseek_v2", "ernie45"])
def test_router_without_bias_and_groups(name):
    cfg = MoEConfig(E, K, H, 8, router=name)
    r = route(tokens(T), make_params(cfg), cfg)
    ids, weights, _ = oracle(name, r.logits, None, cfg)
    np.testing.assert_array_equal(r.ids, ids)
    np.testing.assert_allclose(r.weights, weights, rtol=1e-5)


def test_equal_candidates_go_to_the_lower_id():
    for name in ROUTER_NAMES:
        ids, _, _ = ROUTERS[name](jnp.zeros((2, E)), None, make_cfg(name))
        np.testing.assert_array_equal(ids, [[0, 1, 2]] * 2, err_msg=name)


@pytest.mark.parametrize("name", ["topk_softmax", "gpt_oss", "llama4"])
def test_zeros_of_either_sign_are_equal_candidates(name):
    logits = jnp.asarray([[-1.0, -0.0, 0.0, -0.0, 0.0, -2.0], [0.0, -0.0, -0.0, 0.0, -0.0, -0.0]])
    cfg = MoEConfig(6, K, H, 8, router=name)
    for router in (ROUTERS[name], jax.jit(ROUTERS[name], static_argnums=2)):
        np.testing.assert_array_equal(router(logits, None, cfg)[0], [[1, 2, 3], [0, 1, 2]])


def test_groups_whose_scores_are_zeros_of_either_sign_are_equal_candidates():
    scores = jnp.asarray([[-0.0, -0.0, 0.0, 0.0, -0.0, -0.0]])
    cfg = MoEConfig(6, 2, H, 8, router="deepseek_v2", num_groups=3, top_groups=1)
    kept = _keep_best_groups(scores, lambda grouped: grouped.max(axis=-1), -jnp.inf, cfg)
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, False, False, False, False]])


@pytest.mark.parametrize("size", [1, 2, 5])
def test_groups_are_kept_as_by_sorting_them(size):
    # Few different values, so that there are ties, and infinities.
    values = np.random.default_rng(size).choice([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf], size=(500, 6, size))
    scores = jnp.asarray(values[~np.isinf(values).all(axis=(1, 2))], jnp.float32)
    best = np.sort(scores, axis=-1)[..., ::-1]
    with np.errstate(invalid="ignore"):
        wanted = best[..., 0] if size == 1 else best[..., 0] + best[..., 1]
    np.testing.assert_array_equal(_sum_of_two_best(scores), wanted)
    for count in (1, 3, 6):
        groups = jnp.nan_to_num(jnp.asarray(wanted), nan=0.0)
        # NumPy's stable sort of the negatives puts the lower index first.
        order = np.argsort(-np.asarray(groups), axis=-1, kind="stable")
        kept = np.zeros(groups.shape, bool)
        np.put_along_axis(kept, order[:, :count], True, axis=-1)
        np.testing.assert_array_equal(_best(groups, count), kept)


def test_as_many_groups_are_kept_where_some_have_no_number():
    scores = jnp.asarray([[1.0, jnp.nan, jnp.inf, jnp.nan, 2.0]])
    np.testing.assert_array_equal(_best(scores, 2), [[False, True, True, False, False]])


@pytest.mark.parametrize("top_groups", [1, 2, 3])
def test_a_negative_bias_never_leaves_the_kept_groups(top_groups):
    # As many experts as the kept groups have: the most that MoEConfig allows, so that all of them are taken.
    size = E // 4
    cfg = MoEConfig(
        E,
        top_groups * size,
        H,
        8,
        router="deepseek_v3",
        num_groups=4,
        top_groups=top_groups,
        score_bias=True,
    )
    params = MoEParams(make_params(cfg).router, None, None, score_bias=jnp.full(E, -7.0))
    r = route(tokens(64), params, cfg)
    ids, _, _ = oracle("deepseek_v3", r.logits, params.score_bias, cfg)
    np.testing.assert_array_equal(r.ids, ids)
    for row in np.asarray(r.ids):
        assert len(set(row)) == cfg.top_k
        assert len(set(row // size)) == top_groups
    with pytest.raises(ConfigError, match=rf"top_k={cfg.top_k + 1} must be at most the {cfg.top_k} experts"):
        dataclasses.replace(cfg, top_k=cfg.top_k + 1)


def test_groups_of_one_expert():
    cfg = make_cfg("deepseek_v3", num_groups=E, top_groups=K, score_bias=False)
    r = route(tokens(T), make_params(cfg), cfg)
    np.testing.assert_array_equal(r.ids, jax.lax.top_k(r.logits, K)[1])


def test_floors_of_the_sums():
    # Sigmoids of about 2.9e-20, so that the 1e-20 of DeepSeek-V3 counts.
    logits = jnp.full((1, E), -45.0)
    sigmoid = 1 / (1 + np.exp(45.0))
    _, weights, _ = ROUTERS["deepseek_v3"](logits, None, MoEConfig(E, K, H, 8, router="deepseek_v3"))
    np.testing.assert_allclose(weights, np.full((1, K), sigmoid / (K * sigmoid + 1e-20)), rtol=1e-5)
    # The bias makes ERNIE choose experts of softmax 4e-18, far below its 1e-12.
    logits = jnp.full((1, E), -40.0).at[0, 0].set(0.0)
    bias = jnp.zeros(E).at[jnp.array([3, 5, 7])].set(2.0)
    ids, weights, _ = ROUTERS["ernie45"](logits, bias, make_cfg("ernie45"))
    np.testing.assert_array_equal(ids, [[3, 5, 7]])
    np.testing.assert_allclose(weights, np.full((1, K), np.exp(-40.0) / 1e-12), rtol=1e-5)


# Derivatives


@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_weights_and_scores_against_finite_differences(name, norm_topk):
    cfg = make_cfg(name, norm_topk=norm_topk, routed_scaling=1.5)
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        logits = jnp.asarray(rng.normal(size=(4, E)))
        bias = jnp.asarray(rng.normal(size=E) / 4) if cfg.score_bias else None
        # The second order, for the derivative of the quotient that is the package's own.
        order = 2 if name == "deepseek_v3" else 1
        check_grads(jax.jit(lambda z: ROUTERS[name](z, bias, cfg)[1:]), (logits,), order=order, rtol=1e-4)


@pytest.mark.parametrize("norm_topk", [True, False])
@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_extreme_logits_give_finite_values_and_gradients(name, norm_topk):
    cfg = make_cfg(name, norm_topk=norm_topk)
    bias = jnp.linspace(-1, 1, E) if cfg.score_bias else None
    rows = [np.zeros(E), np.where(np.arange(E) % 2, 1e4, -1e4), np.where(np.arange(E) < 8, 1.0, -np.inf)]
    # Sigmoids of these are tiny, subnormal and zero: the sum that norm_topk divides by is, too.
    rows += [np.full(E, value) for value in (-45, -60, -88, -90, -95, -103, -200, 1e4)]
    logits = jnp.asarray(np.stack(rows), jnp.float32)

    def objective(logits):
        ids, weights, scores = ROUTERS[name](logits, bias, cfg)
        sums = router_sums(Route(ids, weights, scores, logits))
        counts = jnp.zeros(E, jnp.int32).at[ids].add(1)
        return (weights**2).sum() + sum(losses(sums, counts, cfg)), (weights, scores)

    (value, outs), grad = jax.jit(jax.value_and_grad(objective, has_aux=True))(logits)
    for array in (value, *outs, grad):
        assert np.isfinite(array).all()


def test_score_bias_has_no_gradient_but_chooses():
    def biased(logits, bias, cfg):
        # Uses the bias in the weights, where a gradient could leak.
        ids = jax.lax.top_k(logits + bias, cfg.top_k)[1]
        return ids, jnp.take_along_axis(jax.nn.sigmoid(logits + bias), ids, axis=-1), jax.nn.sigmoid(logits)

    for router in (*SCORE_BIAS_ROUTERS, biased):
        cfg = make_cfg(router, score_bias=True)
        params = make_params(cfg)
        grad = jax.grad(lambda p, cfg=cfg: route(tokens(T), p, cfg).weights.sum())(params)
        np.testing.assert_array_equal(grad.score_bias, np.zeros(E))
        assert np.abs(grad.router).max() > 0 or cfg.norm_topk
        one_best = MoEParams(params.router, None, None, score_bias=jnp.zeros(E).at[7].set(9.0))
        assert (route(tokens(T), one_best, cfg).ids == 7).any(axis=-1).all()


# route


def test_leading_dimensions_are_kept():
    cfg = make_cfg("softmax_topk")
    params = make_params(cfg)
    x = tokens(2, 5)
    nested, flat = route(x, params, cfg), route(x.reshape(10, H), params, cfg)
    assert nested.ids.shape == nested.weights.shape == (2, 5, K)
    assert nested.scores.shape == nested.logits.shape == (2, 5, E)
    for a, b in zip(jax.tree.leaves(nested), jax.tree.leaves(flat), strict=True):
        np.testing.assert_array_equal(a.reshape(b.shape), b)
    assert route(x[0, 0], params, cfg).ids.shape == (K,)


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_no_tokens(name):
    cfg = make_cfg(name)
    r = jax.jit(lambda p: route(jnp.zeros((0, H)), p, cfg))(make_params(cfg))
    assert r.ids.shape == (0, K)


def test_bfloat16_is_routed_in_float32():
    cfg = make_cfg("deepseek_v3")
    params = make_params(cfg)
    low = MoEParams(params.router.astype(jnp.bfloat16), None, None, score_bias=params.score_bias)
    high = MoEParams(low.router.astype(jnp.float32), None, None, score_bias=params.score_bias)
    x = tokens(T, dtype=jnp.bfloat16)
    r = route(x, low, cfg)
    for a, b in zip(
        jax.tree.leaves(r), jax.tree.leaves(route(x.astype(jnp.float32), high, cfg)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert r.weights.dtype == r.logits.dtype == jnp.float32
    dx, dp = jax.grad(lambda x, p: (route(x, p, cfg).weights ** 2).sum(), argnums=(0, 1))(x, low)
    assert (dx.dtype, dp.router.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_logits_are_a_product_of_full_precision():
    # On a CPU every f32 product is; a GPU would take tf32 unless told.
    cfg = make_cfg("softmax_topk")
    jaxpr = str(jax.make_jaxpr(lambda x, p: route(x, p, cfg).ids)(tokens(T), make_params(cfg)))
    assert "Precision.HIGHEST" in jaxpr


def test_router_bias_is_added_to_the_logits():
    cfg = make_cfg("gpt_oss", router_bias=True)
    params = make_params(cfg)
    x = tokens(T)
    expected = np.asarray(x, np.float64) @ np.asarray(params.router, np.float64) + params.router_bias
    np.testing.assert_allclose(route(x, params, cfg).logits, expected, rtol=1e-5, atol=1e-5)


def test_padded_parameters_are_cut_to_the_real_experts():
    cfg = make_cfg("deepseek_v3", router_bias=True)
    params = make_params(cfg)
    padded = MoEParams(
        jnp.pad(params.router, ((0, 0), (0, 4)), constant_values=9.0),
        None,
        None,
        router_bias=jnp.pad(params.router_bias, (0, 4), constant_values=99.0),
        score_bias=jnp.pad(params.score_bias, (0, 4), constant_values=99.0),
    )
    for a, b in zip(
        jax.tree.leaves(route(tokens(T), padded, cfg)),
        jax.tree.leaves(route(tokens(T), params, cfg)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_callable_router():
    seen = []

    def mine(logits, bias, cfg):
        seen.append((logits.shape, logits.dtype, bias))
        scores = jax.nn.softmax(logits)
        weights, ids = jax.lax.top_k(scores, cfg.top_k)
        return ids, (weights / weights.sum(-1, keepdims=True)).astype(jnp.bfloat16), scores

    cfg = make_cfg(mine)
    params = make_params(cfg)
    x = tokens(2, 5, dtype=jnp.bfloat16)
    r = jax.jit(lambda x, p: route(x, p, cfg))(x, params)
    assert seen == [((10, E), jnp.float32, None)]
    named = route(x, params, make_cfg("softmax_topk"))
    np.testing.assert_array_equal(r.ids, named.ids)
    np.testing.assert_allclose(r.weights, named.weights, rtol=1e-2)
    assert r.weights.dtype == jnp.float32


@pytest.mark.parametrize("wrong", ["ids", "weights", "scores"])
def test_callable_router_of_wrong_shape(wrong):
    def mine(logits, bias, cfg):
        good = dict(
            zip(("ids", "weights", "scores"), ROUTERS["softmax_topk"](logits, bias, cfg), strict=True)
        )
        good[wrong] = good[wrong][:, :-1]
        return tuple(good.values())

    cfg = make_cfg(mine)
    with pytest.raises(ConfigError, match=rf"{wrong}\.shape=\(20, \d+\) must be \(20, \d+\)"):
        route(tokens(T), make_params(cfg), cfg)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda ids, weights, scores: (ids + 0.7, weights, scores),
            "ids.dtype='float32' must be of kind",
        ),
        (lambda ids, weights, scores: (ids, ids, scores), "weights.dtype='int32' must be of kind floating"),
        (lambda ids, weights, scores: (ids, weights), r"'tuple' must be \(ids, weights, scores\)"),
        (lambda ids, weights, scores: ids, r"must be \(ids, weights, scores\)"),
    ],
)
def test_callable_router_of_wrong_kind(change, text):
    def mine(logits, bias, cfg):
        return change(*ROUTERS["softmax_topk"](logits, bias, cfg))

    cfg = make_cfg(mine)
    with pytest.raises(ConfigError, match=text):
        route(tokens(T), make_params(cfg), cfg)


@pytest.mark.parametrize(
    ("x", "changes", "text"),
    [
        (jnp.zeros((T, H), jnp.int32), {}, r"x\.dtype='int32' must be floating"),
        (jnp.zeros((T, H + 1)), {}, r"x\.shape=\(20, 17\) must end with hidden_size=16"),
        (jnp.zeros((T, H)), {"router": jnp.zeros((H, E - 1))}, r"params\.router\.shape=\(16, 11\)"),
        (jnp.zeros((T, H)), {"router": jnp.zeros((E, H))}, r"params\.router\.shape=\(12, 16\)"),
        (jnp.zeros((T, H)), {"router": None}, r"params\.router=None must have shape \(16, 12\)"),
        (jnp.zeros((T, H)), {"score_bias": None}, r"params\.score_bias=None must have shape \(12,\)"),
        (jnp.zeros((T, H)), {"router_bias": jnp.zeros(E)}, r"params\.router_bias is given but cfg"),
        ([[0.0] * H], {}, r"x='list' must be an array; pass route\(x, params, cfg\)"),
        (None, {}, r"x='NoneType' must be an array"),
    ],
)
def test_bad_input(x, changes, text):
    cfg = make_cfg("deepseek_v3")
    with pytest.raises(ConfigError, match=text):
        route(x, MoEParams(**(vars(make_params(cfg)) | changes)), cfg)


def test_arguments_in_another_order():
    cfg = make_cfg("softmax_topk")
    x, params = tokens(T), make_params(cfg)
    for args, text in (
        ((params, x, cfg), "x='MoEParams' must be an array"),
        ((x, cfg, params), "params='MoEConfig' must be a jm.MoEParams"),
        ((x, params, params), "cfg='MoEParams' must be a jm.MoEConfig"),
    ):
        with pytest.raises(ConfigError, match=text) as raised:
            route(*args)
        assert len(str(raised.value)) < 200


# Losses


def losses_oracle(scores, logits, ids, mask, num_experts, top_k):
    scores, logits = np.asarray(scores, np.float64), np.asarray(logits, np.float64)
    balance_scores, counts = np.zeros(num_experts), np.zeros(num_experts)
    z = entropy = tokens = 0.0
    for t in range(len(scores)):
        if not mask[t]:
            continue
        tokens += 1
        share = scores[t] / scores[t].sum()
        balance_scores += share
        z += np.log(np.exp(logits[t]).sum()) ** 2
        entropy -= (share * np.log(share)).sum()
        for e in ids[t]:
            counts[e] += 1
    if tokens == 0:
        return (0.0, 0.0, 0.0), counts
    balance = num_experts * ((counts / (tokens * top_k)) * (balance_scores / tokens)).sum()
    return (balance, z / tokens, entropy / tokens), counts


@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_losses_equal_numpy(name, masked):
    cfg = make_cfg(name)
    r = route(tokens(T), make_params(cfg), cfg)
    mask = {"none": np.ones(T), "some": np.arange(T) % 3 > 0, "all": np.zeros(T)}[masked].astype(bool)
    expected, counts = losses_oracle(r.scores, r.logits, np.asarray(r.ids), mask, E, K)
    # What is masked may be anything.
    r = Route(
        r.ids,
        r.weights,
        jnp.where(mask[:, None], r.scores, jnp.nan),
        jnp.where(mask[:, None], r.logits, jnp.nan),
    )
    sums = router_sums(r, None if masked == "none" else jnp.asarray(mask))
    assert float(sums.tokens) == mask.sum()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(sums))
    np.testing.assert_allclose(losses(sums, jnp.asarray(counts, jnp.int32), cfg), expected, rtol=1e-5)

    def total(r):
        return sum(losses(router_sums(r, jnp.asarray(mask)), jnp.asarray(counts, jnp.int32), cfg))

    grads = jax.grad(total, allow_int=True)(r)
    for grad in (grads.scores, grads.logits):
        assert np.isfinite(grad).all()
        np.testing.assert_array_equal(np.asarray(grad)[~mask], 0)


def test_losses_of_no_tokens_are_zero_with_zero_gradients():
    cfg = make_cfg("softmax_topk")

    def total(p):
        return sum(losses(router_sums(route(jnp.zeros((0, H)), p, cfg)), jnp.zeros(E, jnp.int32), cfg))

    value, grad = jax.value_and_grad(total)(make_params(cfg))
    assert value == 0
    np.testing.assert_array_equal(grad.router, np.zeros((H, E)))


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_loss_gradients_against_finite_differences(name):
    cfg = make_cfg(name)
    rng = np.random.default_rng(4)
    counts = jnp.asarray(rng.integers(0, 9, size=E), jnp.int32)

    def all_losses(logits):
        ids, weights, scores = ROUTERS[name](logits, None, cfg)
        return losses(router_sums(Route(ids, weights, scores, logits)), counts, cfg)

    with jax.enable_x64(True):
        # losses keeps f32 for the counts and the number of tokens only; both are exact here.
        check_grads(jax.jit(all_losses), (jnp.asarray(rng.normal(size=(4, E))),), order=1, rtol=1e-4)


def test_sums_add_up_over_parts_of_the_batch():
    cfg = make_cfg("ernie45")
    params = make_params(cfg)
    x, mask = tokens(T), jnp.arange(T) % 4 > 0
    whole = router_sums(route(x, params, cfg), mask)
    parts = [router_sums(route(x[p], params, cfg), mask[p]) for p in (slice(0, 7), slice(7, T))]
    added = jax.tree.map(jnp.add, *parts)
    for a, b in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_load_balance_loss_is_one_when_balanced_and_num_experts_when_collapsed():
    def balance(ids, top_k):
        cfg = MoEConfig(E, top_k, H, 8)
        scores = np.zeros((len(ids), E), np.float32)
        np.put_along_axis(scores, ids, 0.7, axis=-1)  # not normalised: router_sums does that
        r = Route(jnp.asarray(ids), jnp.ones(ids.shape), jnp.asarray(scores), jnp.zeros(scores.shape))
        return float(losses(router_sums(r), jnp.bincount(ids.reshape(-1), length=E), cfg)[0])

    for top_k in (1, 2, 4):
        spread = (np.arange(E)[:, None] + np.arange(top_k)) % E
        assert balance(spread, top_k) == pytest.approx(1.0, rel=1e-6)
    assert balance(np.zeros((E, 1), np.int64), 1) == pytest.approx(E, rel=1e-6)


# Bias update


def test_bias_of_busy_experts_falls():
    bias = jnp.asarray([0.5, -0.5, 0.0, 0.25])
    new = update_score_bias(bias, jnp.asarray([10, 2, 5, 3], jnp.int32), 0.01)
    np.testing.assert_allclose(new, [0.49, -0.49, 0.0, 0.26], rtol=1e-6)


def test_padding_of_the_bias_stays():
    new = update_score_bias(jnp.full(6, 0.5), jnp.asarray([4, 0, 0, 0], jnp.int32), 0.1)
    np.testing.assert_allclose(new, [0.4, 0.6, 0.6, 0.6, 0.5, 0.5], rtol=1e-6)
    with pytest.raises(ConfigError, match=r"score_bias\.shape=\(2,\) must hold 4 experts"):
        update_score_bias(jnp.zeros(2), jnp.zeros(4, jnp.int32), 0.1)


@pytest.mark.parametrize("name", SCORE_BIAS_ROUTERS)
def test_repeated_updates_balance_a_skewed_router(name):
    cfg = MoEConfig(E, K, H, 8, router=name, score_bias=True)
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(256, E)) + np.linspace(-2, 2, E), jnp.float32)
    rate = 0.002 if name == "ernie45" else 0.02

    def step(bias, _):
        counts = jnp.bincount(ROUTERS[name](logits, bias, cfg)[0].reshape(-1), length=E)
        return update_score_bias(bias, counts, rate), counts.max()

    busiest = jax.lax.scan(step, jnp.zeros(E), None, length=100)[1]
    mean = 256 * K / E
    assert busiest[0] > 2 * mean
    assert busiest[-1] < 1.25 * mean
