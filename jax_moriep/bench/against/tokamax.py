"""tokamax's grouped product for Hopper GPUs."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.bench.against.grouped import Product, Ready, Unavailable, of_jax, operands_of
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.problem.shares import Compact, Data
from jax_moriep.runtime import compat

# What the package's own table of tuned sizes has for an H100 and nearly all large products: rows of a tile,
# steps in flight, whether programs stay, the dimension that changes fastest, and the width of its tiles.
TOKAMAX_MANY = (128, 4, True, 1, 8)
_TOKAMAX_FEW = (64, 4, False, 1, 8)
TOKAMAX_DW = (128, 2, False, 0, 1)


def tokamax(name: str, data: Data, compact: Compact, pool: Pool) -> Ready:
    """tokamax's Mosaic kernel with its own derivative, and with weights [L, in, out], as it wants them."""
    if not compat.has_hopper_kernels():
        raise Unavailable("it needs a Hopper GPU and jax 0.11")
    rows = _TOKAMAX_FEW if data.share.decode else TOKAMAX_MANY
    try:
        product = tokamax_product(rows, TOKAMAX_DW)
    except ImportError as error:
        raise Unavailable(str(error)) from error
    *others, w1, w2 = operands_of(data, compact)
    swapped = tuple(jax.jit(lambda x: jnp.swapaxes(x, 1, 2))(w) for w in (w1, w2))
    settings = {"rows": rows, "dw": TOKAMAX_DW}
    return of_jax((name, "tokamax"), product, (*others, *swapped), pool, settings, swapped=True)


def tokamax_product(rows: tuple[Any, ...], dw: tuple[Any, ...]) -> Product:
    """A product with weights [L, in, out] and its derivative; raises ImportError without the package."""
    package = "tokamax._src.ops.ragged_dot"
    base = importlib.import_module(f"{package}.base")
    mosaic = importlib.import_module(f"{package}.pallas_mosaic_gpu")

    def op_of(height: int, steps: int, stays: bool, minor: int, width: int) -> Any:
        config = mosaic.Config(
            block_m=height,
            block_n=64,
            block_k=128,
            num_stages=steps,
            split_k=1,
            persistent=stays,
            grid_minor_dim=minor,
            grid_tile_width=width,
        )
        return mosaic.PallasMosaicGpuRaggedDot(config=config)

    of_rows, of_dw = op_of(*rows), op_of(*dw)
    vjp = functools.partial(base.vjp, dlhs_ragged_dot=of_rows, drhs_ragged_dot=of_dw)
    op = of_rows.replace(vjp=vjp)
    return lambda x, w, sizes: op(x, w, group_sizes=sizes)
