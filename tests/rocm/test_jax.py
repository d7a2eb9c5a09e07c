"""XLA's ROCm client on simulated devices: every result equals that of the CPU."""

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.rocm import jax_cases as cases
from tests.rocm import simulated

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 80)).astype(np.float32)
ROWS = RNG.integers(0, 48, size=48).astype(np.int32)
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


def assert_equal(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        other = np.asarray(other)
        assert one.dtype == other.dtype
        rtol = TOLERANCE.get(str(one.dtype), 0)
        np.testing.assert_allclose(
            one.astype(np.float64), other.astype(np.float64), rtol=rtol, atol=rtol, equal_nan=True
        )


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        (cases.round_trip, (X,)),
        (cases.deserialised, (X,)),
        (cases.elementwise, (X,)),
        (cases.elementwise, (X.astype(ml_dtypes.bfloat16),)),
        (cases.integers, (np.arange(-500, 500, dtype=np.int32),)),
        (cases.sums, (X,)),
        (cases.softmax, (X,)),
        (cases.softmax, (X.astype(ml_dtypes.bfloat16),)),
        (cases.gather, (X, ROWS)),
        (cases.scatter_add, (X, ROWS)),
        (cases.sort, (X,)),
        (cases.top_k, (X,)),
        (cases.top_k, (np.random.default_rng(1).normal(size=32768).astype(np.float32),)),
        (cases.cumsum, (X,)),
        (cases.while_loop, (X,)),
        (cases.scan, (X,)),
        (cases.conditional, (X,)),
        (cases.random_bits, (7,)),
        (cases.many_launches, (X,)),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(np.asarray(value[0]).dtype),
)
def test_equals_the_cpu(on_rocm, case, arguments):
    assert_equal(on_rocm(case, *arguments), case(*arguments))


SPECIAL = np.array([0, -0.0, 1e-8, 240, 448, 500, 1e6, np.inf, -np.inf, np.nan], np.float32)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3fn"]
)
def test_conversions_are_exact(on_rocm, dtype):
    narrow = np.dtype(getattr(ml_dtypes, dtype, dtype))
    x = np.concatenate([X.ravel() * 100, X.ravel() / 100, SPECIAL])
    actual, expected = on_rocm(cases.convert, x, narrow), cases.convert(x, narrow)
    assert actual.dtype == narrow
    np.testing.assert_array_equal(actual.astype(np.float32), np.asarray(expected).astype(np.float32))
    # Every value of the narrow type back to float32.
    size = narrow.itemsize
    every = np.arange(256**size, dtype=f"uint{8 * size}").view(narrow)
    np.testing.assert_array_equal(
        on_rocm(cases.convert, every, np.dtype("float32")), every.astype(np.float32)
    )


# float32 products go through the matrix unit's xf32 by default, which keeps 10 bits of each factor.
DOTS = [
    (np.float32, "default", 2e-2),
    (np.float32, "highest", 1e-5),
    (ml_dtypes.bfloat16, "default", 1e-5),
]
DOT_IDS = ["xf32", "float32", "bfloat16"]


def matrices(m, k, n, dtype):
    return RNG.normal(size=(m, k)).astype(dtype), RNG.normal(size=(k, n)).astype(dtype)


@pytest.mark.parametrize(("dtype", "precision", "tolerance"), DOTS, ids=DOT_IDS)
@pytest.mark.parametrize("shape", [(64, 64, 64), (33, 70, 17)], ids=str)
def test_dot(on_rocm, shape, dtype, precision, tolerance):
    x, y = matrices(*shape, dtype)
    expected = x.astype(np.float64) @ y.astype(np.float64)
    actual = on_rocm(cases.dot, x, y, precision)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_pallas_triton_dot(on_rocm, dtype):
    x, y = matrices(64, 64, 64, dtype)
    expected = x.astype(np.float64) @ y.astype(np.float64)
    np.testing.assert_allclose(on_rocm(cases.pallas_dot, x, y), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("count", [2, 4])
def test_shard_map(on_rocm, count):
    actual = on_rocm(cases.sharded_elementwise, X, count, devices=count)
    assert_equal(actual, cases.sharded_elementwise(X, count))


def test_sort_of_many_runs_rocprims_kernels(on_rocm):
    """These come compressed in a fat binary of the plugin, from AMD's compiler."""
    x = RNG.normal(size=1 << 15).astype(np.float32)
    assert_equal(on_rocm(cases.sort, x, ROCM_SIM_TRACE="1"), cases.sort(x))
    assert matches_in(on_rocm.said, "rocprim") > 0


def test_what_is_not_simulated_fails_with_its_name(on_rocm):
    with pytest.raises(pytest.fail.Exception, match=r"hipfft\w+ of libhipfft.so.0 is not simulated"):
        on_rocm(cases.fft, X)


def matches_in(text, word):
    return sum(word in line for line in text.splitlines())


# By default XLA makes a graph only of several kernels in a row.
GRAPHS = simulated.XLA_FLAGS + " --xla_gpu_graph_min_graph_size=1"


@pytest.mark.parametrize(
    "case", [cases.sort, cases.many_launches, cases.scan], ids=lambda case: case.__name__
)
def test_command_buffers(on_rocm, case):
    assert_equal(on_rocm(case, X, XLA_FLAGS=GRAPHS, ROCM_SIM_TRACE="1"), case(X))
    assert matches_in(on_rocm.said, "a graph is launched") > 0


def test_products_run_on_kernels_that_triton_compiled(on_rocm):
    x, y = matrices(64, 64, 64, ml_dtypes.bfloat16)
    on_rocm(cases.dot, x, y, "default", ROCM_SIM_TRACE="1")
    assert matches_in(on_rocm.said, "runs gemm_fusion_dot") == 1


@pytest.mark.parametrize("flags", [simulated.XLA_FLAGS, GRAPHS], ids=["streams", "graphs"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ffi_call(on_rocm, ffi_scale, count, flags):
    actual = on_rocm(cases.ffi_scale, X, str(ffi_scale), count, devices=count, XLA_FLAGS=flags)
    expected = ((X * 3 + 1) * 3 + 1) * 3 + 1
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
