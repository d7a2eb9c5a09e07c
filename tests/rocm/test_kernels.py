"""Kernels of our own through the HIP runtime: what they are given, and what becomes of those that fail."""

from pathlib import Path

import pytest

from tests.rocm import kernel_cases as cases
from tests.rocm import simulated

SOURCE = Path(__file__).parent / "kernels" / "runtime_kernels.hip"


@pytest.fixture(scope="module")
def code_object(tmp_path_factory):
    return simulated.compile_kernels(SOURCE, tmp_path_factory.mktemp("kernels") / "runtime.hsaco")


def run(case, code_object, **more):
    return simulated.run(
        simulated.PYTHON, "-m", "tests.rocm.kernel_cases", case.__name__, code_object, devices=2, **more
    )


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_case(case, code_object):
    run(case, code_object)


@pytest.mark.parametrize("case", cases.FAILURES, ids=lambda case: case.__name__)
def test_failures_are_errors_of_the_device(case, code_object):
    _, err = run(case, code_object, ROCM_SIM_DEADLINE="2")
    lines = [line for line in err.splitlines() if line.startswith("rocm-sim: ")]
    assert len(lines) == 1, err
    kernel = "wait_for" if case is cases.wait_for_ever else "store"
    assert kernel in lines[0]
