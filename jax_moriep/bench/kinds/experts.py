"""``bench experts``: the experts' MLP on each rank's rows, beside a dense matmul chain of the same FLOPs.

Nothing is exchanged here. Every rank has a program of its own over as many rows as it received, and all ranks
run at the same time, as they do in the layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moriep import experts
from jax_moriep.bench.against import ragged
from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem import oracle, patterns
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.names import EXPERTS
from jax_moriep.bench.problem.world import World
from jax_moriep.config import MoEParams
from jax_moriep.errors import ConfigError, rule
from jax_moriep.runtime.place import Place

FORWARD = "forward"
BACKWARD = "forward+backward"
TOLERANCE = {"f32": 1e-4, "bf16": 5e-2, "f16": 5e-3}
"""Largest error, in units of the largest value: two chained sums of thousands of products."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rank has.

    Attributes:
      rank: which one.
      row: i64[N], where its N real rows are, in rising order.
      arrays: rows [C, H], row_weights f32[C], group_sizes i32[L], w1 [L, 2*I, H], w2 [L, H, I] and
        d_out [C, H], the gradient of the result; on the rank's device.
      host: the same on the host.
    """

    rank: int
    row: np.ndarray
    arrays: tuple[jax.Array, ...]
    host: tuple[np.ndarray, ...]


def _share(case: Case, world: World, placed: oracle.Rows, ids: np.ndarray, rank: int) -> Share:
    shape = case.shape
    rng = np.random.default_rng((case.seed, rank))
    row = np.sort(placed.on(rank, ids, shape)[2])

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(case.numpy_dtype)

    rows = np.zeros((shape.capacity, case.hidden), case.numpy_dtype)
    rows[row] = normal((row.size, case.hidden))
    row_weights = np.zeros(shape.capacity, np.float32)
    row_weights[row] = rng.uniform(0.1, 1.0, row.size)
    host = (
        rows,
        row_weights,
        placed.counts_on(rank, shape).astype(np.int32),
        normal((shape.num_local_experts, 2 * case.intermediate, case.hidden), case.hidden**-0.5),
        normal((shape.num_local_experts, case.hidden, case.intermediate), case.intermediate**-0.5),
        normal((shape.capacity, case.hidden)),
    )
    device = world.mesh.devices[rank]
    return Share(rank, row, tuple(jax.device_put(array, device) for array in host), host)


def _program(name: str, operation: str, case: Case, share: Share) -> Callable[[], Any]:
    """One rank's work, to its end."""
    rows, row_weights, group_sizes, w1, w2, d_out = share.arrays
    if name == "dense":
        real = jax.device_put(share.host[0][share.row], rows.device)
        d_real = jax.device_put(share.host[5][share.row], rows.device)
        fn, inputs, cotangent = _dense, (real, w1[0], w2[0]), d_real
    else:
        fn, inputs, cotangent = _experts(name, case, share), (rows, row_weights, w1, w2), d_out

    # The sizes are an operand: as constants they would tell the compiler what no real program knows.
    def forward(sizes: jax.Array, cotangent: jax.Array, *inputs: jax.Array) -> Any:
        del cotangent
        return fn(sizes, *inputs)

    def backward(sizes: jax.Array, cotangent: jax.Array, *inputs: jax.Array) -> Any:
        out, pull = jax.vjp(functools.partial(fn, sizes), *inputs)
        return out, pull(cotangent)

    compiled = jax.jit(forward if operation == FORWARD else backward)
    return lambda: jax.block_until_ready(compiled(group_sizes, cotangent, *inputs))


