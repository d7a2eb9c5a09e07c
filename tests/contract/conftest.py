"""One suite, every transport: a new transport is added to the package's table and runs here unchanged."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_moriep.mori import tuning
from jax_moriep.runtime import group
from jax_moriep.runtime.place import Place
from jax_moriep.transports import IMPLEMENTATIONS
from tests.contract import token_major


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """GPUs multiply float32 in fewer bits unless told; what failed there is said by no result of the test."""
    with jax.default_matmul_precision("highest"):
        yield
    group.check_failures()


@pytest.fixture(autouse=True)
def _few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """MORI's tables fill an MI300X; a simulated one is as right with few work-groups, and sooner done."""
    if "Simulated" not in jax.devices()[0].device_kind:
        return
    resolve = tuning.resolve

    def small(*args: Any, **kwargs: Any) -> tuning.Resolution:
        found = resolve(*args, **kwargs)
        few = {"block_num": 2, "warp_num_per_block": 4, "rdma_block_num": 0}
        return dataclasses.replace(
            found,
            dispatch=dataclasses.replace(found.dispatch, **few),
            combine=dataclasses.replace(found.combine, **few),
        )

    monkeypatch.setattr(tuning, "resolve", small)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each transport in turn; and where the format of arrivals can matter, one that the tests make.

    The adapter between the formats is beneath dispatch and combine, so most of the layer cannot tell.
    """
    if "transport" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker(token_major.NAME)
        names = [*IMPLEMENTATIONS, token_major.NAME] if marked else list(IMPLEMENTATIONS)
        metafunc.parametrize("transport", names, indirect=True)


@pytest.fixture
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a transport that can run here."""
    if request.param == token_major.NAME:
        token_major.install(monkeypatch)
        return request.param
    why = IMPLEMENTATIONS[request.param].unavailable_reason(_everywhere())
    if why is not None:
        pytest.skip(why)
    if request.param == "two_level":
        # Nodes out of devices of one machine: pairs, and where those do not come out even, single ranks.
        monkeypatch.setenv("JAX_MORIEP_RANKS_PER_NODE", "2" if jax.device_count() > 2 else "1")
    return request.param


def _everywhere() -> Place:
    return Place.of(Mesh(np.array(jax.devices()), ("ep",)), "ep")
