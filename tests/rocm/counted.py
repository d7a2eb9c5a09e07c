"""Runs exchanges whose bytes are counted, on simulated devices."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

import jax_moriep as jm
from jax_moriep.mori import kernels, wheel
from jax_moriep.plan import ExchangeShape
from tests.rocm import counters, mori_jobs, simulated
from tests.rocm.counted_inputs import Given, Sizes
from tests.rocm.mori_rank import Config
from tests.rocm.test_mori import HERE, link_with_mori, run_ranks

Counts = dict[str, dict[str, Counter]]
"""For each phase of a job, for each kernel, sums as ``counters.by_kernel`` makes them."""

OPERATIONS = {
    "dispatch": {
        "collect": ("collect_kernel",),
        "expand": ("fill", "arrive_kernel", "count_kernel", "place_kernel", "expand_kernel"),
    },
    "combine": {"gather": ("gather_kernel",)},
    "replay": {"collect": ("collect_kernel",), "reexpand": ("fill", "mark_arrivals_kernel", "expand_kernel")},
}
"""The package's own kernels around MORI's, by what they do together, and the fills that they need."""

HOMES = ("own", "peer", "host")


def capacity_and_block(sizes: Sizes) -> tuple[int, int]:
    """C, and the rows of a block."""
    cfg = jm.MoEConfig(
        sizes.experts, sizes.top_k, sizes.hidden, 8, capacity_factor=sizes.capacity_factor, block=sizes.block
    )
    shape = ExchangeShape.of(cfg, sizes.ranks, sizes.tokens)
    return shape.capacity, shape.block


def total(kernels: dict[str, Counter], names: tuple[str, ...]) -> Counter:
    """The sum over the kernels with one of these words in their names."""
    found = Counter()
    for name in names:
        matching = [one for kernel, one in kernels.items() if name in kernel]
        assert matching, f"no {name} among {list(kernels)}"
        for one in matching:
            found.update(one)
    return found


def requested(sums: Counter) -> int:
    """Bytes read and written, wherever: each as often as it was asked for."""
    return sum(sums[f"{home}.{kind}"] for home in HOMES for kind in ("read", "written", "atomic"))


def touched(sums: Counter, home: str) -> int:
    """Bytes of the lines that each launch read or wrote, once for each launch."""
    return 64 * (sums[f"{home}.lines_read"] + sums[f"{home}.lines_written"])


def between_devices(kernels: dict[str, Counter]) -> int:
    """Bytes read and written in other devices' memory."""
    return sum(one[f"peer.{kind}"] for one in kernels.values() for kind in ("read", "written", "atomic"))


def of_transport(transport: str, sizes: Sizes, folder: Path, **environment: str) -> list[Counts]:
    """What each rank's kernels did in ``open``, ``dispatch``, ``combine`` and ``replay``."""
    path, given = folder / "counts", Given.draw(sizes).save(folder / "given.npz")
    port = mori_jobs.free_port()
    each = [{"JAX_MORIEP_TEST_JOB": f"{port} {sizes.ranks} {rank}"} for rank in range(sizes.ranks)]
    said = json.dumps(dataclasses.asdict(sizes))
    command = (simulated.PYTHON, "-m", "tests.rocm.counted_job", transport, said, given)
    processes = mori_jobs.start(sizes.ranks, *command, each=each, ROCM_SIM_COUNT=str(path), **environment)
    mori_jobs.finish(processes, 240)
    return [counters.by_phase(path, rank) for rank in range(sizes.ranks)]


def of_mori_alone(sizes: Sizes, folder: Path) -> list[Counts]:
    """What MORI's kernels do in a dispatch and a combine of the same routes that its own library starts."""
    path, given = folder / "counts-alone", Given.draw(sizes).save(folder / "given-alone.npz")
    host = link_with_mori(HERE / "mori_host.cc", folder / "libmori_rank.so", "-shared", "-fPIC")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in mori_jobs.ENVIRONMENT.items():
            patch.setenv(name, value)
        (code,) = kernels.obtain(wheel.find(), "gfx942", [kernels.Unit("IntraNode", "bfloat16")])
    config = Config(
        host=str(host),
        kernels=str(code),
        ranks=sizes.ranks,
        hidden=sizes.hidden,
        top_k=sizes.top_k,
        experts_per_rank=sizes.local_experts,
        max_tokens=sizes.tokens,
        dtype="bfloat16",
        rounds=1,
        seed=0,
        blocks=sizes.blocks,
        waves=sizes.waves,
        given=str(given),
    )
    run_ranks(config, ROCM_SIM_COUNT=str(path))
    found = []
    for rank in range(sizes.ranks):
        sums = counters.by_kernel(path, rank)
        found.append(
            {
                phase: {name: one for name, one in sums.items() if name.startswith(kernel)}
                for phase, kernel in (("dispatch", "EpDispatch"), ("combine", "EpCombine"))
            }
        )
    return found
