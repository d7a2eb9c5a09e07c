"""One suite, every transport: a new transport is added to the package's table and runs here unchanged."""

import pytest

from jax_moriep.transports import IMPLEMENTATIONS


@pytest.fixture(params=list(IMPLEMENTATIONS))
def transport(request: pytest.FixtureRequest) -> str:
    """The name of each transport in turn."""
    return request.param
