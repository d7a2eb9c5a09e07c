"""What a token-major transport brings to one rank, made up: random routing, a random order, and rubbish."""

import jax.numpy as jnp
import numpy as np

from jax_moriep.plan import ExchangeShape
from jax_moriep.transports.arrivals import Arrivals

HIDDEN = 5


def shape_of(num_ranks=3, num_tokens=6, top_k=3, num_experts=10, block=4, capacity=None):
    num_local = -(-num_experts // num_ranks)
    rows = num_ranks * num_tokens * min(top_k, num_local)
    exact = (rows + min(num_local, rows) * (block - 1)) // block * block
    return ExchangeShape(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        top_k=top_k,
        hidden_size=HIDDEN,
        num_experts=num_experts,
        num_local_experts=num_local,
        block=block,
        capacity=max(block, exact) if capacity is None else capacity,
    )


def routing(rng, shape):
    ids = rng.integers(0, shape.num_experts, size=(shape.num_ranks, shape.num_tokens, shape.top_k))
    strange = rng.random(ids.shape) < 0.15
    ids[strange] = rng.choice([-1, shape.num_experts, 2**31 - 1, -(2**31)], size=strange.sum())
    return ids.astype(np.int32), rng.uniform(0.1, 1, size=ids.shape).astype(np.float32)


def arrive(rng, x, ids, weights, rank, shape):
    """What a token-major transport brings to a rank, in a random order, among rubbish."""
    first = rank * shape.num_local_experts
    last = min(first + shape.num_local_experts, shape.num_experts)
    came = [
        (s, t)
        for s in range(shape.num_ranks)
        for t in range(shape.num_tokens)
        if any(first <= e < last for e in ids[s, t])
    ]
    came = [came[i] for i in rng.permutation(len(came))]
    size = shape.num_ranks * shape.num_tokens
    # What lies there names this rank's experts and tokens that did come.
    tokens = np.full((size, x.shape[-1]), np.nan, x.dtype)
    some_ids = np.full((size, shape.top_k), first, np.int32)
    some_weights = np.full((size, shape.top_k), np.nan, np.float32)
    sources = rng.integers(0, max(1, size), size=size).astype(np.int32)
    for n, (s, t) in enumerate(came):
        tokens[n], some_ids[n], some_weights[n] = x[s, t], ids[s, t], weights[s, t]
        sources[n] = s * shape.num_tokens + t
    count = np.array([len(came)], np.int32)
    return Arrivals(*map(jnp.asarray, (tokens, some_ids, some_weights, sources, count)))
