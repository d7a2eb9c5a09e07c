"""dlpack_call on a GPU: runs script_interop_gpu.py, for this process was told to use the CPU only."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("script_interop_gpu.py")
NO_GPU = 77  # the script's exit code where there is no GPU, or torch is not for it


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="jax has no GPU plugin here")
def test_on_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    # jax leaves memory to torch only if it does not take it all first.
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    if done.returncode == NO_GPU:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
