"""The table of grouped products that ``bench kernels`` measures beside the package's."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jax_moriep.bench.against import ragged, torch_mlp
from jax_moriep.bench.against.grouped import Ready, Unavailable, of_jax, operands_of
from jax_moriep.bench.against.hopper import jax_hopper
from jax_moriep.bench.against.tokamax import tokamax
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.problem.shares import Compact, Data


def ragged_dot(name: str, data: Data, compact: Compact, pool: Pool) -> Ready:
    """``lax.ragged_dot_general``."""
    key = (name, "ragged_dot")
    return of_jax(key, ragged.product, operands_of(data, compact), pool, {}, alone=True)


def torch(name: str, data: Data, compact: Compact, pool: Pool) -> Ready:
    """torch's grouped matmul, on the same memory."""
    del name, pool
    try:
        work = torch_mlp.Mlp(*operands_of(data, compact))
    except ImportError as error:
        raise Unavailable(str(error)) from error
    return Ready(
        work.run,
        torch_mlp.as_jax,
        lambda backward, times: functools.partial(work.repeat, backward, times),
        work.settings,
    )


BASELINES: dict[str, Callable[[str, Data, Compact, Pool], Ready]] = {
    "torch": torch,
    "ragged_dot": ragged_dot,
    "jax_hopper": jax_hopper,
    "tokamax": tokamax,
}
