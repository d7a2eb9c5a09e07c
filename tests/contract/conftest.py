"""One suite, every transport: a new transport is added to the package's table and runs here unchanged."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_moriep.mori import tuning
from jax_moriep.runtime.place import Place
from jax_moriep.transports import IMPLEMENTATIONS
from tests import processes
from tests.contract import test_exchange, test_layer, test_transforms, token_major


@pytest.fixture(autouse=True)
def _possible_meshes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests make their meshes by these functions, of as many devices as they are told."""
    for module in (test_exchange, test_layer, test_transforms):

        def of(*sizes: int, make: Any = module.mesh_of, **names: Any) -> Mesh:
            num_ranks = sizes[names.get("names", ("ep",)).index("ep")]
            processes.skip_unless_possible(int(np.prod(sizes)), num_ranks)
            return make(*sizes, **names)

        monkeypatch.setattr(module, "mesh_of", of)


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


@pytest.fixture(params=[*IMPLEMENTATIONS, token_major.NAME])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each transport in turn, and of one that the tests make of a token-major one."""
    if request.param == token_major.NAME:
        token_major.install(monkeypatch)
        return request.param
    why = IMPLEMENTATIONS[request.param].unavailable_reason(_everywhere())
    if why is not None:
        pytest.skip(why)
    return request.param


def _everywhere() -> Place:
    return Place.of(Mesh(np.array(jax.devices()), ("ep",)), "ep")
