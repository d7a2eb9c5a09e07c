"""``bench exchange``: dispatch and combine over several transports, beside a floor of the same bytes.

The tokens are made and the results are checked on the devices, all of them, whatever their size.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_moriep import exchange, quant
from jax_moriep.bench.against import floors
from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.measure import programs
from jax_moriep.bench.measure.calls import Entry, local_call
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem import formula, oracle, patterns, traffic
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.names import EXCHANGES, FP8, puts, transport_of, wire_of
from jax_moriep.bench.problem.world import AXIS, World
from jax_moriep.plan import Dispatched
from jax_moriep.tuning_options import Tuning

BOTH = "dispatch+combine"
_LARGEST = 1.0
"""Of the tokens' values."""
_FP8_ERROR = 2.0**-4 * 1.01
"""Of a value in float8_e4m3 beside the largest of its group: three bits of mantissa, rounded to nearest."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The tokens of all ranks: x is a formula's, ids and weights are on the host and on the devices."""

    ids: np.ndarray
    weights: np.ndarray
    placed: tuple[jax.Array, jax.Array, jax.Array]


def routes_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(ids i32[R*T, K], weights f32[R*T, K]), the same in every process."""
    return _routes(case.seed, case.routing, case.ranks * case.tokens, case.experts, case.top_k)


@functools.lru_cache(maxsize=4)
def _routes(
    seed: int, routing: str, num_tokens: int, num_experts: int, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = patterns.PATTERNS[routing](rng, num_tokens, num_experts, top_k)
    return ids, rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)


def _iota(size: int, axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.uint32, (size, 1) if axis == 0 else (1, size), axis)


def _calls_of(
    name: str, operations: list[str], case: Case, world: World, data: Data, expected: _Expected
) -> list[Call]:
    tuning = Tuning(native_dispatch="put") if puts(name) else None
    cfg = case.config(transport=transport_of(name), wire=wire_of(name), tuning=tuning)

    def dispatch(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Dispatched:
        return exchange.dispatch(x, ids, weights, cfg, axis_name=AXIS)

    def combine(disp: Dispatched) -> jax.Array:
        return exchange.combine(disp.rows, disp.plan, axis_name=AXIS)

    def both(x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        return combine(dispatch(x, ids, weights))

    def weighted(x: jax.Array, ids: jax.Array, weights: jax.Array) -> Dispatched:
        disp = dispatch(x, ids, weights)
        return dataclasses.replace(disp, rows=disp.rows * disp.row_weights[:, None].astype(disp.rows.dtype))

    # Combine alone takes rows that differ from expert to expert, so that a row that went astray shows.
    before_combine = programs.local(weighted, world.mesh, data.placed, AXIS)
    combine_input = functools.cache(lambda: (before_combine(*data.placed),))
    made = []
    for operation in operations:
        fn: Callable[..., Any] = {BOTH: both, "dispatch": dispatch, "combine": combine}[operation]
        if operation == "combine":
            shapes, operands, others = (before_combine.out_shapes(),), combine_input, (before_combine,)
        else:
            shapes, operands, others = data.placed, lambda: data.placed, ()
        made.append(
            local_call(
                Entry(name, operation, case, world),
                fn,
                shapes,
                operands,
                functools.partial(expected.check, name, operation),
                others,
            )
        )
    return made


class _Expected:
    """What every rank must get."""

    def __init__(self, case: Case, world: World, data: Data) -> None:
        self.world = world
        self.shape = shape = case.shape
        placed = oracle.place_routes(data.ids, shape)
        kept = placed.row_of_route != oracle.DROPPED
        token_of_row = np.full((shape.num_ranks, shape.capacity), -1, np.int32)
        weights = np.zeros(token_of_row.shape, np.float32)
        for rank in range(shape.num_ranks):
            token, k, row = placed.on(rank, data.ids, shape)
            token_of_row[rank, row] = token
            weights[rank, row] = data.weights[token, k]
        factors = {
            BOTH: kept.sum(axis=1),
            "combine": (data.weights * kept).sum(axis=1, dtype=np.float64),
        }
        split = P(AXIS)
        self.of_rows = [
            world.place(a.reshape(-1), split) for a in (token_of_row, weights, placed.counts.astype(np.int32))
        ]
        self.factors = {name: world.place(a.astype(np.float32), split) for name, a in factors.items()}
        # Each term is rounded to the rows' dtype when it is weighted and when a rank has summed its part, and
        # the total once more; the sums themselves are in f32, and so is what they are compared with.
        self.tolerance = (case.top_k + 5) * float(jnp.finfo(case.numpy_dtype).eps)

        def on_mesh(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
            return jax.jit(jax.shard_map(fn, mesh=world.mesh, in_specs=split, out_specs=split))

        self._row_errors, self._token_errors = on_mesh(self._compare_rows), on_mesh(self._compare_tokens)

    def check(self, name: str, operation: str, result: Any) -> list[Check]:
        """Compares what an operation gave: all of it."""
        fp8 = _FP8_ERROR * _LARGEST if name.endswith(FP8) else 0.0
        checks = []
        if operation == "dispatch":
            found = self._row_errors(result.rows, result.row_weights, result.group_sizes, *self.of_rows)
            for rank, errors in self.world.shards(found).items():
                limits = {"rows": fp8, "row_weights": 0.0, "group_sizes": 0.0}
                for (what, limit), error in zip(limits.items(), errors.tolist(), strict=True):
                    checks.append(Check(name, operation, f"{what} of rank {rank}", error, limit))
            return checks
        found = self._token_errors(result, self.factors[operation])
        for rank, of_rank in self.world.shards(found).items():
            error, largest, most = of_rank.tolist()
            limit = self.tolerance * largest + fp8 * most
            checks.append(Check(name, operation, f"tokens of rank {rank}", error, limit))
        return checks

    def _compare_rows(
        self, rows: jax.Array, weights: jax.Array, sizes: jax.Array, token: jax.Array, *want: jax.Array
    ) -> jax.Array:
        """f32[3], the largest error of each of one rank's arrays; dispatch moves values and keeps them."""
        values = formula.values(formula.TOKENS, token.astype(jnp.uint32)[:, None], _iota(rows.shape[1], 1))
        right = jnp.where(token[:, None] < 0, 0.0, values)
        pairs = ((rows, right), (weights, want[0]), (sizes, want[1]))
        return jnp.stack([_largest(a.astype(jnp.float32) - b.astype(jnp.float32)) for a, b in pairs])

    def _compare_tokens(self, y: jax.Array, factor: jax.Array) -> jax.Array:
        """f32[3]: the largest error of one rank's sums, the largest sum and the largest factor."""
        count, width = y.shape
        row = _iota(count, 0) + lax.axis_index(AXIS).astype(jnp.uint32) * np.uint32(count)
        right = formula.values(formula.TOKENS, row, _iota(width, 1)) * factor[:, None]
        return jnp.stack([_largest(y.astype(jnp.float32) - right), _largest(right), _largest(factor)])


