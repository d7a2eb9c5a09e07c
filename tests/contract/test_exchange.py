"""dispatch and combine on every transport against the loop oracle: rows, plan semantics, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep import exchange as exchange_module
from jax_moriep import quant
from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime import compat
from tests.contract import meshes, oracle

pytestmark = pytest.mark.token_major
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}


def config(transport, num_experts=10, top_k=3, hidden=16, **options):
    return jm.MoEConfig(num_experts, top_k, hidden, 8, transport=transport, **{"block": 4, **options})


def random_case(rng, num_ranks, num_tokens, cfg):
    x = rng.normal(size=(num_ranks, num_tokens, cfg.hidden_size)).astype(np.float32)
    ids = np.array(
        [
            [rng.permutation(cfg.num_experts)[: cfg.top_k] for _ in range(num_tokens)]
            for _ in range(num_ranks)
        ],
        dtype=np.int32,
    ).reshape(num_ranks, num_tokens, cfg.top_k)
    weights = rng.uniform(0.1, 1, size=ids.shape).astype(np.float32)
    return x, ids, weights


def flat(array):
    return array.reshape(-1, array.shape[-1])


@functools.cache
def exchange(cfg, num_ranks):
    """Jitted: dispatch, scale each row by its weight, fill the rows that nobody owns with poison, combine."""

    def body(x, ids, weights, poison):
        disp = jm.dispatch(x, ids, weights, cfg, axis_name="ep")
        rows = disp.rows * disp.row_weights[:, None].astype(disp.rows.dtype)
        rows = jnp.where((disp.row_weights > 0)[:, None], rows, poison)
        y = jm.combine(rows, disp.plan, axis_name="ep")
        return y, (disp.rows, disp.row_weights, disp.group_sizes)

    mapped = jax.shard_map(
        body, mesh=meshes.of(num_ranks), in_specs=(P("ep"), P("ep"), P("ep"), P()), out_specs=P("ep")
    )
    return jax.jit(mapped)


def run(cfg, x, ids, weights, dtype="float32", poison=0.0):
    num_ranks = len(x)
    y, (rows, row_weights, sizes) = exchange(cfg, num_ranks)(
        jnp.asarray(flat(x), dtype), flat(ids), flat(weights), jnp.asarray(poison, dtype)
    )
    split = [
        np.asarray(a.astype(jnp.float32) if a.dtype != jnp.int32 else a)
        for a in (y, rows, row_weights, sizes)
    ]
    return [a.reshape(num_ranks, -1, *a.shape[1:]) for a in split]


def check(cfg, x, ids, weights, dtype="float32", poison=0.0):
    """Runs one exchange and compares all that it gives with the oracle; returns the dropped routes."""
    y, rows, row_weights, sizes = run(cfg, x, ids, weights, dtype, poison)
    num_ranks, num_tokens = x.shape[:2]
    num_local = -(-cfg.num_experts // num_ranks)
    exact = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64)
    want, dropped = oracle.dispatched(
        exact, ids, weights, cfg.num_experts, num_local, cfg.block, rows.shape[1]
    )
    for rank in range(num_ranks):
        np.testing.assert_array_equal(rows[rank], want[rank].rows)
        np.testing.assert_array_equal(row_weights[rank], want[rank].row_weights.astype(np.float32))
        np.testing.assert_array_equal(sizes[rank], want[rank].group_sizes)
    scaled = [w.rows * w.row_weights[:, None] for w in want]
    tol = TOLERANCE[dtype]
    np.testing.assert_allclose(y, oracle.combined(want, scaled, num_ranks, num_tokens), atol=tol, rtol=tol)
    return dropped


@pytest.mark.parametrize(
    ("num_ranks", "num_experts"), [(1, 10), (2, 8), (3, 8), (4, 10), (5, 8), (8, 8), (8, 10)]
)
def test_rows_and_sums(transport, num_ranks, num_experts):
    rng = np.random.default_rng(num_ranks)
    cfg = config(transport, num_experts=num_experts)
    x, ids, weights = random_case(rng, num_ranks, 6, cfg)
    assert check(cfg, x, ids, weights) == set()


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 0.5), ("bfloat16", None), ("float16", 0.5)])
def test_types_and_rows_of_odd_width(transport, dtype, factor):
    """Rows that no vector register divides, of more tokens than a thread block has warps."""
    cfg = config(transport, hidden=33, capacity_factor=factor)
    case = random_case(np.random.default_rng(1), meshes.ranks(4), 70, cfg)
    if (transport, dtype) == ("mori", "float16"):
        with pytest.raises(jm.ConfigError, match="x.dtype='float16' must be one of float32, bfloat16"):
            run(cfg, *case, dtype=dtype)
        return
    assert bool(check(cfg, *case, dtype=dtype)) == (factor is not None)


def test_ids_that_are_no_expert_are_dropped(transport):
    cfg = config(transport)
    num_ranks = meshes.ranks(3)
    x, ids, weights = random_case(np.random.default_rng(2), num_ranks, 6, cfg)
    ids[0, 0, 1] = -1
    ids[num_ranks // 2, 2] = -1  # a token with no route at all
    ids[-1, 1, 0] = cfg.num_experts  # would be a padding expert of the last rank
    ids[-1, 3] = [2**31 - 1, -(2**31), 99]
    check(cfg, x, ids, weights)
    y, *_ = run(cfg, x, ids, weights)
    np.testing.assert_array_equal(y[num_ranks // 2, 2], 0)
    np.testing.assert_array_equal(y[-1, 3], 0)


def test_one_expert_named_twice_by_a_token(transport):
    cfg = config(transport)
    x, ids, weights = random_case(np.random.default_rng(3), meshes.ranks(2), 4, cfg)
    ids[0, 1] = [7, 7, 2]
    check(cfg, x, ids, weights)


@pytest.mark.parametrize(
    "case", ["a rank without tokens", "all to one expert", "an expert with none", "none"]
)
def test_lopsided_routing(transport, case):
    cfg = config(transport)
    x, ids, weights = random_case(np.random.default_rng(4), meshes.ranks(4), 5, cfg)
    if case == "a rank without tokens":
        ids[len(ids) // 2] = -1
    elif case == "all to one expert":
        ids[:] = [4, -1, -1]
    elif case == "an expert with none":
        ids[ids == 6] = -1
    else:
        ids[:] = -1
    check(cfg, x, ids, weights)


def test_zero_tokens_everywhere(transport):
    cfg = config(transport)
    y, rows, row_weights, sizes = run(cfg, *random_case(np.random.default_rng(0), meshes.ranks(2), 0, cfg))
    assert y.shape == (meshes.ranks(2), 0, 16)
    assert rows.shape[1] % cfg.block == 0
    assert not rows.any()
    assert not row_weights.any()
    assert not sizes.any()


@pytest.mark.parametrize("factor", [0.25, 1.0])
def test_overflow_drops_the_last_rows_and_keeps_the_rest(transport, factor):
    cfg = config(transport, capacity_factor=factor)
    x, ids, weights = random_case(np.random.default_rng(5), meshes.ranks(4), 40, cfg)
    ids[:, :, 0] = 1  # overloads rank 0
    ids[:, :, 1:] = np.where(ids[:, :, 1:] == 1, 9, ids[:, :, 1:])
    dropped = check(cfg, x, ids, weights)
    # A single rank has room for all routes from a factor of 1 on.
    assert bool(dropped) == (factor < 1 or len(ids) > 1)


def test_poisoned_padding_rows_do_not_reach_the_tokens(transport):
    cfg = config(transport)
    check(cfg, *random_case(np.random.default_rng(6), meshes.ranks(4), 6, cfg), poison=np.nan)


def test_nan_stays_in_its_row(transport):
    cfg = config(transport)
    x, ids, weights = random_case(np.random.default_rng(7), meshes.ranks(4), 6, cfg)
    clean, *_ = run(cfg, x, ids, weights)
    x[len(x) // 2, 3] = np.nan
    y, *_ = run(cfg, x, ids, weights)
    others = np.ones(x.shape[:2], bool)
    others[len(x) // 2, 3] = False
    assert np.isnan(y[~others]).all()
    np.testing.assert_array_equal(y[others], clean[others])


def test_a_used_exchange_leaves_nothing_behind(transport):
    """After a call full of NaN and infinity, the next call on the same memory gives what it gave before."""
    cfg = config(transport)
    x, ids, weights = random_case(np.random.default_rng(8), meshes.ranks(4), 6, cfg)
    before = run(cfg, x, ids, weights)
    for poison in (np.nan, np.inf):
        for _ in range(2):
            run(cfg, np.full_like(x, poison), ids, weights)
    fewer = np.where(np.arange(6)[None, :, None] < 2, ids, -1)
    check(cfg, x, fewer, weights)
    for a, b in zip(before, run(cfg, x, ids, weights), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_gradients_are_the_transpose(transport, num_ranks):
    """dispatch's gradients for x and weights, combine's for rows, against the oracle's transpose."""
    num_ranks = meshes.ranks(num_ranks)
    cfg = config(transport, capacity_factor=1.0)
    rng = np.random.default_rng(9)
    x, ids, weights = random_case(rng, num_ranks, 6, cfg)
    ids[0, 0] = [3, -1, 99]
    num_local = -(-cfg.num_experts // num_ranks)

    def loss(x, weights, d_rows, d_weights):
        disp = jm.dispatch(x, flat_ids(ids), weights, cfg, axis_name="ep")
        # A cotangent of NaN on rows that nobody owns: padding carries no gradient.
        filled = disp.row_weights > 0
        value = jnp.sum(jnp.where(filled[:, None], disp.rows * d_rows, 0)) + jnp.sum(
            disp.row_weights * d_weights
        )
        return jax.lax.psum(value, "ep")

    def flat_ids(ids):
        rank = jax.lax.axis_index("ep")
        return jnp.asarray(ids)[rank]

    shape = ExchangeShape.of(cfg, num_ranks, 6)
    d_rows = rng.normal(size=(num_ranks, shape.capacity, 16)).astype(np.float32)
    d_weights = rng.normal(size=(num_ranks, shape.capacity)).astype(np.float32)
    mapped = jax.shard_map(loss, mesh=meshes.of(num_ranks), in_specs=P("ep"), out_specs=P())
    d_x, d_w = jax.jit(jax.grad(mapped, argnums=(0, 1)))(
        flat(x), flat(weights), flat(d_rows), d_weights.reshape(-1)
    )
    want, dropped = oracle.dispatched(
        x.astype(np.float64), ids, weights, cfg.num_experts, num_local, cfg.block, shape.capacity
    )
    want_x, want_w = np.zeros(x.shape), np.zeros(weights.shape)
    for rank, held in enumerate(want):
        for row, where in enumerate(held.source):
            if where is not None:
                want_x[where[:2]] += d_rows[rank, row]
                want_w[where] += d_weights[rank, row]
    np.testing.assert_allclose(np.asarray(d_x), flat(want_x), atol=1e-5)
    np.testing.assert_allclose(np.asarray(d_w), flat(want_w), atol=1e-5)

    def combine_loss(rows, d_y):
        disp = jm.dispatch(jnp.zeros((6, 16)), flat_ids(ids), jnp.ones((6, 3)), cfg, axis_name="ep")
        return jax.lax.psum(jnp.sum(jm.combine(rows, disp.plan, axis_name="ep") * d_y), "ep")

    d_y = rng.normal(size=x.shape).astype(np.float32)
    mapped = jax.shard_map(combine_loss, mesh=meshes.of(num_ranks), in_specs=P("ep"), out_specs=P())
    got = np.asarray(jax.jit(jax.grad(mapped))(flat(d_rows), flat(d_y))).reshape(d_rows.shape)
    for rank, held in enumerate(want):
        for row, where in enumerate(held.source):
            expected = np.zeros(16) if where is None else d_y[where[0], where[1]]
            np.testing.assert_array_equal(got[rank, row], expected.astype(np.float32))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_fp8_wire(transport, num_ranks):
    """The rows are x quantised per 128 values; the gradient passes straight through."""
    cfg = config(transport, hidden=200, wire_dtype="fp8")
    num_ranks = meshes.ranks(num_ranks)
    x, ids, weights = random_case(np.random.default_rng(10), num_ranks, 4, cfg)
    x[0, 0] = 0
    _, rows, _, _ = run(cfg, x, ids, weights)
    num_local = -(-10 // num_ranks)
    want, _ = oracle.dispatched(x.astype(np.float64), ids, weights, 10, num_local, 4, rows.shape[1])
    for rank in range(num_ranks):
        largest = np.abs(want[rank].rows).max(axis=1, keepdims=True)
        # e4m3 has 3 mantissa bits: half a unit in the last place, and its smallest steps near zero.
        bound = np.maximum(np.abs(want[rank].rows) * 2.0**-4, largest / 448 * 2.0**-9) + 1e-7
        assert (np.abs(rows[rank] - want[rank].rows) <= bound).all()
    step = exchange(cfg, num_ranks)
    grad = jax.jit(jax.grad(lambda x: step(x, flat(ids), flat(weights), 0.0)[0].sum()))(flat(x))
    np.testing.assert_allclose(np.asarray(grad), np.repeat(flat(weights).sum(1)[:, None], 200, 1), rtol=1e-5)


def check_fp8_wire(transport, num_ranks, dtype):
    """The rows are to the bit those of tokens that were packed and unpacked before, wherever they go."""
    plain = config(transport, hidden=200)
    cfg = config(transport, hidden=200, wire_dtype="fp8")
    rng = np.random.default_rng(10)
    x, ids, weights = random_case(rng, num_ranks, 4, cfg)
    x = np.asarray(jnp.asarray(x * 2.0 ** rng.integers(-14, 12, x.shape), dtype))
    fp8 = quant.format_of(compat.architecture(jax.devices()[0]))
    rounded = quant.unpack(quant.pack(flat(x), fp8), 200, x.dtype, fp8)
    assert np.any(np.asarray(rounded) != flat(x))
    _, rows, *_ = run(cfg, x, ids, weights, dtype)
    _, want, *_ = run(plain, np.asarray(rounded).reshape(x.shape), ids, weights, dtype)
    np.testing.assert_array_equal(rows, want)


# The ranks do not see the type, so one type stands for all where there are three of them.
@pytest.mark.parametrize(
    ("dtype", "num_ranks"), [("float32", 2), ("bfloat16", 2), ("float16", 2), ("float32", 3)]
)
def test_fp8_wire_does_not_depend_on_the_way(transport, dtype, num_ranks):
    if (transport, dtype) == ("mori", "float16"):
        pytest.skip("MORI has no kernels for float16")
    check_fp8_wire(transport, meshes.ranks(num_ranks), dtype)


def test_native_and_reference_agree_to_the_bit():
    """The sum order is defined (k, then rank), so in float32 both give the same bits, run after run."""
    rng = np.random.default_rng(11)
    configs = {name: config(name, num_experts=32, top_k=6, hidden=64) for name in ("native", "reference")}
    x, ids, weights = random_case(rng, meshes.ranks(8), 16, configs["native"])
    want = run(configs["reference"], x, ids, weights)
    for _ in range(3):
        for a, b in zip(run(configs["native"], x, ids, weights), want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("num_ranks", "num_words"), [(1, 0), (1, 37), (3, 1), (4, 0), (4, 37)])
def test_the_words_of_every_rank_come_to_every_rank(transport, num_ranks, num_words):
    """Also the bits that are no number as a float, and typed as equal on all ranks, as out_specs has it."""
    num_ranks = meshes.ranks(num_ranks)
    cfg = config(transport)
    x, ids, weights = random_case(np.random.default_rng(12), num_ranks, 6, cfg)
    words = np.random.default_rng(13).integers(-(2**31), 2**31, (num_ranks, num_words)).astype(np.int32)
    words[:, :1] = 0x7FC00001

    def body(x, ids, weights, words):
        link = exchange_module.link_in_shard_map(x, ids, weights, cfg, "ep")
        start = jnp.zeros(1, jnp.float32)
        _, all_words, _ = exchange_module.ordered_dispatch(link, cfg, x, ids, weights, words[0], start)
        return all_words

    mapped = jax.shard_map(body, mesh=meshes.of(num_ranks), in_specs=P("ep"), out_specs=P())
    got = jax.jit(mapped)(flat(x), flat(ids), flat(weights), words)
    np.testing.assert_array_equal(got, words)
    for shard in got.addressable_shards:
        np.testing.assert_array_equal(shard.data, words)
