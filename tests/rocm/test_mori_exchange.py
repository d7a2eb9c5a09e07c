"""transport="mori" on simulated devices, a process for each: below the row format, and under faults."""

import pytest

from tests.rocm import mori_jobs, simulated

RECORDED = {"XLA_FLAGS": f"{simulated.XLA_FLAGS} --xla_gpu_graph_min_graph_size=1"}
UNRECORDED = {"XLA_FLAGS": f"{simulated.XLA_FLAGS} --xla_gpu_enable_command_buffer="}
ADVERSARIAL = {"ROCM_SIM_ADVERSARIAL_MEMORY": "1"}


def test_there_and_back():
    """Also with odd widths, with no tokens, and in any order: late ranks meet early ones, and without our own
    meeting before each step half of these come out wrong."""
    cases = (
        ("round_trip", {"dtype": "bfloat16"}),
        ("round_trip", {"hidden": 33, "dtype": "bfloat16", "experts": 7, "top_k": 3}),
        ("round_trip", {"tokens": 0}),
        ("any_order", {"rounds": 4}),
    )
    mori_jobs.run_cases(2, *cases, ROCM_SIM_DELAY_US="3000", **RECORDED, **ADVERSARIAL)


def test_there_and_back_on_four_ranks():
    cases = (
        ("round_trip", {"top_k": 8}),
        ("round_trip", {"kernel": "IntraNodeLL"}),
        ("any_order", {"rounds": 4}),
    )
    mori_jobs.run_cases(4, *cases, ROCM_SIM_DELAY_US="3000", **UNRECORDED, **ADVERSARIAL)


def test_what_ranks_do_not_share_is_an_error_and_a_new_beginning_follows():
    """Another program is one at run time; another config is one at opening, which shows both."""
    cases = (("another_program", {"timeout": 30}), ("another_config", {}))
    for rank, out in enumerate(mori_jobs.run_cases(2, *cases, JAX_MORIEP_TIMEOUT="30")):
        assert f"rank {1 - rank} runs another program" in out
        assert '"handle": "IntraNode/T24/H128' in out
        assert '"handle": "IntraNode/T24/H192' in out


def test_a_rank_killed_between_steps_is_named():
    options = {"timeout": 6, "abrupt": True}
    said = mori_jobs.run_cases(4, ("killed", options), lost=3, JAX_MORIEP_TIMEOUT="6")
    assert all("rank 3 did not arrive within 6" in out for out in said[:-1])


@pytest.mark.parametrize(
    ("ranks", "kernel"), [(2, "EpDispatchIntraNodeKernel"), (4, "EpCombineIntraNodeKernel")]
)
def test_a_rank_killed_inside_a_kernel_of_moris_is_named(ranks, kernel):
    """MORI's kernels of the others wait for it without an end, until they are let go."""
    options = {"timeout": 6, "abrupt": True, "rounds": 500}
    more = {"JAX_MORIEP_TIMEOUT": "6", "ROCM_SIM_TRACE": "1"}
    processes = mori_jobs.start_cases(ranks, ("stopped_inside", options), **more)
    mori_jobs.kill_at(processes[-1], kernel, 3)
    said = mori_jobs.finish(processes, 120, lost=ranks - 1)
    for rank, out in enumerate(said[:-1]):
        assert f"rank {rank} agrees" in out
        assert f"rank {ranks - 1} " in out.split("saw: ")[1]
