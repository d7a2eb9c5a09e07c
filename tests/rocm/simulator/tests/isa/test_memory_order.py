"""The adversarial memory mode shows missing releases and acquires, which ordinary runs pass over.

The faults are those that programs for this GPU had: a release by the last workgroup only, which writes back
its own die's cache and leaves the other dies' rows where they are, and a reader without an acquire, which
keeps reading the zeros that its die saw first.
"""

import numpy as np
import pytest

from isa import simulator, toolchain
from isa.test_random_kernels import COMMON, DEVICE, HERE

ROWS = 100 * np.arange(7)[:, None] + np.arange(64)[None, :] + 1


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """(kernel, options...) -> the rows that the reader saw."""
    toolchain.need("clang++-19", "ld.lld-19")
    toolchain.simulator()
    folder = tmp_path_factory.mktemp("order")
    code = folder / "memory_order.co"
    toolchain.compile_cpp([*DEVICE, "-O2", *COMMON], HERE / "memory_order.hip", code)

    def run(kernel, *options):
        message, out = np.zeros(64 + 7 * 64, np.uint32), np.zeros(8 * 64, np.uint32)
        result = simulator.run(
            code, [simulator.Launch(kernel, [message, out], grid=(8, 1, 1))], folder, *options
        )[0]
        assert result.fault is None, result.fault
        return result.buffers[1][: 7 * 64].reshape(7, 64)

    return run


@pytest.mark.parametrize("seed", range(4))
def test_the_right_kernel_passes(passed, seed):
    np.testing.assert_array_equal(passed("right", "--adversarial", "--seed", str(seed)), ROWS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kernel", ["without_each_release", "without_acquire"])
def test_a_missing_fence_shows(passed, kernel, seed):
    seen = passed(kernel, "--adversarial", "--seed", str(seed))
    assert (seen != ROWS).any()
    # What is not there yet is stale, never anything else.
    assert ((seen == ROWS) | (seen == 0)).all()


@pytest.mark.parametrize("kernel", ["right", "without_each_release", "without_acquire"])
def test_without_caches_every_order_is_kept(passed, kernel):
    np.testing.assert_array_equal(passed(kernel), ROWS)