def _experts(name: str, case: Case, share: Share) -> Callable[..., jax.Array]:
    """fn(group_sizes, rows, row_weights, w1, w2) -> [C, H]."""
    shape = case.shape
    if name == "ragged_dot":
        # As few rows as this rank has: no program whose shapes are fixed before the routing could do better.
        return lambda sizes, rows, weights, w1, w2: ragged.expert_mlp(
            rows, weights, sizes, w1, w2, shape.block, max(1, share.row.size)
        )
    cfg, place = case.config(experts=name), Place(jax.default_backend())

    def fn(sizes: jax.Array, rows: jax.Array, weights: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
        nothing: Any = None
        params = MoEParams(router=nothing, w1=w1, w2=w2)
        given = experts.Rows(rows, weights, sizes, shape.block)
        return experts.mlp_at(place, given, params, cfg, saved_rows=experts.saved_rows(shape))

    return fn


def _dense(sizes: jax.Array, x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """x [N, H], w1 [2*I, H], w2 [H, I]: the same FLOPs, as one expert's."""
    del sizes
    gate, up = jnp.split(x @ w1.T, 2, axis=1)
    return (jax.nn.silu(gate) * up) @ w2.T


def _check(name: str, operation: str, case: Case, data: list[Share], results: list[Any]) -> list[Check]:
    """Compares each rank's fullest and emptiest expert, and its padding, with the oracle."""
    checks = []
    for share, result in zip(data, results, strict=True):
        rows, row_weights, group_sizes, w1, w2, d_out = share.host
        out, gradients = (result, None) if operation == FORWARD else result
        out = np.asarray(out)

        def compare(what: str, got: Any, want: np.ndarray, rank: int = share.rank) -> None:
            limit = TOLERANCE[case.dtype] * float(np.max(np.abs(want), initial=0.0))
            error = oracle.largest_error(np.asarray(got), want)
            checks.append(Check(name, operation, f"{what} of rank {rank}", error, limit))

        padding = np.ones(rows.shape[0], bool)
        padding[share.row] = False
        compare("padding", out[padding], np.zeros((int(padding.sum()), case.hidden)))
        ends = np.cumsum(group_sizes)
        used = np.flatnonzero(group_sizes)
        by_rows = used[np.argsort(group_sizes[used], kind="stable")]
        for expert in sorted({*by_rows[:1].tolist(), *by_rows[-1:].tolist()}):
            row = share.row[ends[expert] - group_sizes[expert] : ends[expert]]
            weight = row_weights[row, None].astype(np.float64)
            want = oracle.mlp(rows[row], w1[expert], w2[expert], weight * d_out[row].astype(np.float64))
            compare(f"expert {expert}'s rows", out[row], weight * want.y)
            if gradients is None:
                continue
            d_rows, d_weights, d_w1, d_w2 = gradients
            compare(f"expert {expert}'s d_rows", np.asarray(d_rows)[row], want.d_x)
            d_weight = (want.y * d_out[row].astype(np.float64)).sum(axis=1)
            compare(f"expert {expert}'s d_row_weights", np.asarray(d_weights)[row], d_weight)
            compare(f"expert {expert}'s d_w1", d_w1[expert], want.d_w1)
            compare(f"expert {expert}'s d_w2", d_w2[expert], want.d_w2)
    return checks


class Experts(Kind):
    """Every implementation, forward and with its gradients."""

    name = "experts"
    operations = (FORWARD, BACKWARD)
    comparable = (*EXPERTS, "dense")
    compared = ("blocked", "ragged_dot", "dense")
    iterations = (7, 1)
    repeats_on_gpus = 1
    memory_operation = BACKWARD

    def check(self, case: Case) -> None:
        """See ``Kind``."""
        super().check(case)
        if case.repeats > 1:
            cure = "leave out --repeats; `bench kernels` repeats"
            raise ConfigError(rule("repeats", case.repeats, "be 1 for experts", cure))

    def transports(self, case: Case) -> tuple[str, ...]:
        """None: "reference" names experts here."""
        del case
        return ()

    def make_data(self, case: Case, world: World) -> list[Share]:
        """What each rank of this process has after a dispatch."""
        rng = np.random.default_rng(case.seed)
        shape = case.shape
        ids = patterns.PATTERNS[case.routing](rng, case.ranks * case.tokens, case.experts, case.top_k)
        placed = oracle.place_routes(ids, shape)
        return [_share(case, world, placed, ids, rank) for rank in world.ranks]

    def calls(self, case: Case, world: World, data: list[Share]) -> list[Call]:
        """Every implementation, forward and with its gradients."""
        made = []
        for operation in self.operations:
            for name in case.compare:
                programs = [_program(name, operation, case, share) for share in data]
                run = functools.partial(world.together, programs)
                if name == "dense":
                    made.append(Call(name, operation, run))
                else:
                    check = functools.partial(_check, name, operation, case, data)
                    made.append(Call(name, operation, run, check))
        return made
