"""dlpack_call on simulated devices: functions that enqueue copies between XLA's buffers, on XLA's stream."""

import functools

import numpy as np
import pytest

from tests.rocm import interop_cases as cases
from tests.rocm import simulated

X = np.arange(24, dtype=np.float32).reshape(4, 6) - 5


@pytest.fixture
def run(on_rocm):
    return functools.partial(on_rocm, JAX_MORIEP_LIB_DIR=str(simulated.LIBRARY))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fnuz", "int8"])
def test_the_call_is_in_order_with_other_operations(run, dtype):
    x = np.round(X / 3)
    np.testing.assert_array_equal(run(cases.between_other_operations, x, dtype), (x + 1) * 2)


def test_the_derivative(run):
    np.testing.assert_allclose(run(cases.gradient, X), 3 * X * X, rtol=1e-6)


def test_every_device_has_its_part(run):
    np.testing.assert_array_equal(run(cases.on_every_device, X, devices=2), (X + 1) * 2)
