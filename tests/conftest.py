"""Eight CPU devices for every test, and short waits; both must be set before jax is imported.

``JAX_MORIEP_TEST_PLATFORM=cuda pytest tests/gpu tests/contract`` (or ``rocm``) runs the tests that need a GPU
and the contract suite, on as many GPUs as there are; no other tests fit there.

``JAX_MORIEP_TEST_CACHE`` names a folder that keeps compiled programs from one run to the next, as
``make test`` has it. A worker has a part of its own, because jax writes its cache's files in place.
"""

import os

import jaxlib.version

# What tests run is compiled for a few numbers, run once or twice, and thrown away. At XLA's own level a third
# of the contract suite's time is LLVM's optimiser's. What users meet first, the examples and the wheel, is
# compiled at that level all the same (tests/multiprocess/test_examples.py, tests/packaging/test_wheel.py);
# not so examples/train.py, whose six processes would spend most of their time there.
# Half of the rest is the emitters' of fusions, of which the old ones take less. Newer XLA has none, and
# the tests on the newest jax compile as users do. The old ones make NaN of small negative numbers in the
# fnuz formats (findings/xla_cpu_fnuz_underflow.sh), so tests/rocm does without them.
UNOPTIMISED = "--xla_backend_optimization_level=0"
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
if jaxlib.version.__version_info__ < (0, 11):
    UNOPTIMISED += f" {OLD_EMITTERS}"

platform = os.environ.get("JAX_MORIEP_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = platform
flags = [UNOPTIMISED] if platform == "cpu" else []
# Of two that say different things XLA takes the last: who runs the tests may ask for another level.
flags += [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_MORIEP_TIMEOUT", "60")

import jax  # noqa: E402 - it reads the environment

from tests import processes  # noqa: E402

if cache := os.environ.get("JAX_MORIEP_TEST_CACHE"):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    jax.config.update("jax_compilation_cache_dir", f"{cache}/{worker}")
    # Seconds; to read a program takes some hundredth of one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

processes.join()
