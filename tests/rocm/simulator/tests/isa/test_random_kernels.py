"""Random kernels, compiled for gfx942 and for the host from the same source, give the same bits."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from isa import random_kernels, simulator, toolchain

HERE = Path(__file__).parent
# Translation units, each with its optimisation: unoptimised code uses the stack, and optimised code the rest.
LEVELS = ["-O2"] * 6 + ["-O3", "-O1", "-Os", "-O0"]
KERNELS_EACH = 32
UNITS = range(len(LEVELS))
CASES = [(unit, unit * KERNELS_EACH + i) for unit in UNITS for i in range(KERNELS_EACH)]
DEVICE = ["-x", "hip", "--offload-arch=gfx942", "--offload-device-only", "--no-gpu-bundle-output", "-nogpuinc",
          "-nogpulib"]  # fmt: skip
HOST = ["-x", "c++", "-O1", "-fPIC", "-shared", "-Xclang", "-ffloat16-excess-precision=none"]
COMMON = ["-std=c++17", "-ffp-contract=off", "-Wno-everything", f"-I{HERE}"]


def counters():
    """What the atomics start from: the identity of each kind of operation."""
    start = np.zeros(random_kernels.COUNTERS, np.uint64)
    start[[3, 5]] = 2**64 - 1
    start[[8 + 3, 8 + 5]] = 2**32 - 1
    return start


def inputs(seed):
    return np.random.default_rng(seed).integers(0, 2**32, random_kernels.INPUT_WORDS, dtype=np.uint32)


def on_host(library, seed, threads):
    kernel = getattr(library, f"kernel{seed}")
    out = np.zeros((random_kernels.BLOCKS * threads, random_kernels.RESULTS), np.uint64)
    data, counts = inputs(seed), counters()
    for block in range(random_kernels.BLOCKS):
        kernel(ctypes.c_uint32(block), *(ctypes.c_void_p(array.ctypes.data) for array in (data, out, counts)))
    return out, counts


class Units:
    """Translation units, each compiled and run when the first of its kernels is asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.done = {}

    def of(self, unit):
        if unit not in self.done:
            self.done[unit] = self._run(unit)
        return self.done[unit]

    def _run(self, unit):
        seeds = range(unit * KERNELS_EACH, (unit + 1) * KERNELS_EACH)
        text, threads = random_kernels.translation_unit(seeds)
        folder = self.folder / f"unit{unit}"
        folder.mkdir()
        source = folder / "kernels.hip"
        source.write_text(text)
        toolchain.compile_cpp([*DEVICE, LEVELS[unit], *COMMON], source, folder / "kernels.co")
        toolchain.compile_cpp([*HOST, *COMMON], source, folder / "kernels.so", "-lm")
        library = ctypes.CDLL(str(folder / "kernels.so"))
        right = {seed: on_host(library, seed, count) for seed, count in zip(seeds, threads, strict=True)}
        launches = []
        for seed, count in zip(seeds, threads, strict=True):
            out = np.zeros_like(right[seed][0])
            arguments = [inputs(seed), out, counters()]
            launches.append(simulator.Launch(f"kernel{seed}", arguments, (random_kernels.BLOCKS, 1, 1), (count, 1, 1)))
        results = simulator.run(folder / "kernels.co", launches, folder, "--seed", str(unit))
        return right, dict(zip(seeds, results, strict=True)), text


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    toolchain.need("clang++-19", "ld.lld-19")
    toolchain.simulator()
    return Units(tmp_path_factory.mktemp("random"))


@pytest.mark.parametrize(("unit", "seed"), CASES)
def test_same_bits_as_on_the_host(units, unit, seed):
    right, results, text = units.of(unit)
    result = results[seed]
    assert result.fault is None, result.fault
    (right_out, right_counts), (_, out, counts) = right[seed], result.buffers
    wrong = np.argwhere(out != right_out)
    names = sum(random_kernels.VARIABLES.values(), ())
    places = [f"item {i} {names[k]}: {out[i, k]:#x} expected {right_out[i, k]:#x}" for i, k in wrong[:10]]
    assert not places, f"kernel{seed} {LEVELS[unit]}: {len(wrong)} differ\n" + "\n".join(places)
    np.testing.assert_array_equal(counts, right_counts)
