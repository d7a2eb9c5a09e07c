"""The grouped products that jax ships as examples for Hopper GPUs."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax

from jax_moriep.bench.against.grouped import Product, Ready, Unavailable, of_jax, operands_of
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.measure.programs import on_device
from jax_moriep.bench.measure.turns import in_a_row
from jax_moriep.bench.problem.shares import Compact, Data
from jax_moriep.runtime import compat

# Rows and columns of a tile, depth, steps in flight, and tiles of columns before the next of rows.
HOPPER_MANY = ((128, 128, 64, 4, 8), (128, 128, 64, 5, 8))
_HOPPER_FEW = ((64, 128, 64, 6, 8), (64, 128, 128, 4, 8), (64, 256, 64, 4, 4), (128, 128, 64, 4, 8))
HOPPER_DW = ((128, 128, 64, 4, 8), (128, 128, 64, 5, 1))


def jax_hopper(name: str, data: Data, compact: Compact, pool: Pool) -> Ready:
    """The grouped products that jax ships as examples for Hopper; the fastest of some tiles."""
    dot, dot_transposed = hopper_dots()
    operands = operands_of(data, compact)
    sizes, w1 = operands[3:5]
    pre = jax.random.normal(jax.random.key(4), (data.share.rows, w1.shape[1]), w1.dtype)

    def products(rows: Any, dw: Any) -> Product:
        return hopper_product(dot, dot_transposed, rows, dw)

    candidates = _HOPPER_FEW if data.share.decode else HOPPER_MANY
    rows, tried = _fastest(
        (name, "jax_hopper rows"),
        candidates,
        lambda c: products(c, None),
        (compact.rows, w1, sizes),
        pool,
    )
    settings: dict[str, Any] = {"rows": rows, "rows_tried_ms": tried}
    dw = None
    if not data.share.decode:
        dw, settings["dw_tried_ms"] = _fastest(
            (name, "jax_hopper dw"),
            HOPPER_DW,
            lambda c: lambda d, x, s: dot_transposed(d, x, group_sizes=s, **_tiles(c, x.shape[1])),
            (pre, compact.rows, sizes),
            pool,
        )
        settings["dw"] = dw
    return of_jax((name, "jax_hopper"), products(rows, dw), operands, pool, settings)


def hopper_dots() -> tuple[Any, Any]:
    """jax's two kernels: of rows, and of a weight gradient.

    Raises:
      Unavailable: they are not there, or cannot run.
    """
    if not compat.has_hopper_kernels():
        raise Unavailable("it needs a Hopper GPU and jax 0.11")
    package = "jax.experimental.pallas.ops.gpu"
    try:
        rows = importlib.import_module(f"{package}.ragged_dot_mgpu")
        transposed = importlib.import_module(f"{package}.transposed_ragged_dot_mgpu")
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return rows.ragged_dot, transposed.transposed_ragged_dot


def hopper_product(dot: Any, dot_transposed: Any, rows_tiles: Any, dw_tiles: Any) -> Product:
    """A product with weights [L, out, in] and its derivative, of jax's two kernels."""

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return dot(x, w, group_sizes=sizes, transpose_rhs=True, **_tiles(rows_tiles, w.shape[1]))

    def backward(saved: Any, d: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        x, w, sizes = saved
        d_x = dot(d, w, group_sizes=sizes, transpose_rhs=False, **_tiles(rows_tiles, w.shape[2]))
        d_w = dot_transposed(d, x, group_sizes=sizes, **_tiles(dw_tiles, x.shape[1]))
        return d_x, d_w, None

    product.defvjp(lambda x, w, sizes: (product(x, w, sizes), (x, w, sizes)), backward)
    return product


def _tiles(tiles: tuple[int, ...], cols: int) -> dict[str, int]:
    rows, width, depth, steps, group = tiles
    return {
        "block_m": rows,
        "block_n": width,
        "block_k": depth,
        "max_concurrent_steps": steps,
        "grid_block_n": math.gcd(group, max(1, cols // width)),
    }


def _fastest(
    key: Any,
    candidates: tuple[tuple[int, ...], ...],
    fn_of: Callable[[tuple[int, ...]], Callable[..., Any]],
    operands: tuple[jax.Array, ...],
    pool: Pool,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The fastest candidate, and the milliseconds of each or why it cannot run."""
    for candidate in candidates:
        pool.start((key, candidate), on_device(fn_of(candidate), operands))
    pool.wait()
    tried: dict[str, Any] = {}
    seconds: dict[tuple[int, ...], float] = {}
    for candidate in candidates:
        label = "x".join(map(str, candidate))
        try:
            call = functools.partial(pool.get((key, candidate)).begin, *operands)
            seconds[candidate] = min(in_a_row(call, 5), in_a_row(call, 5))
            tried[label] = seconds[candidate] * 1e3
        except Exception as error:  # noqa: BLE001
            tried[label] = repr(error)[:300]
    if not seconds:
        raise Unavailable(f"no tiles could run: {tried}")
    return min(seconds, key=lambda candidate: seconds[candidate]), tried
