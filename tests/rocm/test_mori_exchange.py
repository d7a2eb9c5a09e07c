"""transport="mori" on simulated devices, a process for each: below the row format, and under faults."""

import pytest

from tests.rocm import mori_jobs, simulated

RECORDED = {"XLA_FLAGS": f"{simulated.XLA_FLAGS} --xla_gpu_graph_min_graph_size=1"}
UNRECORDED = {"XLA_FLAGS": f"{simulated.XLA_FLAGS} --xla_gpu_enable_command_buffer="}
ADVERSARIAL = {"ROCM_SIM_ADVERSARIAL_MEMORY": "1"}


@pytest.mark.parametrize(
    ("ranks", "options", "environment"),
    [
        (1, {}, {}),
        (2, {"dtype": "bfloat16"}, RECORDED | ADVERSARIAL),
        (4, {"top_k": 8}, ADVERSARIAL),
        (2, {"hidden": 33, "dtype": "bfloat16", "experts": 7, "top_k": 3}, UNRECORDED),
        (2, {"tokens": 0}, {}),
        (4, {"kernel": "IntraNodeLL"}, ADVERSARIAL),
        (8, {"rounds": 2}, {}),
    ],
)
def test_there_and_back(ranks, options, environment):
    mori_jobs.run_case("round_trip", ranks, options, **environment)


@pytest.mark.parametrize("environment", [RECORDED | ADVERSARIAL, UNRECORDED])
def test_sends_and_give_backs_in_any_order(environment):
    """Late ranks meet early ones: without our own meeting before each step half of these come out wrong."""
    mori_jobs.run_case("any_order", 4, {"rounds": 4}, ROCM_SIM_DELAY_US="3000", **environment)


def test_another_program_is_an_error_and_a_new_beginning_follows():
    said = mori_jobs.run_case("another_program", 2, {"timeout": 30}, JAX_MORIEP_TIMEOUT="30")
    for rank, out in enumerate(said):
        assert f"rank {1 - rank} runs another program" in out


def test_another_config_is_an_error_at_opening_that_shows_both():
    for out in mori_jobs.run_case("another_config", 2, JAX_MORIEP_TIMEOUT="30"):
        assert '"handle": "IntraNode/T24/H128' in out
        assert '"handle": "IntraNode/T24/H192' in out


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_killed_between_steps_is_named(ranks):
    options = {"timeout": 6, "abrupt": True}
    said = mori_jobs.run_case("killed", ranks, options, lost=ranks - 1, JAX_MORIEP_TIMEOUT="6")
    assert all(f"rank {ranks - 1} did not arrive within 6" in out for out in said[:-1])


@pytest.mark.parametrize(
    ("ranks", "kernel"), [(2, "EpDispatchIntraNodeKernel"), (4, "EpCombineIntraNodeKernel")]
)
def test_a_rank_killed_inside_a_kernel_of_moris_is_named(ranks, kernel):
    """MORI's kernels of the others wait for it without an end, until they are let go."""
    options = {"timeout": 6, "abrupt": True, "rounds": 500}
    more = {"JAX_MORIEP_TIMEOUT": "6", "ROCM_SIM_TRACE": "1"}
    processes = mori_jobs.start_case("stopped_inside", ranks, options, **more)
    lost = processes[-1]
    assert lost.stderr is not None
    seen = 0
    for line in lost.stderr:
        seen += kernel in line
        if seen == 3:
            lost.kill()
            break
    said = mori_jobs.finish(processes, 120, lost=ranks - 1)
    for rank, out in enumerate(said[:-1]):
        assert f"rank {rank} agrees" in out
        assert f"rank {ranks - 1} " in out.split("saw: ")[1]
