"""The contract suite with transport="mori", on simulated devices, in as many processes, in step."""

import pytest

from tests.rocm import mori_jobs, simulated

SUITE = (
    "tests/contract/test_exchange.py",
    "tests/contract/test_layer.py",
    "tests/contract/test_transforms.py",
)


@pytest.mark.parametrize(
    ("ranks", "environment"),
    [
        (1, {"ROCM_SIM_ADVERSARIAL_MEMORY": "1"}),
        (2, {"ROCM_SIM_ADVERSARIAL_MEMORY": "1"}),
        (4, {}),
        (8, {}),
    ],
)
def test_contract(ranks, environment):
    port = mori_jobs.free_port()
    each = [{"JAX_MORIEP_TEST_JOB": f"{port} {ranks} {rank}"} for rank in range(ranks)]
    command = (simulated.PYTHON, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "mori", *SUITE)
    processes = mori_jobs.start(
        ranks, *command, each=each, JAX_MORIEP_TEST_PLATFORM="rocm", JAX_MORIEP_TIMEOUT="120", **environment
    )
    for out in mori_jobs.finish(processes, 550):
        assert " passed" in out
        print(out.splitlines()[-1])
