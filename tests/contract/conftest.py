"""One suite, every transport: a new transport is added to the package's table and runs here unchanged."""

import pytest

from jax_moriep.transports import IMPLEMENTATIONS
from tests.contract import token_major


@pytest.fixture(params=[*IMPLEMENTATIONS, token_major.NAME])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of each transport in turn, and of one that the tests make of a token-major one."""
    if request.param == token_major.NAME:
        token_major.install(monkeypatch)
    return request.param
