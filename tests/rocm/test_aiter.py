"""The fused MoE kernels of the real amd-aiter wheel, on a simulated device, against NumPy.

Each kernel quantises activated rows once more before the second product. The oracle does so too, which leaves
the roundings of bfloat16; an oracle that does not shows what that quantisation costs. docs/rocm.md says what
was found.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from tests.rocm import aiter, simulated
from tests.rocm.launch_kernel import Launch

CODE = simulated.AITER / "aiter_meta" / "hsa" / "gfx942"
FP8 = np.dtype(ml_dtypes.float8_e4m3fnuz)
BF16 = np.dtype(ml_dtypes.bfloat16)
INT8 = np.dtype(np.int8)
BLOCK = aiter.QUANTISATION_BLOCK

# Relative errors, in the 2-norm. Against the oracle that quantises as the kernel does: the output is a sum of
# bfloat16 numbers, each rounded. Against the one that does not: an fp8 number is off by up to 1/16, and int8
# kernels round towards zero.
ROUNDING = 0.006
QUANTISING = 0.04


@dataclass(frozen=True)
class Call:
    """A kernel's arguments, and its results without and with the quantisation between the products."""

    arguments: aiter.Arguments
    plain: np.ndarray
    quantised: np.ndarray


@dataclass(frozen=True)
class Kernel:
    """A code object, the number of columns of I that a workgroup has, and how to call it."""

    code: str
    tile: int
    gated: bool
    call: Callable[[aiter.Problem, int], Call]
    # Waves use the same LDS without a barrier, so results are right only while they keep in step.
    races: bool = False


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gated_silu(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x, 2)
    return aiter.silu(gate) * up


def requantise(row: np.ndarray, dtype: np.dtype, block: int) -> np.ndarray:
    """What is left of a row after each block of it was quantised; to integers by cutting off."""
    blocks = row.reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / aiter.LARGEST[dtype]
    values = np.trunc(blocks / scale) if dtype == INT8 else (blocks / scale).astype(dtype).astype(np.float64)
    return (values * scale).reshape(row.shape)


