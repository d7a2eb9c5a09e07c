"""jax's collectives between simulated devices, of one process and of several, against NumPy."""

import pickle
import re
import socket

import jax.numpy as jnp
import numpy as np
import pytest

from tests.rocm import collective_cases as cases
from tests.rocm import simulated

X64 = {"JAX_ENABLE_X64": "1"}


class Ranks:
    """The processes of a case, one for each device, joined by jax.distributed."""

    def __init__(self, folder, num_ranks, case, **more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._results = [folder / f"rank{rank}.pickle" for rank in range(num_ranks)]
        environment = {"PYTHONPATH": simulated.JAX_PATH} | X64 | more
        self._processes = [
            simulated.start(
                *(simulated.PYTHON, "-m", cases.__name__, port, num_ranks, rank, case, result),
                devices=num_ranks,
                **environment,
            )
            for rank, result in enumerate(self._results)
        ]

    def finish(self, rank):
        """What a rank's case gave, and what the process wrote to stderr."""
        process = self._processes[rank]
        _, err = simulated.finish(process, deadline=120)
        assert process.returncode == 0, err
        return pickle.loads(self._results[rank].read_bytes()), err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()
            process.communicate()


def merge(results):
    """The lists of results by rank, of several processes, as one such list."""
    merged = [{} for _ in results[0]]
    for result in results:
        for to, part in zip(merged, result, strict=True):
            to.update(part)
    return merged


def in_processes(folder, num_ranks, case):
    with Ranks(folder, num_ranks, case) as ranks:
        return merge([ranks.finish(rank)[0] for rank in range(num_ranks)])


@pytest.fixture
def everywhere(on_rocm, tmp_path):
    def run(function, num_ranks, processes):
        if processes == 1:
            return on_rocm(function, devices=num_ranks, **X64)
        return in_processes(tmp_path, num_ranks, function.__name__)

    return run


def in_order(operation, x):
    """The reduction over ranks in their order, rounded to the type each time."""
    total = x[0]
    for part in x[1:]:
        total = operation(total, part).astype(x.dtype)
    return total


def expected(name, x):
    """Results of all ranks, [ranks, ...], for inputs [ranks, ranks * rows, columns]."""
    num_ranks = len(x)
    if name in ("psum", "psum_scatter"):
        total = in_order(np.add, x)
    elif name in ("pmax", "pmin"):
        total = in_order(np.maximum if name == "pmax" else np.minimum, x)
    elif name == "all_gather":
        total = np.concatenate(x)
    elif name == "pbroadcast":
        total = x[-1]
    elif name == "ppermute":
        return np.roll(x, 1, axis=0)
    else:
        parts = x.reshape(num_ranks, num_ranks, -1, x.shape[-1])
        return parts.swapaxes(0, 1).reshape(x.shape)
    if name == "psum_scatter":
        return total.reshape(num_ranks, -1, x.shape[-1])
    return np.stack([total] * num_ranks)


PLACES = [(2, 1), (4, 1), (2, 2), (4, 4)]


@pytest.mark.parametrize(("num_ranks", "processes"), PLACES)
def test_equal_numpy(everywhere, num_ranks, processes):
    results = everywhere(cases.everything, num_ranks, processes)
    for (name, shape, dtype), result in zip(cases.CASES, results, strict=True):
        want = expected(name, cases.draw(shape, dtype, num_ranks))
        assert sorted(result) == list(range(num_ranks))
        # XLA adds up bfloat16 and float16 as float32, so that only these are not equal to the bit.
        narrow = name == "psum" and dtype in ("bfloat16", "float16")
        tolerance = 2 * float(jnp.finfo(dtype).eps) if narrow else 0
        for rank in range(num_ranks):
            assert result[rank].dtype == want.dtype
            np.testing.assert_allclose(
                result[rank].astype(np.float64),
                want[rank].astype(np.float64),
                rtol=tolerance,
                atol=tolerance,
                err_msg=f"{name} of {shape} {dtype}, rank {rank}",
            )


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("transport", ["collective", "reference"])
def test_transports_of_collectives(on_rocm, transport, num_ranks):
    on_rocm(cases.exchanges, transport, devices=num_ranks)


@pytest.mark.parametrize(("how", "deadline"), [("killed", 600), ("late", 10)])
def test_a_rank_that_does_not_come_is_named(tmp_path, how, deadline):
    more = {"ROCM_SIM_COLLECTIVE_DEADLINE": str(deadline)}
    with Ranks(tmp_path, 4, f"without_rank_one {how}", **more) as ranks:
        for rank in (0, 2, 3):
            error, said = ranks.finish(rank)
            assert "HIP_ERROR_LaunchFailure" in error
            gone = ", which has ended" if how == "killed" else ""
            waited = rf"ncclAllReduce of rank {rank} of 4 waited for .*rank 1 \(process \d+{gone}\)"
            assert re.search(waited, said), said
