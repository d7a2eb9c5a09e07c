"""ep_moe with transport="mori" on simulated devices, a process for each: what training makes of it."""

import pytest

from tests.rocm import mori_jobs
from tests.rocm.test_mori_exchange import ADVERSARIAL, RECORDED, UNRECORDED

TRAINING = ("every_routing", "bfloat16", "fp8_wire", "all_forward_then_all_backward")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_ranks", "copies", "cases", "environment"),
    [
        (2, 1, (*TRAINING, "replays"), RECORDED | ADVERSARIAL),
        (4, 1, ("every_routing", "all_forward_then_all_backward"), UNRECORDED | ADVERSARIAL),
        (8, 1, ("bfloat16",), RECORDED | ADVERSARIAL),
        (1, 1, ("refusals", "every_routing"), RECORDED),
        # Two groups, of which each process has one.
        (2, 2, ("every_routing",), RECORDED),
    ],
)
def test_training_steps(num_ranks, copies, cases, environment):
    count = num_ranks * copies
    job = mori_jobs.start_module(count, "tests.rocm.mori_layer_job", str(num_ranks), *cases, **environment)
    for index, out in enumerate(mori_jobs.finish(job, 540)):
        assert f"rank {index} agrees: {cases[-1]}" in out
