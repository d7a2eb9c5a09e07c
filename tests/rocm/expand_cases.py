"""What test_expand.py runs on simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep.plan import ExchangeShape
from jax_moriep.runtime import targets
from jax_moriep.transports import arrivals as ops


def program(sizes, dtype, platform):
    """Jitted: everything that the adapter gives; rows, then rows of other tokens, then tokens and scalars."""
    shape = ExchangeShape(**sizes)
    if platform == "gpu":
        targets.register_expand("rocm")

    @jax.jit
    def run(arrays, again, experts, row_scalars, rank):
        tokens, ids, weights, sources, count = arrays
        arrivals = ops.Arrivals(tokens.astype(dtype), ids, weights, sources, count)
        found = ops.expand(arrivals, rank, shape, platform)
        along = (sources, count, found.routes, shape, platform)
        rows = ops.reexpand(again.astype(dtype), *along)
        tokens, scalars = ops.gather(experts.astype(dtype), *along, row_scalars=row_scalars)
        alone, none = ops.gather(experts.astype(dtype), *along)
        assert none is None
        wide = [x.astype(jnp.float32) for x in (found.rows, rows, tokens, alone)]
        return (found.row_weights, found.group_sizes, found.routes, scalars, *wide)

    return run


def there_and_back(cases, dtype, platform="gpu"):
    return [[np.asarray(x) for x in program(sizes, dtype, platform)(*operands)] for operands, sizes in cases]


def repeated(operands, sizes, times):
    """How many of so many runs of one program gave other bits than the first."""
    run = program(sizes, "bfloat16", "gpu")
    first, *others = ([np.asarray(x) for x in run(*operands)] for _ in range(times))
    count = int(operands[0][4][0])  # What comes behind it is undefined in some of the arrays.
    return sum(
        any(not np.array_equal(a[:count], b[:count]) for a, b in zip(first, other, strict=True))
        for other in others
    )


def with_too_few_ids(operands, sizes):
    """The error of a call whose arrays do not fit each other."""
    targets.register_expand("rocm")
    tokens, ids, weights, sources, count = operands[0]
    arrivals = ops.Arrivals(tokens, ids[1:], weights, sources, count)
    try:
        jax.block_until_ready(ops.expand(arrivals, jnp.int32(0), ExchangeShape(**sizes), "gpu"))
    except jax.errors.JaxRuntimeError as e:
        return str(e)
    return ""
