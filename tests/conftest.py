"""Eight CPU devices for every test, and short waits; both must be set before jax is imported.

``JAX_MORIEP_TEST_PLATFORM=cuda pytest tests/gpu`` runs the tests that need a GPU; no others fit there.
"""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_MORIEP_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_MORIEP_TIMEOUT", "60")

from tests import processes  # noqa: E402 - jax reads the environment

processes.join()
