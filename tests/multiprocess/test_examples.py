"""The examples; what the README shows is run by tests/packaging/test_wheel.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The wheel's own tests run without the checkout, and there are no examples in a wheel.
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="no examples beside the tests")


def run(*command):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    ended = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def errors(text):
    return [float(error) for error in re.findall(r"mean squared error (\d+\.\d+)", text)]


def test_ten_lines():
    assert float(run(ROOT / "examples" / "ten_lines.py")) > 0


@pytest.mark.parametrize(
    "command",
    [
        [ROOT / "examples" / "flax_nnx.py"],
        ["-m", "jax_moriep", "launch", "-n", "3", ROOT / "examples" / "flax_nnx.py"],
        [ROOT / "examples" / "flax_linen.py"],
    ],
    ids=["nnx", "nnx on three processes", "linen"],
)
def test_flax_models_learn(command):
    first, last = errors(run(*command))
    assert last < first / 2


def test_a_server_compiles_before_it_serves_and_decodes_as_without_a_cache():
    # Floating experts are served by the same lines.
    shown = run(ROOT / "examples" / "serve.py", "--requests", "6", "--quant", "fp8_block")
    assert "6 programs for 4 devices" in shown
    assert shown.count(" 0 compilations") == 2
    assert shown.count("tokens are those of a forward pass without a cache") == 2
