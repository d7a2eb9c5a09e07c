"""The product of the routers: what it is made of on NVIDIA's GPUs, on a CPU, against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jax_moriep.config import MoEConfig, MoEParams
from jax_moriep.router_product import in_f32, in_parts, parts, product
from jax_moriep.routing import route

LOW, F32 = jnp.bfloat16, jnp.float32
TINY = 2.0**-133
"""bf16's least positive value."""
TERM = {F32: 2.0**-20, LOW: 2.0**-15}
"""What a term may be off by in a product for a result of that dtype: a sum's order in f32, or two parts."""


def drawn(shape, dtype, kind="normal", seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    if kind == "wide":
        values *= 2.0 ** rng.integers(-40, 40, size=shape)
    return jnp.asarray(values, dtype)


def wide(x):
    return np.asarray(x).astype(np.float64)


@pytest.mark.parametrize("kind", ["normal", "wide"])
@pytest.mark.parametrize(
    ("a", "b", "summed", "dtype"),
    [
        ((33, 70, LOW), (70, 12, LOW), (1, 0), F32),
        ((33, 70, LOW), (70, 12, F32), (1, 0), F32),
        ((33, 12, F32), (70, 12, LOW), (1, 1), LOW),
        ((33, 12, F32), (70, 12, F32), (1, 1), LOW),
        ((33, 12, F32), (70, 12, F32), (1, 1), F32),
        ((33, 12, F32), (70, 12, LOW), (1, 1), F32),
        ((330, 70, LOW), (330, 12, F32), (0, 0), LOW),
        ((330, 70, LOW), (330, 12, F32), (0, 0), F32),
        ((330, 12, F32), (330, 70, LOW), (0, 0), F32),
    ],
)
def test_products_of_parts_are_near(kind, a, b, summed, dtype):
    a, b = (drawn(x[:2], x[2], kind, seed) for seed, x in enumerate((a, b)))
    found = in_parts(a, b, summed=summed, dtype=dtype)
    left, right = (wide(x) if dim else wide(x).T for x, dim in zip((a, b), summed, strict=True))
    exact, terms = left @ right.T, np.abs(left) @ np.abs(right).T
    rounding = np.abs(exact) * (2.0**-8 if dtype == LOW else 0)
    assert found.dtype == dtype
    assert (np.abs(wide(found) - exact) <= terms * TERM[dtype] + rounding).all()


def test_sums_that_cancel_keep_what_is_left():
    # 1 - 1 and the last bits of an f32 value: what one bf16 part would lose.
    x = jnp.ones((1, 3), LOW)
    weights = jnp.asarray([[1.0 + 2.0**-23], [-1.0], [2.0**-20]], F32)
    np.testing.assert_array_equal(in_parts(x, weights, summed=(1, 0), dtype=F32), 2.0**-23 + 2.0**-20)


def test_three_parts_are_an_f32_value():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=5000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    largest = np.finfo(np.float32).max
    values = np.concatenate([values[np.isfinite(values)], [0.0, -0.0, largest, -largest]]).astype(np.float32)
    # A CPU of XLA's takes subnormal numbers as zeros.
    values = values[(np.abs(values) > 2.0**-100) | (values == 0)]
    three = parts(jnp.asarray(values), 3)
    assert all(part.dtype == LOW and np.isfinite(wide(part)).all() for part in three)
    np.testing.assert_array_equal(sum(wide(part) for part in three), values.astype(np.float64))
    two = sum(wide(part) for part in three[:2])
    assert (np.abs(two - values) <= 2.0**-16 * np.abs(values.astype(np.float64))).all()


def test_small_values_lose_no_more_than_the_least():
    values = jnp.asarray([3e-39, -1e-42, 2.0**-126, 1.1e-37], F32)
    total = sum(wide(part) for part in parts(values, 3))
    # With what XLA's CPUs take as zeros.
    assert (np.abs(total - wide(values)) <= max(TINY, 2.0**-126)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", [LOW, F32])
def test_what_is_not_finite_gives_what_it_gives_in_f32(value, dtype):
    x, weights = drawn((5, 7), LOW), drawn((7, 4), dtype, seed=1)
    for a, b in ((x.at[2, 3].set(value), weights), (x, weights.at[3, 1].set(value))):
        found, wanted = (f(a, b, summed=(1, 0), dtype=F32) for f in (in_parts, in_f32))
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(np.isfinite(found), finite)
        np.testing.assert_array_equal(np.asarray(found)[~finite], np.asarray(wanted)[~finite])


def test_the_largest_values_are_no_infinity():
    largest = jnp.full((3, 1), np.finfo(np.float32).max, F32)
    found = in_parts(jnp.asarray([[1, 0, 0]], LOW), largest, summed=(1, 0), dtype=F32)
    np.testing.assert_array_equal(found, largest[:1])


@pytest.mark.parametrize("dtype", [LOW, F32])
def test_derivatives_are_those_of_a_product(dtype):
    x, weights = drawn((5, 7), LOW), drawn((7, 4), dtype, seed=1)

    def plain(x, weights):
        return jnp.dot(x.astype(F32), weights.astype(F32), precision="highest")

    def of(f):
        def energy(x, weights):
            return (f(x, weights) ** 3).sum()

        return (
            jax.grad(energy, (0, 1))(x, weights),
            jax.jvp(f, (x, weights), (2 * x, weights))[1],
            jax.jit(jax.hessian(energy, 1))(x, weights),
        )

    found, wanted = of(product), of(plain)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(wide(a), wide(b), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("x_dim", "w_dim", "out_dim"), [(0, None, 0), (1, None, 1), (None, 1, 2), (0, 1, 0)])
def test_batches(x_dim, w_dim, out_dim):
    x = drawn((5, 7) if x_dim is None else np.insert((5, 7), x_dim, 3), LOW)
    weights = drawn((7, 4) if w_dim is None else np.insert((7, 4), w_dim, 3), F32, seed=1)
    found = jax.vmap(product, (x_dim, w_dim), out_dim)(x, weights)
    for i in range(3):
        one = product(
            x if x_dim is None else jnp.take(x, i, x_dim),
            weights if w_dim is None else jnp.take(weights, i, w_dim),
        )
        np.testing.assert_allclose(jnp.take(found, i, out_dim), one, rtol=1e-5, atol=1e-5)


def test_leading_dimensions():
    x, weights = drawn((2, 3, 7), LOW), drawn((7, 4), LOW, seed=1)
    np.testing.assert_array_equal(product(x, weights)[1], product(x[1], weights))
    np.testing.assert_array_equal(product(x[0, 0], weights), product(x[:1, 0], weights)[0])


def test_shards_get_the_sum_of_their_gradients():
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
    x, weights = drawn((6, 7), LOW), drawn((7, 4), F32, seed=1)
    spec = PartitionSpec("ep")
    sharded = jax.shard_map(product, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)

    def of(f):
        return jax.jit(jax.grad(lambda w: (f(x, w) ** 2).sum()))(weights)

    np.testing.assert_allclose(of(sharded), of(product), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "cpu"])
def test_only_nvidias_gpus_multiply_bf16(platform):
    def loss(x, weights):
        return (product(x, weights) ** 2).sum()

    x, weights = drawn((64, 128), LOW), drawn((128, 16), LOW)
    text = jax.jit(jax.grad(loss, (0, 1))).trace(x, weights).lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(dots) == 3
    for line in dots:
        if platform == "cuda":
            assert line.count("xbf16>") >= 2
            assert "HIGHEST" not in line
        else:
            assert "xbf16>" not in line
            assert "HIGHEST" in line


def test_routes_of_parts_differ_in_near_ties_alone():
    cfg = MoEConfig(32, 4, 64, 8, router="deepseek_v3", num_groups=4, top_groups=2, score_bias=True)
    x, router = drawn((200, 64), LOW), drawn((64, 32), F32, seed=1)
    bias = drawn((32,), F32, seed=2)
    found = route(x, MoEParams(router, None, None, score_bias=bias), cfg)
    logits = in_parts(x, router, summed=(1, 0), dtype=F32)
    bound = (np.abs(wide(x)) @ np.abs(wide(router))) * TERM[F32]
    assert (np.abs(wide(logits) - wide(found.logits)) <= 2 * bound).all()
