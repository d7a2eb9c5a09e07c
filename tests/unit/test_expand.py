"""Arrivals to rows and back, in pure JAX, against NumPy loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep.transports import arrivals as ops
from tests.contract.arriving import HIDDEN, arrive, routing, shape_of


def placed(ids, rank, shape):
    """Row of every route by going through the experts, and how many each expert keeps."""
    routes = np.full(ids.shape, -1)
    sizes, start = [], 0
    for e in range(rank * shape.num_local_experts, (rank + 1) * shape.num_local_experts):
        row = start
        for where in np.ndindex(*ids.shape):
            if ids[where] == e and e < shape.num_experts:
                routes[where] = row if row < shape.capacity else -2
                row += 1
        sizes.append(max(0, min(row, shape.capacity) - start))
        start = -(-row // shape.block) * shape.block
    return routes, sizes


def run(rng, x, ids, weights, rank, shape):
    arrivals = arrive(rng, x, ids, weights, rank, shape)
    expand = jax.jit(functools.partial(ops.expand, shape=shape, platform="cpu"))
    return arrivals, expand(arrivals, jnp.int32(rank))


CASES = {
    "plain": shape_of(),
    "one rank": shape_of(num_ranks=1, num_tokens=9),
    "few experts": shape_of(num_ranks=5, num_experts=8),
    "a rank without experts": shape_of(num_ranks=4, num_experts=5, top_k=2),
    "no tokens": shape_of(num_tokens=0),
    "one token": shape_of(num_ranks=2, num_tokens=1, top_k=1),
    "no room": shape_of(capacity=8),
    "block of one": shape_of(block=1),
}


@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_rows_and_back(shape):
    rng = np.random.default_rng(3)
    ids, weights = routing(rng, shape)
    x, again = rng.normal(size=(2, shape.num_ranks, shape.num_tokens, HIDDEN)).astype(np.float32)
    for rank in range(shape.num_ranks):
        arrivals, got = run(rng, x, ids, weights, rank, shape)
        routes, sizes = placed(ids, rank, shape)
        want, want_again, want_weights = np.zeros((shape.capacity, HIDDEN)), None, np.zeros(shape.capacity)
        want_again = want.copy()
        for s, t, k in np.argwhere(routes >= 0):
            row = routes[s, t, k]
            want[row], want_again[row], want_weights[row] = x[s, t], again[s, t], weights[s, t, k]
        np.testing.assert_array_equal(got.routes, routes)
        np.testing.assert_array_equal(got.group_sizes, sizes)
        np.testing.assert_array_equal(got.rows, want)
        np.testing.assert_array_equal(got.row_weights, want_weights.astype(np.float32))

        count, sources = int(arrivals.count[0]), np.asarray(arrivals.sources)
        tokens = np.full_like(arrivals.tokens, np.nan)
        tokens[:count] = again.reshape(-1, HIDDEN)[sources[:count]]
        along = (arrivals.sources, arrivals.count, got.routes)
        rows = jax.jit(functools.partial(ops.reexpand, shape=shape, platform="cpu"))(tokens, *along)
        np.testing.assert_array_equal(rows, want_again)

        # Rows that nobody owns are poisoned: gather must not read them.
        row_scalars = np.where(want_weights > 0, rng.normal(size=shape.capacity), np.nan).astype(np.float32)
        experts = np.where(want_weights[:, None] > 0, rng.normal(size=want.shape), np.nan).astype(np.float32)
        gather = jax.jit(functools.partial(ops.gather, shape=shape, platform="cpu"))
        tokens, scalars = gather(experts, *along, row_scalars=row_scalars)
        assert tokens.shape == (len(sources), HIDDEN)
        assert gather(experts, *along)[1] is None
        for n in range(count):
            total = np.zeros(HIDDEN, np.float32)
            for k, row in enumerate(routes.reshape(-1, shape.top_k)[sources[n]]):
                total = total + (experts[row] if row >= 0 else 0)
                assert scalars[n, k] == (row_scalars[row] if row >= 0 else 0)
            np.testing.assert_array_equal(tokens[n], total)


def test_something_is_dropped_and_something_kept():
    shape = CASES["no room"]
    routes, sizes = placed(routing(np.random.default_rng(3), shape)[0], 0, shape)
    assert (routes == -2).any()
    assert (routes >= 0).any()
    assert sum(sizes) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8"])
def test_rows_keep_their_bits_whatever_the_order_of_arrivals(dtype):
    shape = shape_of(num_ranks=4, num_tokens=16, num_experts=12)
    ids, weights = routing(np.random.default_rng(4), shape)
    values = np.random.default_rng(5).integers(0, 256, size=(4, 16, HIDDEN))
    x = np.asarray(jnp.asarray(values).astype(dtype))
    found = []
    for seed in range(3):
        arrivals, got = run(np.random.default_rng(seed), x.astype(np.float32), ids, weights, 1, shape)
        cast = jnp.where(jnp.isnan(arrivals.tokens), 7, arrivals.tokens).astype(dtype)
        rows = ops.reexpand(cast, arrivals.sources, arrivals.count, got.routes, shape, "cpu")
        assert rows.dtype == dtype
        found.append((np.asarray(rows), *map(np.asarray, (got.rows, got.row_weights, got.routes))))
    for again in found[1:]:
        for a, b in zip(found[0], again, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_rows_of_a_failed_exchange_are_poison(dtype):
    """Zeros would look like results, and reach a parameter by way of an average."""
    shape = shape_of()
    rng = np.random.default_rng(6)
    ids, weights = routing(rng, shape)
    x = np.zeros((shape.num_ranks, shape.num_tokens, HIDDEN), np.float32)
    arrivals, good = run(rng, x, ids, weights, 0, shape)
    tokens = jnp.nan_to_num(arrivals.tokens).astype(dtype)
    lost = dataclasses.replace(arrivals, tokens=tokens, count=jnp.full(1, -1))
    got = jax.jit(functools.partial(ops.expand, shape=shape, platform="cpu"))(lost, jnp.int32(0))
    again = ops.reexpand(tokens, lost.sources, lost.count, good.routes, shape, "cpu")
    for rows in (got.rows, again):
        assert rows.dtype == dtype
        assert bool((rows == 255).all() if dtype == "uint8" else jnp.isnan(rows).all())
    assert bool(jnp.isnan(got.row_weights).all())
    assert not got.group_sizes.any()
    assert (got.routes == -1).all()


def test_sums_are_rounded_once():
    """In bfloat16 256 + 1 is 256: a sum that rounds at every term would lose both ones."""
    shape = shape_of(num_ranks=1, num_tokens=1, num_experts=3, block=1)
    ids = np.array([[[0, 1, 2]]], np.int32)
    arrivals, got = run(
        np.random.default_rng(0), np.ones((1, 1, HIDDEN), np.float32), ids, np.ones(ids.shape), 0, shape
    )
    rows = jnp.array([[256.0], [1.0], [1.0]], jnp.bfloat16) * jnp.ones((1, HIDDEN), jnp.bfloat16)
    tokens, _ = ops.gather(rows, arrivals.sources, arrivals.count, got.routes, shape, "cpu")
    assert tokens.dtype == jnp.bfloat16
    np.testing.assert_array_equal(tokens.astype(jnp.float32), np.full((1, HIDDEN), 258.0))
