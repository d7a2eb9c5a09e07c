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
# clang 19 gets these wrong: unoptimised they agree with the host. Of ~(x << 32) | y * z, whose lower half is
# all ones whatever x, y and z are, it leaves that half undefined.
MISCOMPILED = {141}
CASES = [(unit, unit * KERNELS_EACH + i) for unit in UNITS for i in range(KERNELS_EACH)]
CASES = [(unit, seed) for unit, seed in CASES if seed not in MISCOMPILED]
DEVICE = [
    *("-x", "hip", "--offload-arch=gfx942", "--offload-device-only", "--no-gpu-bundle-output"),
    *("-nogpuinc", "-nogpulib"),
]
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


def on_host(library, seed, threads, results=random_kernels.RESULTS, blocks=random_kernels.BLOCKS):
    kernel = getattr(library, f"kernel{seed}")
    out = np.zeros((blocks * threads, results), np.uint64)
    data, counts = inputs(seed), counters()
    for block in range(blocks):
        kernel(ctypes.c_uint32(block), *(ctypes.c_void_p(array.ctypes.data) for array in (data, out, counts)))
    return out, counts


def compiled(text, level, folder):
    """The host's library; the device's code object lies beside it, `kernels.co`."""
    folder.mkdir()
    source = folder / "kernels.hip"
    source.write_text(text)
    toolchain.compile_cpp([*DEVICE, level, *COMMON], source, folder / "kernels.co")
    toolchain.compile_cpp([*HOST, *COMMON], source, folder / "kernels.so", "-lm")
    return ctypes.CDLL(str(folder / "kernels.so"))


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
        library = compiled(text, LEVELS[unit], folder)
        right = {seed: on_host(library, seed, count) for seed, count in zip(seeds, threads, strict=True)}
        launches = []
        for seed, count in zip(seeds, threads, strict=True):
            out = np.zeros_like(right[seed][0])
            arguments = [inputs(seed), out, counters()]
            launches.append(
                simulator.Launch(f"kernel{seed}", arguments, (random_kernels.BLOCKS, 1, 1), (count, 1, 1))
            )
        results = simulator.run(folder / "kernels.co", launches, folder, "--seed", str(unit))
        return right, dict(zip(seeds, results, strict=True))


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    toolchain.need("clang++-19", "ld.lld-19")
    toolchain.simulator()
    return Units(tmp_path_factory.mktemp("random"))


@pytest.mark.parametrize(("unit", "seed"), CASES)
def test_same_bits_as_on_the_host(units, unit, seed):
    right, results = units.of(unit)
    result = results[seed]
    assert result.fault is None, result.fault
    (right_out, right_counts), (_, out, counts) = right[seed], result.buffers
    wrong = np.argwhere(out != right_out)
    names = sum(random_kernels.VARIABLES.values(), ())
    places = [f"item {i} {names[k]}: {out[i, k]:#x} expected {right_out[i, k]:#x}" for i, k in wrong[:10]]
    assert not places, f"kernel{seed} {LEVELS[unit]}: {len(wrong)} differ\n" + "\n".join(places)
    np.testing.assert_array_equal(counts, right_counts)


OPERATIONS = random_kernels.operations()
OPERATION_BLOCKS = 40


@pytest.fixture(scope="module", params=["L.gid", "block"])
def operations(request, tmp_path_factory):
    """Operands of each lane's own, and operands that all lanes share."""
    toolchain.need("clang++-19", "ld.lld-19")
    toolchain.simulator()
    folder = tmp_path_factory.mktemp("operations")
    library = compiled(random_kernels.operations_unit(request.param), "-O2", folder / "unit")
    right = [on_host(library, i, 64, 1, OPERATION_BLOCKS)[0] for i in range(len(OPERATIONS))]
    launches = [
        simulator.Launch(
            f"kernel{i}", [inputs(i), np.zeros_like(right[i]), counters()], (OPERATION_BLOCKS, 1, 1)
        )
        for i in range(len(OPERATIONS))
    ]
    return right, simulator.run(folder / "unit" / "kernels.co", launches, folder), request.param


@pytest.mark.parametrize("i", range(len(OPERATIONS)))
def test_each_operation_of_the_grammar(operations, i):
    right, result, whose = operations[0][i], operations[1][i], operations[2]
    assert result.fault is None, result.fault
    data, out, _ = result.buffers
    wrong = np.argwhere(out != right)[:, 0]
    words = data.reshape(-1, 8)
    places = [
        f"item {k} words {[hex(w) for w in words[(k if whose == 'L.gid' else k // 64) % len(words)]]}:"
        f" {int(out[k, 0]):#x} expected {int(right[k, 0]):#x}"
        for k in wrong[:6]
    ]
    assert not places, f"{' '.join(OPERATIONS[i])}: {len(wrong)} differ\n" + "\n".join(places)
