"""The native transport's ROCm library on simulated devices: its C++ tests, and those of tests/gpu."""

import pytest

from tests.rocm import simulated

ADVERSARIAL = {"ROCM_SIM_ADVERSARIAL_MEMORY": "1"}
MEMORY = {
    "ordinary": {},
    "adversarial": ADVERSARIAL,
    # The arena is uncached. That hides a missing fence, of which hardware may still have need.
    "adversarial and all cached": ADVERSARIAL | {"ROCM_SIM_CACHE_UNCACHED": "1"},
}


@pytest.mark.timeout(560)
@pytest.mark.parametrize("memory", ["ordinary", "adversarial and all cached"])
def test_exchanges_of_several_processes_and_of_several_ranks_on_a_stream(memory):
    program = simulated.LIBRARY / "gpu" / "rocm" / "rocm_exchange_test"
    simulated.run(program, deadline=500, JAX_MORIEP_TEST_STEPS="10", **MEMORY[memory])


@pytest.mark.parametrize("memory", ["ordinary", "adversarial"])
def test_rows_of_arrivals(memory):
    """The adapter that makes a row-major transport of a token-major one."""
    simulated.run(simulated.LIBRARY / "gpu" / "rocm" / "rocm_expand_test", deadline=120, **MEMORY[memory])


@pytest.mark.parametrize("memory", ["ordinary", "adversarial"])
def test_the_fp8_wire_to_the_bit(memory):
    program = simulated.LIBRARY / "gpu" / "rocm" / "rocm_wire_test"
    simulated.run(program, deadline=300, JAX_MORIEP_TEST_STEPS="50", **MEMORY[memory])


# The exchanges: a layer's programs take longer to compile than to run, and tests/gpu has some.
CONTRACT = "tests/contract/test_exchange.py"


@pytest.mark.parametrize(
    ("devices", "memory", "delivery"),
    [
        (1, "ordinary", "pull"),
        (1, "adversarial", "pull"),
        (2, "adversarial", "pull"),
        (4, "adversarial", "pull"),
        (4, "adversarial", "put"),
    ],
)
def test_the_layer_and_its_exchanges(devices, memory, delivery):
    # With several devices only what takes more than one of them.
    chosen = "native and not [1 and not -1]" if devices > 1 else "native"
    said, _ = simulated.run(
        simulated.PYTHON,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", CONTRACT, "-k", chosen),
        devices=devices,
        deadline=300,
        PYTHONPATH=simulated.JAX_PATH,
        # XLA records every exchange that it can, so that replaying is tested.
        XLA_FLAGS=f"{simulated.XLA_FLAGS} --xla_gpu_graph_min_graph_size=1",
        JAX_MORIEP_TEST_PLATFORM="rocm",
        # Replaying is counted with one device.
        JAX_MORIEP_TEST_STEPS="1000" if devices == 1 else "100",
        JAX_MORIEP_LIB_DIR=str(simulated.LIBRARY),
        JAX_MORIEP_ARENA_MB="16",
        JAX_MORIEP_NATIVE_DISPATCH=delivery,
        **MEMORY[memory],
    )
    # Nothing but the meshes that are larger than what is there.
    skipped = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert all("devices, and there are" in line for line in skipped), said
