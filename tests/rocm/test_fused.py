"""The fused call of transport="mori" and experts="aiter" on simulated devices, a process for each."""

import collections
import re

import pytest

from jax_moriep.aiter import kernels
from tests.rocm import counters, mori_jobs, simulated
from tests.rocm.test_mori_exchange import ADVERSARIAL, RECORDED, UNRECORDED

PER_ROW = ("fp8_token", "int8_token")
AITER = {"JAX_MORIEP_AITER_DIR": str(simulated.AITER)}
# The block-scale kernel is right while its waves keep in step.
IN_STEP = {"ROCM_SIM_TURN": "1"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("num_ranks", "schemes", "cases", "environment"),
    [
        (1, PER_ROW, ("every_wire",), RECORDED | ADVERSARIAL),
        (2, ("fp8_token",), ("every_wire", "replays", "gradients"), RECORDED | ADVERSARIAL),
        (2, ("int8_token",), ("uneven", "replays", "gradients"), RECORDED | ADVERSARIAL),
        (2, ("fp8_block",), ("every_wire", "replays", "gradients", "what_runs"), RECORDED | IN_STEP),
        (4, ("fp8_token",), ("every_wire",), UNRECORDED | ADVERSARIAL),
        (8, tuple(kernels.KERNELS), ("uneven",), RECORDED | IN_STEP),
    ],
)
def test_the_fused_call(num_ranks, schemes, cases, environment):
    assert set(schemes) <= set(kernels.KERNELS)
    given = (",".join(schemes), *cases)
    job = mori_jobs.start_module(num_ranks, "tests.rocm.fused_job", *given, **AITER, **environment)
    for index, out in enumerate(mori_jobs.finish(job, 840)):
        assert f"rank {index} agrees: {schemes[-1]} {cases[-1]}" in out


def test_another_process_runs_what_was_compiled(tmp_path):
    """After jm.initialize, without tracing a layer."""
    for case in ("saved", "loaded"):
        more = AITER | RECORDED | {"JAX_MORIEP_TEST_FOLDER": str(tmp_path)}
        job = mori_jobs.start_module(2, "tests.rocm.fused_job", "int8_token", case, **more)
        for index, out in enumerate(mori_jobs.finish(job, 140)):
            assert f"rank {index} agrees: int8_token {case}" in out


@pytest.mark.parametrize(
    ("num_ranks", "kernel", "environment"),
    [
        (2, "EpDispatchIntraNodeKernel", RECORDED),
        (4, "fmoe_bf16_pertokenFp8", UNRECORDED),
        (2, "EpCombineIntraNodeKernel", UNRECORDED),
    ],
)
def test_a_rank_killed_inside_the_call_is_named(num_ranks, kernel, environment):
    """In MORI's kernels, which wait for each other without an end, and in AITER's, which wait for nobody."""
    more = AITER | environment | {"JAX_MORIEP_TIMEOUT": "6", "ROCM_SIM_TRACE": "1"}
    job = mori_jobs.start_module(num_ranks, "tests.rocm.fused_job", "fp8_token", "stopped_inside", **more)
    mori_jobs.kill_at(job[-1], kernel, 4)
    lost = num_ranks - 1
    for rank, out in enumerate(mori_jobs.finish(job, 120, lost=lost)[:-1]):
        found = re.search(rf"saw after \d+: .*(dispatch|combine), rank {rank}, step \d+: rank {lost} ", out)
        assert found, out


# What our own kernels execute beside AITER's for 256 tokens with 8 experts each, H=1024 and I=512.
INSTRUCTIONS = {
    "fp8_block None": 0.05,
    "fp8_block fp8": 0.05,
    "fp8_token None": 0.054,
    "fp8_token fp8": 0.086,
    "int8_token None": 0.059,
    "int8_token fp8": 0.0905,
}
BYTES = 0.018
KINDS = ("salu", "branch", "smem", "valu", "mfma", "lds", "load", "store", "atomic", "cache")


@pytest.mark.timeout(600)
def test_what_our_kernels_add_to_aiters(tmp_path):
    path = tmp_path / "counts"
    given = (",".join(kernels.KERNELS), "counted")
    environment = RECORDED | IN_STEP | {"ROCM_SIM_COUNT": str(path)}
    mori_jobs.finish(mori_jobs.start_module(1, "tests.rocm.fused_job", *given, **AITER, **environment), 500)
    phases = counters.by_phase(path, 0)
    for name, most in INSTRUCTIONS.items():
        ours, theirs = collections.Counter(), collections.Counter()
        for kernel, counts in phases[name].items():
            theirs.update(counts if kernel.startswith("_ZN5aiter") else {})
            ours.update(counts if kernel.startswith("_ZN6moriep") or kernel == "fill" else {})
        instructions = [sum(counts[kind] for kind in KINDS) for counts in (ours, theirs)]
        moved = [
            sum(n for key, n in counts.items() if "." in key and "lines" not in key)
            for counts in (ours, theirs)
        ]
        assert 0 < instructions[0] < most * instructions[1], (name, instructions)
        assert 0 < moved[0] < BYTES * moved[1], (name, moved)
