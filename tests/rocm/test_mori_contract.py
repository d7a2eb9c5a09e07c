"""The contract suite with transport="mori" on simulated devices, in as many processes, which run in step."""

import pytest

from tests.rocm import mori_jobs

SUITE = [f"tests/contract/test_{part}.py" for part in ("exchange", "layer", "transforms")]


@pytest.mark.timeout(600)
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
    command = ("pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "mori", *SUITE)
    settings = {"JAX_MORIEP_TEST_PLATFORM": "rocm", "JAX_MORIEP_TIMEOUT": "120"} | environment
    processes = mori_jobs.start_module(ranks, *command, **settings)
    for out in mori_jobs.finish(processes, 550):
        assert " passed" in out
        print(out.splitlines()[-1])
