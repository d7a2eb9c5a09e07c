"""The Hopper products, lowered on a machine without such a GPU: layouts, copies, shapes that Mosaic takes."""

import jax
import jax.numpy as jnp
import pytest

if jax.__version_info__ < (0, 11):
    pytest.skip("Pallas-Mosaic has these kernels from jax 0.11 on", allow_module_level=True)

from jax_moriep.experts import ExpertSpec
from jax_moriep.experts.pallas import table, tiles
from jax_moriep.experts.pallas.hopper import act_grad, products, tf32
from jax_moriep.experts.pallas.hopper.support import ROWS
from jax_moriep.experts.pallas.hopper.weight_gradient import weight_gradient
from jax_moriep.experts.pallas.tiles import real_rows, row_tiles
from jax_moriep.plan import run_starts

L, C = 4, 1024
# DeepSeek-V3's and gpt-oss's kinds of sizes, and those whose rows are swizzled in 64 and in 32 bytes.
SIZES = [
    ("bfloat16", 512, 256, 128),
    ("bfloat16", 576, 320, 64),
    ("float16", 416, 288, 32),
    ("bfloat16", 208, 272, 32),
]
# Of f32, 64 bytes are the least that any size gives.
IN_F32 = [("float32", 512, 256, 128), ("float32", 416, 288, 32), ("float32", 208, 272, 96)]


@pytest.fixture(autouse=True)
def _without_tritons_table(monkeypatch):
    """Triton's kernel of the table would have to be told the device, and is lowered in another file."""
    monkeypatch.setattr(tiles, "table_of", table.formula)


def lowers(fn, *shapes):
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    text = jax.jit(fn).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1


@pytest.mark.parametrize(("dtype", "hidden", "inner", "block"), SIZES + IN_F32)
@pytest.mark.parametrize("biased", [False, True])
def test_forward(dtype, hidden, inner, block, biased):
    spec = ExpertSpec("swiglu_clamped", 7.0, 1.702, False, block)

    def fn(sizes, factors, rows, w1, w2, b1, b2):
        tiles, b1, bias = (
            row_tiles(sizes, block, C, ROWS),
            b1 if biased else None,
            (factors, b2) if biased else None,
        )
        act, saved = products.gate_up(rows, w1, factors, tiles, spec, saved_rows=C // 2, act=True, bias=b1)
        return products.product(act, w2, tiles, by_column=False, bias=bias), saved

    matrices = [(C, hidden), (L, 2 * inner, hidden), (L, hidden, inner), (L, 2 * inner), (L, hidden)]
    lowers(fn, ((L,), "int32"), ((C,), "float32"), *((shape, dtype) for shape in matrices))


@pytest.mark.parametrize(("dtype", "hidden", "inner", "block"), SIZES)
@pytest.mark.parametrize("unclean", ["left", "right"])
def test_backward(dtype, hidden, inner, block, unclean):
    def fn(sizes, d_out, w2, rows):
        d_act = products.product(d_out, w2, row_tiles(sizes, block, C, ROWS), by_column=True)
        starts = run_starts(sizes, block)
        return weight_gradient(d_act, rows, starts, sizes, block, dtype, unclean=unclean)

    shapes = [(C, hidden), (L, hidden, inner), (C, hidden)]
    lowers(fn, ((L,), "int32"), *((shape, jnp.dtype(dtype)) for shape in shapes))


@pytest.mark.parametrize("inner", [256, 384])
@pytest.mark.parametrize("kept", [C, C // 2])
def test_activation_gradient(inner, kept):
    spec = ExpertSpec("swiglu_clamped", 7.0, 1.702, False, ROWS)

    def fn(sizes, factors, d_out, w2, *pre):
        tiles = row_tiles(sizes, ROWS, C, ROWS)
        assert act_grad.suits(tiles, w2)
        return act_grad.activation_gradient(d_out, w2, pre, factors, tiles, spec, saved_rows=kept)

    shapes = [(C, 512), (L, 512, inner), (kept, 2 * inner)] + ([(C, 2 * inner)] if kept < C else [])
    lowers(fn, ((L,), "int32"), ((C,), "float32"), *((shape, jnp.bfloat16) for shape in shapes))


@pytest.mark.parametrize(("dtype", "hidden", "inner", "block"), IN_F32)
def test_weight_gradient_of_f32(dtype, hidden, inner, block):
    def fn(sizes, left, right):
        real = real_rows(sizes, block, C)
        turned = (tf32.along_sums(real, x) for x in (left, right))
        return tf32.weight_gradient(*turned, run_starts(sizes, block), sizes)

    lowers(fn, ((L,), "int32"), *(((C, size), jnp.dtype(dtype)) for size in (inner, hidden)))
