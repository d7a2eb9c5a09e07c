"""The adapter's custom calls on a simulated device: the same bits as its pure JAX gives on the CPU."""

import dataclasses
import functools

import numpy as np
import pytest

from tests.contract.arriving import HIDDEN, arrive, routing, shape_of
from tests.rocm import expand_cases as cases
from tests.rocm import simulated

SHAPES = [
    shape_of(),
    shape_of(num_ranks=1, num_tokens=9),
    shape_of(num_tokens=0),
    shape_of(capacity=8),
    shape_of(num_ranks=2, num_tokens=100, top_k=7, num_experts=64),
]


@pytest.fixture
def run(on_rocm):
    # XLA records every call that it can, so that replaying is tested.
    flags = f"{simulated.XLA_FLAGS} --xla_gpu_graph_min_graph_size=1"
    return functools.partial(on_rocm, JAX_MORIEP_LIB_DIR=str(simulated.LIBRARY), XLA_FLAGS=flags)


def case(shape):
    """Operands of a program of the last rank, and its sizes."""
    rng = np.random.default_rng(7)
    rank = shape.num_ranks - 1
    ids, weights = routing(rng, shape)
    x, again = rng.normal(size=(2, shape.num_ranks, shape.num_tokens, HIDDEN)).astype(np.float32)
    came = arrive(rng, x, ids, weights, rank, shape)
    arrays = [np.asarray(a) for a in (came.tokens, came.ids, came.weights, came.sources, came.count)]
    others = np.full_like(arrays[0], np.nan)
    count = int(arrays[4][0])
    others[:count] = again.reshape(-1, HIDDEN)[arrays[3][:count]]
    experts = rng.normal(size=(shape.capacity, HIDDEN)).astype(np.float32)
    row_scalars = rng.normal(size=shape.capacity).astype(np.float32)
    return (arrays, others, experts, row_scalars, np.int32(rank)), dataclasses.asdict(shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_and_jax_agree_to_the_bit(run, dtype):
    made = [case(shape) for shape in SHAPES]
    want = cases.there_and_back(made, dtype, "cpu")
    got = run(cases.there_and_back, made, dtype, ROCM_SIM_ADVERSARIAL_MEMORY="1")
    for (operands, _), found, wanted in zip(made, got, want, strict=True):
        count = int(operands[0][4][0])
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            # Scalars and tokens are undefined from the count on.
            part = slice(count) if i in (3, 6, 7) else slice(None)
            assert a.shape == b.shape
            np.testing.assert_array_equal(a[part], b[part])


def test_runs_give_the_same_bits(run):
    assert run(cases.repeated, *case(SHAPES[0]), 20) == 0


def test_arrays_that_do_not_fit_are_named(run):
    said = str(run(cases.with_too_few_ids, *case(SHAPES[0])))
    assert "ids has shape [17, 3] but must be [18, 3]" in said
