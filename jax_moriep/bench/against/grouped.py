"""Others' grouped products in ``bench kernels``: the same MLP by each, on rows that have no padding.

Each has the weights in the layout that it takes without a copy, and sizes of its tiles that suit it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.bench.against import ragged, torch_mlp
from jax_moriep.bench.kinds.products import with_gradients
from jax_moriep.bench.measure.programs import Programs, Timed, bound, seconds_of
from jax_moriep.bench.problem.shares import Compact, Data
from jax_moriep.runtime import compat

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(rows, weights, group sizes) -> rows; it has a derivative."""


class Unavailable(Exception):
    """A baseline cannot run here; the text says why."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """A baseline that can run.

    Attributes:
      run: by whether with gradients: does the work once; ``jax.block_until_ready`` waits for what it gives.
      results: of what ``run`` gave: the result and gradients in this package's layout.
      timed: by whether with gradients, and how many times.
      settings: what was chosen for it.
    """

    run: Callable[[bool], Any]
    results: Callable[[Any], tuple[jax.Array, ...]]
    timed: Callable[[bool, int], Timed]
    settings: dict[str, Any]


def mlp(product: Product) -> Callable[..., jax.Array]:
    """fn(rows, factors, sizes, w1, w2); what is between the products XLA fuses into one pass."""

    def forward(rows: Any, factors: Any, sizes: Any, w1: Any, w2: Any) -> jax.Array:
        gate, up = jnp.split(product(rows, w1, sizes).astype(jnp.float32), 2, axis=1)
        act = (jax.nn.silu(gate) * up * factors[:, None]).astype(rows.dtype)
        return product(act, w2, sizes)

    return forward


def _of_jax(
    key: Any,
    product: Product,
    operands: tuple[jax.Array, ...],
    programs: Programs,
    settings: dict[str, Any],
    *,
    on_gpu: bool = False,
    swapped: bool = False,
) -> Ready:
    """Begins to compile; ``swapped`` weights are [L, in, out]."""
    fns = {backward: with_gradients(mlp(product), backward) for backward in (False, True)}

    def start(backward: bool, times: int | None) -> Any:
        programs.start((key, backward, times), fns[backward], operands, times, on_gpu=on_gpu)
        return (key, backward, times)

    def results(raw: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return (*raw[:3], *(jnp.swapaxes(x, 1, 2) if swapped else x for x in raw[3:]))

    start(False, None)
    return Ready(
        lambda backward: programs.get(start(backward, None))(*operands),
        results,
        # Once is what was compiled for the check.
        lambda backward, times: bound(
            programs.get(start(backward, times if times > 1 else None)), operands, times
        ),
        settings,
    )


def _operands(data: Data, compact: Compact) -> tuple[jax.Array, ...]:
    return (compact.d_out, compact.rows, compact.factors, *data.operands[2:])


def ragged_dot(name: str, data: Data, compact: Compact, programs: Programs) -> Ready:
    """``lax.ragged_dot_general``."""
    key = (name, "ragged_dot")
    return _of_jax(key, ragged.product, _operands(data, compact), programs, {}, on_gpu=True)


def torch(name: str, data: Data, compact: Compact, programs: Programs) -> Ready:
    """torch's grouped matmul, on the same memory."""
    del name, programs
    try:
        work = torch_mlp.Mlp(*_operands(data, compact))
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return Ready(
        work.run,
        torch_mlp.as_jax,
        lambda backward, times: Timed(lambda: work.repeat(backward, times), times),
        work.settings,
    )


# Rows and columns of a tile, depth, steps in flight, and tiles of columns before the next of rows.
HOPPER_MANY = ((128, 128, 64, 4, 8), (128, 128, 64, 5, 8))
_HOPPER_FEW = ((64, 128, 64, 6, 8), (64, 128, 128, 4, 8), (64, 256, 64, 4, 4), (128, 128, 64, 4, 8))
HOPPER_DW = ((128, 128, 64, 4, 8), (128, 128, 64, 5, 1))


def jax_hopper(name: str, data: Data, compact: Compact, programs: Programs) -> Ready:
    """The grouped products that jax ships as examples for Hopper; the fastest of some tiles."""
    dot, dot_transposed = hopper_dots()
    operands = _operands(data, compact)
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
        programs,
    )
    settings: dict[str, Any] = {"rows": rows, "rows_tried_ms": tried}
    dw = None
    if not data.share.decode:
        dw, settings["dw_tried_ms"] = _fastest(
            (name, "jax_hopper dw"),
            HOPPER_DW,
            lambda c: lambda d, x, s: dot_transposed(d, x, group_sizes=s, **_tiles(c, x.shape[1])),
            (pre, compact.rows, sizes),
            programs,
        )
        settings["dw"] = dw
    return _of_jax((name, "jax_hopper"), products(rows, dw), operands, programs, settings)


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
    programs: Programs,
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The fastest candidate, and the milliseconds of each or why it cannot run."""
    for candidate in candidates:
        programs.start((key, candidate), fn_of(candidate), operands, None)
    programs.wait()
    tried: dict[str, Any] = {}
    seconds: dict[tuple[int, ...], float] = {}
    for candidate in candidates:
        label = "x".join(map(str, candidate))
        try:
            call = functools.partial(programs.get((key, candidate)), *operands)
            seconds[candidate] = min(seconds_of(call, 5), seconds_of(call, 5))
            tried[label] = seconds[candidate] * 1e3
        except Exception as error:  # noqa: BLE001
            tried[label] = repr(error)[:300]
    if not seconds:
        raise Unavailable(f"no tiles could run: {tried}")
    return min(seconds, key=lambda candidate: seconds[candidate]), tried


# What the package's own table of tuned sizes has for an H100 and nearly all large products: rows of a tile,
# steps in flight, whether programs stay, the dimension that changes fastest, and the width of its tiles.
_TOKAMAX_MANY = (128, 4, True, 1, 8)
_TOKAMAX_FEW = (64, 4, False, 1, 8)
_TOKAMAX_DW = (128, 2, False, 0, 1)


def tokamax(name: str, data: Data, compact: Compact, programs: Programs) -> Ready:
    """tokamax's Mosaic kernel with its own derivative, and with weights [L, in, out], as it wants them."""
    if not compat.has_hopper_kernels():
        raise Unavailable("it needs a Hopper GPU and jax 0.11")
    rows = _TOKAMAX_FEW if data.share.decode else _TOKAMAX_MANY
    try:
        product = tokamax_product(rows, _TOKAMAX_DW)
    except ImportError as error:
        raise Unavailable(str(error)) from error
    *others, w1, w2 = _operands(data, compact)
    swapped = tuple(jax.jit(lambda x: jnp.swapaxes(x, 1, 2))(w) for w in (w1, w2))
    settings = {"rows": rows, "dw": _TOKAMAX_DW}
    return _of_jax((name, "tokamax"), product, (*others, *swapped), programs, settings, swapped=True)


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


BASELINES: dict[str, Callable[[str, Data, Compact, Programs], Ready]] = {
    "torch": torch,
    "ragged_dot": ragged_dot,
    "jax_hopper": jax_hopper,
    "tokamax": tokamax,
}
