"""experts="triton" on a simulated device: its kernels as XLA's Triton compiles them for gfx942."""

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.rocm import experts_cases as cases
from tests.rocm import simulated


def test_the_suite_of_all_experts():
    simulated.run(
        simulated.PYTHON,
        *("-m", "pytest", "-q", "tests/unit/test_experts.py", "-k", "triton"),
        deadline=300,
        PYTHONPATH=simulated.JAX_PATH,
        JAX_MORIEP_TEST_PLATFORM="rocm",
        JAX_MORIEP_LIB_DIR=str(simulated.LIBRARY),
    )


@pytest.mark.parametrize("block", [8, 32, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tiles_of_full_size(on_rocm, dtype, block):
    """All tiles that the table gives an MI300X, with whole ones and with parts of them in every axis."""
    sizes = np.array([130, 0, 1, 256], np.int32)
    as_dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    operands = cases.draw(as_dtype, sizes, hidden=320, inner=192, block=block)
    got = on_rocm(cases.forward_and_backward, "triton", block, *operands)
    want = cases.forward_and_backward("blocked", block, *operands)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = a.astype(np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