def smooth_quant(dtype: np.dtype) -> Callable[[aiter.Problem, int], Call]:
    """multix: each pair has a row of its own, made smooth for its expert; activated rows are made so too."""

    def call(problem: aiter.Problem, tile: int) -> Call:
        tokens, hidden = problem.tokens.shape
        rng = np.random.default_rng(0)
        before = rng.uniform(0.5, 1.5, (len(problem.w1), hidden)).astype(np.float32)
        between = rng.uniform(0.5, 1.5, (len(problem.w1), problem.intermediate)).astype(np.float32)
        rows = np.concatenate([problem.tokens * before[experts] for experts in problem.experts.T])
        quantised = [aiter.per_row(array, dtype) for array in (rows, problem.w1, problem.w2)]
        rows, w1, w2 = (q.dequantised() for q in quantised)
        rows = rows.reshape(problem.top_k, tokens, hidden)

        def reference(after: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            return aiter.reference(
                problem, rows, w1, w2, gated_silu, lambda row, expert: after(row * between[expert])
            )

        scales = tuple(np.ascontiguousarray(q.scale[..., 0]) for q in quantised)
        arguments = aiter.Arguments.of(problem, *(q.values for q in quantised), scales, between)
        return Call(
            arguments, reference(lambda row: row), reference(lambda row: requantise(row, dtype, tile))
        )

    return call


def block_scale(problem: aiter.Problem, tile: int) -> Call:
    """Scales of 128 elements of a row and of 128 x 128 of a matrix."""
    del tile
    tokens = aiter.quantise(problem.tokens, FP8, (1, BLOCK))
    w1, w2 = (aiter.quantise(array, FP8, (1, BLOCK, BLOCK)) for array in (problem.w1, problem.w2))
    rows = np.broadcast_to(tokens.dequantised(), (problem.top_k, *problem.tokens.shape))

    def reference(after: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        matrices = (w1.dequantised(), w2.dequantised())
        return aiter.reference(problem, rows, *matrices, gated_silu, lambda row, _: after(row))

    # The kernel wants the rows' scales as [H / 128, M].
    scales = (np.ascontiguousarray(tokens.scale.T), w1.scale, w2.scale)
    arguments = aiter.Arguments.of(problem, tokens.values, w1.values, w2.values, scales)
    return Call(arguments, reference(lambda row: row), reference(lambda row: requantise(row, FP8, BLOCK)))


def not_quantised(problem: aiter.Problem, tile: int) -> Call:
    """bfloat16 without a gate, which has the activation gelu by tanh."""
    del tile
    tokens, w1, w2 = (array.astype(BF16) for array in (problem.tokens, problem.w1, problem.w2))
    rows = np.broadcast_to(tokens.astype(np.float64), (problem.top_k, *tokens.shape))

    def reference(after: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        matrices = (w1.astype(np.float64), w2.astype(np.float64))
        return aiter.reference(problem, rows, *matrices, gelu, lambda row, _: after(row))

    arguments = aiter.Arguments.of(problem, tokens, w1, w2)
    rounded = reference(lambda row: row.astype(BF16).astype(np.float64))
    return Call(arguments, reference(lambda row: row), rounded)


KERNELS = {
    **{
        f"{name}_multix_{tile}": Kernel(
            f"fmoe_{name}_g1u1_multix_subGU_{tile}.co", tile, True, smooth_quant(dtype)
        )
        for name, dtype in (("fp8", FP8), ("int8", INT8))
        for tile in (128, 256, 512)
    },
    "fp8_blockscale": Kernel(
        "fmoe/fmoe_fp8_blockscale_g1u1_subGU_256.co", 256, True, block_scale, races=True
    ),
    "bf16": Kernel("fmoe_b16.co", 512, False, not_quantised, races=True),
}


@pytest.fixture
def launch(tmp_path):
    """Launches a kernel on a simulated device and gives its output."""

    def run(kernel: Kernel, call: Call, **more: str) -> np.ndarray:
        arrays, values = call.arguments.arrays, call.arguments.values
        output = arrays["O"]
        grid = (-(-values["hdim"] // kernel.tile), len(arrays["SEP"]), 1)
        given, result = tmp_path / "launch.pickle", tmp_path / "result"
        given.write_bytes(pickle.dumps(Launch(CODE / kernel.code, grid, 256, arrays, values, "O")))
        simulated.run(simulated.PYTHON, "-m", "tests.rocm.launch_kernel", given, result, **more)
        return np.frombuffer(result.read_bytes(), output.dtype).reshape(output.shape).astype(np.float64)

    return run


def error(result: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def in_step(kernel: Kernel) -> dict[str, str]:
    return {"ROCM_SIM_TURN": "1"} if kernel.races else {}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(16, 2, 1), (33, 4, 2), (64, 5, 4)])
def test_the_layer(launch, name, tokens, experts, top_k):
    kernel = KERNELS[name]
    shape = {"tokens": tokens, "experts": experts, "top_k": top_k, "gated": kernel.gated}
    call = kernel.call(aiter.draw(hidden=1024, intermediate=2 * kernel.tile, **shape), kernel.tile)
    result = launch(kernel, call, **in_step(kernel))
    assert error(result, call.quantised) < ROUNDING
    assert error(result, call.plain) < QUANTISING


@pytest.mark.parametrize("name", KERNELS)
def test_a_missing_barrier_is_a_fault_where_asked_to_check(launch, name):
    kernel = KERNELS[name]
    shape = {"tokens": 16, "experts": 2, "top_k": 1, "gated": kernel.gated}
    call = kernel.call(aiter.draw(hidden=512, intermediate=kernel.tile, **shape), kernel.tile)
    if not kernel.races:
        launch(kernel, call, ROCM_SIM_CHECK_RACES="1")
        return
    with pytest.raises(AssertionError, match=r"of LDS, which wave \d has \w+ and no barrier since"):
        launch(kernel, call, ROCM_SIM_CHECK_RACES="1")


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate"),
    [("fp8_blockscale", 768, 512), ("bf16", 640, 512), ("bf16", 512, 768)],
)
def test_sizes_that_give_wrong_numbers(launch, name, hidden, intermediate):
    # Nothing in the kernels or their host code refuses these: whoever calls them must.
    kernel = KERNELS[name]
    shape = {"tokens": 16, "experts": 3, "top_k": 2, "gated": kernel.gated}
    call = kernel.call(aiter.draw(hidden=hidden, intermediate=intermediate, **shape), kernel.tile)
    assert error(launch(kernel, call, **in_step(kernel)), call.plain) > 10 * QUANTISING