def _largest(x: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(x), initial=0.0)


class Exchange(Kind):
    """Dispatch and combine of each transport, together and alone, and the floor under each."""

    name = "exchange"
    operations = (BOTH, "dispatch", "combine")
    comparable = EXCHANGES
    compared = ("native", "collective")
    iterations = (20, 3)
    repeats_on_gpus = 20
    memory_operation = BOTH
    compare_options = ("--compare", "--transports")

    def sizes(self, case: Case) -> str:
        """See ``Kind``; no expert computes anything."""
        return f"T={case.tokens} H={case.hidden}"

    def traffic(self, case: Case) -> traffic.Traffic:
        """The bytes of one dispatch, in the tokens' own dtype."""
        ids, _ = routes_of(case)
        return traffic.of_routes(ids, case.ranks, case.shape.num_local_experts, case.row_bytes)

    def times_moved(self, case: Case, name: str, operation: str) -> float:
        """See ``Kind``; combine keeps the tokens' dtype."""
        wire = quant.packed_width(case.hidden) if name.endswith(FP8) else case.row_bytes
        there = wire / case.row_bytes
        return {BOTH: there + 1, "dispatch": there, "combine": 1.0}[operation]

    def beside(self, ranks: int, on_gpus: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See ``Kind``."""
        floor = ("nccl" if ranks > 1 else "copy") if on_gpus else "memcpy"
        return (floor,), ()

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Kind``."""
        parser.add_argument(
            "--wire", choices=("fp8",), help="compare each of them with float8 on the wire as well"
        )

    def of_options(self, args: argparse.Namespace, fields: dict[str, Any]) -> None:
        """See ``Kind``."""
        if args.wire == "fp8":
            fields["compare"] += tuple(name + FP8 for name in fields["compare"] if not name.endswith(FP8))

    def make_data(self, case: Case, world: World) -> Data:
        """The tokens of all ranks."""
        ids, weights = routes_of(case)

        def tokens() -> jax.Array:
            row = _iota(case.tokens, 0) + lax.axis_index(AXIS).astype(jnp.uint32) * np.uint32(case.tokens)
            return formula.values(formula.TOKENS, row, _iota(case.hidden, 1)).astype(case.numpy_dtype)

        made = jax.jit(jax.shard_map(tokens, mesh=world.mesh, in_specs=(), out_specs=P(AXIS)))()
        ids_placed, weights_placed = (world.place(a, P(AXIS)) for a in (ids, weights))
        return Data(ids, weights, (made, ids_placed, weights_placed))

    def calls(self, case: Case, world: World, data: Data) -> list[Call]:
        """Dispatch and combine of each transport, together and alone, and the floor under each."""
        operations = case.operations or self.operations
        expected = _Expected(case, world, data)
        made = [
            floors.of_exchange(name, operation, case, world, self.traffic(case))
            for name in case.floors
            for operation in operations
        ]
        for name in case.compare:
            # Combine alone is no other with float8, or where dispatch puts: it keeps the rows' dtype and
            # pushes.
            of_name = [op for op in operations if not (op == "combine" and (wire_of(name) or puts(name)))]
            made += _calls_of(name, of_name, case, world, data, expected)
        return made
