"""experts="aiter" on simulated devices: AITER's kernels on rows, against NumPy.

The block-scale kernel lacks a barrier (docs/rocm.md): its results are right while waves keep in step.
"""

import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep.aiter import kernels
from tests.rocm import aiter_experts_cases as cases
from tests.rocm import aiter_oracle as oracle
from tests.rocm import simulated

SCHEMES = tuple(kernels.KERNELS)
# As in test_aiter.py: roundings of bfloat16. Gradients are made of bfloat16 products.
ROUNDING = 0.006
GRADIENT_ROUNDING = 0.02


@pytest.fixture
def run(on_rocm):
    # XLA records every call that it can, so that replaying is tested.
    flags = f"{simulated.XLA_FLAGS} --xla_gpu_graph_min_graph_size=1"
    return functools.partial(
        on_rocm,
        JAX_MORIEP_LIB_DIR=str(simulated.LIBRARY),
        JAX_MORIEP_AITER_DIR=str(simulated.AITER),
        XLA_FLAGS=flags,
    )


def in_step(scheme):
    return {"ROCM_SIM_TURN": "1"} if kernels.KERNELS[scheme][0].races else {}


def error(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def wanted(scheme, block, case):
    hidden, inner = case[4][0].shape[1:]
    kernel = kernels.choose(scheme, hidden, inner)
    assert isinstance(kernel, kernels.Kernel)
    return oracle.experts(scheme, kernel.tile, block, *case)


# Experts without rows, with one, with whole blocks and with more; blocks smaller and larger than AITER's 32.
SIZES = [([5, 0, 40, 1], 8), ([33, 64, 0], 128), ([0, 0, 96], 32), ([0, 0], 16), ([70], 2)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("memory", ["0", "1"])
def test_rows_of_all_shapes(run, scheme, memory):
    made = [
        (block, cases.draw(scheme, sizes, hidden=512, inner=512, block=block)[:5]) for sizes, block in SIZES
    ]
    came = run(cases.forward, scheme, made, 3, ROCM_SIM_ADVERSARIAL_MEMORY=memory, **in_step(scheme))
    for (block, case), (first, *others) in zip(made, came, strict=True):
        want = wanted(scheme, block, case)
        assert not first[want == 0].any()
        if not want.any():
            continue
        assert error(first, want) < ROUNDING
        for other in others:
            assert error(other, first) < ROUNDING


# (hidden size, intermediate size).
EDGES = {
    "fp8_block": [(1024, 256), (1536, 768)],
    "fp8_token": [
        *((512, tile) for tile in (128, 192, 256, 320, 384, 448, 1536)),
        *((768, tile) for tile in (128, 256, 512)),
    ],
    "int8_token": [
        *((512, tile) for tile in (128, 192, 256, 320, 384, 448, 1536)),
        *((768, 640), (1280, 896)),
    ],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sizes_at_the_edges_of_what_kernels_can(run, scheme):
    made = [
        (16, cases.draw(scheme, [3, 40], hidden=hidden, inner=inner, block=16)[:5])
        for hidden, inner in EDGES[scheme]
    ]
    came = run(cases.forward, scheme, made, deadline=300, **in_step(scheme))
    for (block, case), (found,) in zip(made, came, strict=True):
        assert error(found, wanted(scheme, block, case)) < ROUNDING, case[4][0].shape


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_with_an_infinity_is_nan_and_no_other(run, scheme):
    drawn: tuple = cases.draw(scheme, [5, 20], hidden=512, inner=256, block=16)
    rows, *rest = drawn[:5]
    rows[18, 100] = np.inf
    ((found,),) = run(cases.forward, scheme, [(16, (rows, *rest))], **in_step(scheme))
    assert np.isnan(found).any(axis=1).tolist() == [i == 18 for i in range(len(rows))]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients(run, scheme):
    *case, d_out = cases.draw(scheme, [5, 0, 40], hidden=512, inner=256, block=16)
    out, d_rows, d_weights = run(cases.forward_and_backward, scheme, 16, *case, d_out, **in_step(scheme))
    want = oracle.gradients(scheme, 16, *case, d_out)
    assert error(out, wanted(scheme, 16, case)) < ROUNDING
    assert error(d_rows, want.rows) < GRADIENT_ROUNDING
    assert error(d_weights, want.weights) < GRADIENT_ROUNDING


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if not kernels.KERNELS[name][0].races])
def test_no_wave_reads_what_another_is_not_done_with(run, scheme):
    # For XLA and our kernels too.
    case = cases.draw(scheme, [5, 40], hidden=512, inner=512, block=16)[:5]
    checks = {"ROCM_SIM_CHECK_RACES": "1", "ROCM_SIM_CHECK_UNINITIALISED": "1"}
    ((found,),) = run(cases.forward, scheme, [(16, case)], **checks)
    assert error(found, wanted(scheme, 16, case)) < ROUNDING


def test_int8_codes_are_those_of_a_division(run):
    """For all quotients of two bfloat16 that are not below 1/1000: no division is made."""
    rng = np.random.default_rng(3)
    rows = []
    for largest in range(128, 256):
        smaller = (np.arange(128, 256) * np.exp2(-np.arange(11.0))[:, None]).ravel()
        smaller = rng.permutation(smaller[smaller <= largest])
        smaller = np.pad(smaller, (0, -len(smaller) % 511)).reshape(-1, 511)
        row = np.concatenate([np.full((len(smaller), 1), largest), smaller], axis=1)
        rows.append(row * rng.choice([-1, 1], row.shape) * np.exp2(rng.integers(-100, 110)))
    rows = np.concatenate(rows).astype(jnp.bfloat16)
    ((codes, scales),) = run(cases.codes_and_scales, "int8_token", [rows])
    values = rows.astype(np.float32)
    step = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    np.testing.assert_array_equal(scales, step[:, 0])
    np.testing.assert_array_equal(codes.view(np.int8), np.rint(values / step).astype(np.int8))


@pytest.mark.parametrize("scheme", ["fp8_token", "int8_token"])
def test_codes_of_rows_of_all_lengths(run, scheme):
    """A lane holds one to eight parts of a row, and of a longer one reads all twice."""
    rng = np.random.default_rng(4)
    made = [
        (rng.normal(size=(5, hidden)) * np.exp2(rng.integers(-60, 60, (5, 1)))).astype(jnp.bfloat16)
        for hidden in (512, 1280, 2304, 4352, 8192, 9216)
    ]
    for rows, (codes, scales) in zip(made, run(cases.codes_and_scales, scheme, made), strict=True):
        dtype = np.dtype(np.int8) if scheme == "int8_token" else oracle.FP8
        values = codes.view(dtype).astype(np.float64) * scales[:, None]
        np.testing.assert_array_equal(values, oracle.quantised_rows(rows, scheme))


# What Python does not let through, or does not give: the handler has its own eyes.
CHANGES = {
    r"hidden_size=512 and intermediate_size=256 are none of those that AITER's kernel fmoe_\S+ gets right": {
        "tile": 192
    },
    "scheme=fp4 is none of AITER's": {"scheme": "fp4"},
    "AITER's kernel another is not loaded on device 0; call jm.initialize": {"kernel": "another"},
    "must have two dimensions, and block=0 be at least 1": {"block": 0},
    "w1 must be int8": {"w1": np.zeros((1, 512, 512), np.float32)},
    r"w1_scale has shape \[1, 4\] but must be \[1, 512\]": {"w1_scale": np.ones((1, 4), np.float32)},
    r"group_sizes has shape \[2\] but must be \[1\]": {"group_sizes": np.zeros(2, np.int32)},
}


def test_the_handlers_refusals(run):
    for text, said in zip(CHANGES, run(cases.refusals, "int8_token", list(CHANGES.values())), strict=True):
        assert re.search(text, str(said)), said


def test_sizes_that_make_no_sense_reach_no_memory(run):
    drawn: tuple = cases.draw("fp8_token", [5, 40], hidden=512, inner=256, block=16)
    rows, weights, _, *coded = drawn[:5]
    senseless = ([-5, 10], [2**31 - 1, 2**31 - 1], [1000, 7])
    made = [(16, (rows, weights, np.int32(sizes), *coded)) for sizes in senseless]
    for (found,) in run(cases.forward, "fp8_token", made):
        assert found.shape == rows.shape


# Devices, tokens of each, experts, top_k, and whether tokens are masked or all go to one expert.
LAYERS = [
    (1, 40, 6, 2, "plain"),
    (2, 33, 8, 3, "masked"),
    (2, 0, 4, 2, "plain"),
    (4, 9, 10, 2, "plain"),
    (2, 40, 4, 1, "all to one"),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layer_over_native(run, scheme):
    # What differs between layers is before the kernels, and the same for all schemes.
    for devices, tokens, experts, top_k, kind in LAYERS if scheme == "fp8_token" else LAYERS[:2]:
        sizes = {"tokens": tokens * devices, "experts": experts, "top_k": top_k, "kind": kind}
        found = run(cases.layer, scheme, sizes, devices=devices, **in_step(scheme))
        assert found.y.shape == found.x.shape
        if tokens:
            assert error(found.y, layer_wanted(scheme, found)) < ROUNDING


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layers_gradients_over_native(run, scheme):
    sizes = {"tokens": 24, "experts": 4, "top_k": 2, "kind": "plain"}
    ours, plain = run(cases.layer_gradients, scheme, sizes, devices=2, deadline=300, **in_step(scheme))
    for found, want in zip(ours, plain, strict=True):
        # The other implementation quantises activated rows otherwise, and has other products.
        assert error(found, want) < 0.05


def test_what_explain_says(run):
    block, token = map(str, run(cases.explained))
    assert "fmoe_bf16_blockscaleFp8_g1u1_novs_silu_1tg_32x256" in block
    assert "a barrier is missing in this kernel" in block
    assert "fmoe_bf16_pertokenFp8_g1u1_vs_silu_1tg_32x512" in token
    assert "barrier" not in token


def layer_wanted(scheme, found):
    """The layer as the sum of its experts, each on the rows of its own tokens."""
    inner = found.w2[0].shape[2]
    kernel = kernels.choose(scheme, found.x.shape[1], inner)
    assert isinstance(kernel, kernels.Kernel)
    y = np.zeros(found.x.shape)
    for k in range(found.ids.shape[1]):
        order = np.argsort(found.ids[:, k], kind="stable")
        order = order[found.ids[order, k] >= 0]
        sizes = np.bincount(found.ids[order, k], minlength=len(found.w1[0]))
        routed = (found.x[order], found.weights[order, k], sizes, found.w1, found.w2)
        y[order] += oracle.experts(scheme, kernel.tile, 1, *routed)
    return y
