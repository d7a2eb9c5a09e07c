"""``bench layer --phase decode``: few tokens through several layers of one program, as a server decodes.

Each layer has weights of its own, so that none is left in a cache by the one before. A layer's result joins
its tokens, which the next one reads; in between, the first E columns get the logits that send the tokens
where the pattern says. Tokens and weights are a formula's. Of quantised experts all matrices have the codes
of the first one, in another order and with other scales, so the oracle quantises a single expert.
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

from jax_moriep import params, prepare, schemes
from jax_moriep.bench.against import floors
from jax_moriep.bench.kinds import layer
from jax_moriep.bench.kinds.experts import TOLERANCE
from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.measure.calls import Entry, mesh_call
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem import decode_oracle, formula, layer_oracle, oracle, patterns
from jax_moriep.bench.problem.cases import DECODED_LAYERS, DECODED_TOKENS, Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.names import PAIRS, PLAIN, QUANTISED, READ, pair_of
from jax_moriep.bench.problem.world import AXIS, World
from jax_moriep.config import MoEParams
from jax_moriep.errors import ConfigError, rule
from jax_moriep.runtime.place import Place

QUANTISED_TOLERANCE = {"f32": 5e-3, "bf16": 2e-2, "f16": 5e-3}
"""As ``TOLERANCE``: an activation that a last bit sends to the next code is off by a sixteenth. The errors of
float8 itself are more than twice as large."""
_CHECKED_TOKENS = 4
"""Tokens of each rank whose results are compared, in every layer."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What one operation reads.

    Attributes:
      ids: i32[R*T, K] for each layer, the experts that the router chooses, in its order.
      placed: on the devices: x [R*T, H], and for each layer the logits [R*T, E].
    """

    ids: list[np.ndarray]
    placed: tuple[jax.Array, list[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Data:
    """The problem: the tokens of each operation, and the weights of each layer."""

    tokens: dict[str, Tokens]
    weights: list[MoEParams]


def _case_of(case: Case, operation: str) -> Case:
    return dataclasses.replace(case, tokens=int(operation.removeprefix("T=")))


def _chained(
    fns: list[Callable[[jax.Array, MoEParams], jax.Array]],
    x: jax.Array,
    logits: list[jax.Array],
    weights: list[MoEParams],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What each layer reads and what it gives, [R*T, H] each."""
    read, given = [], []
    for fn, chosen, of_layer in zip(fns, logits, weights, strict=True):
        read.append(jnp.concatenate([chosen, x[:, chosen.shape[1] :]], axis=1))
        given.append(fn(read[-1], of_layer))
        # So much of each that numbers stay near 1.
        x = read[-1] * 0.5 + given[-1] * 0.125
    return read, given


def _tokens(case: Case, world: World, rng: np.random.Generator) -> Tokens:
    count = case.ranks * case.tokens
    pattern = patterns.PATTERNS[case.routing]
    ids = [pattern(rng, count, case.experts, case.top_k) for _ in range(case.layers)]
    x = formula.matrix(formula.TOKENS, np.arange(count), case.hidden)
    logits = []
    for of_layer in ids:
        # The router's matrix picks the first E columns of a token, so these columns are its logits.
        row = formula.matrix(formula.COTANGENTS, np.arange(count), case.experts)
        np.put_along_axis(row, of_layer, layer_oracle.chosen_logits(case)[None], axis=1)
        logits.append(world.place(row.astype(case.numpy_dtype), P(AXIS)))
    return Tokens(ids, (world.place(x.astype(case.numpy_dtype), P(AXIS)), logits))


def _weights(case: Case, world: World, number: int) -> MoEParams:
    """Those of one layer."""
    local = case.shape.num_local_experts

    def iota(size: int) -> jax.Array:
        return lax.iota(jnp.uint32, size)

    def make() -> MoEParams:
        expert = (lax.axis_index(AXIS).astype(jnp.uint32) * np.uint32(local) + iota(local))[:, None]
        matrix = np.uint32(number * case.experts) + expert

        def weights(what: int, out: int, inner: int, parts: int) -> jax.Array:
            made = []
            for part in range(parts):
                of_part = matrix if parts == 1 else matrix * np.uint32(2) + np.uint32(part)
                height = out // parts
                row, factor = formula.by_blocks(
                    what, of_part, iota(height)[None], height, decode_oracle.BLOCK
                )
                row = (row + np.uint32(part * height))[:, :, None]
                values = formula.values(what, row, iota(inner)[None, None], formula.exponent_for(inner))
                made.append(values * factor[:, :, None])
            joined = jnp.where(expert[:, :, None] < case.experts, jnp.concatenate(made, axis=1), 0)
            return joined.astype(case.numpy_dtype)

        return MoEParams(
            router=jnp.eye(case.hidden, case.experts, dtype=case.numpy_dtype),
            w1=weights(formula.W1, 2 * case.intermediate, case.hidden, 2),
            w2=weights(formula.W2, case.hidden, case.intermediate, 1),
        )

    specs = params.param_specs(case.config(), AXIS)
    made = jax.jit(jax.shard_map(make, mesh=world.mesh, in_specs=(), out_specs=specs))
    return jax.block_until_ready(made())


def _check(
    name: str,
    operation: str,
    case: Case,
    world: World,
    ids: list[np.ndarray],
    weights: decode_oracle.Weights,
    result: tuple[list[jax.Array], list[jax.Array]],
) -> list[Check]:
    """Compares some tokens of this process's ranks, in every layer, given what the layer has read."""
    tokens = np.unique(np.linspace(0, case.tokens - 1, _CHECKED_TOKENS).astype(int))
    tolerance = (TOLERANCE if weights.scheme is None else QUANTISED_TOLERANCE)[case.dtype]
    checks = []
    for number, (read, given) in enumerate(zip(*result, strict=True)):
        x, y = world.parts(read), world.parts(given)
        for rank in world.ranks:
            of_tokens = np.asarray(x[rank][tokens]).astype(np.float64)
            want = weights.result(of_tokens, ids[number][rank * case.tokens + tokens], number)
            limit = tolerance * float(np.max(np.abs(want), initial=0.0))
            error = oracle.largest_error(np.asarray(y[rank][tokens]), want)
            checks.append(Check(name, operation, f"y of layer {number} of rank {rank}", error, limit))
    return checks


class Decode(Kind):
    """Every pair, with each number of tokens."""

    name = "decode"
    operations = tuple(f"T={count}" for count in DECODED_TOKENS)
    comparable = (*PAIRS, *QUANTISED, *PLAIN)
    compared = ("native+blocked", "collective+ragged_dot")
    compared_on_gpus = ("native+triton", "collective+triton")
    iterations = (20, 2)
    repeats_on_gpus = 5
    memory_operation = operations[-1]
    has_layers = True

    def check(self, case: Case) -> None:
        """See ``Kind``."""
        super().check(case)
        layer.check_router(case)
        if case.model_experts:
            cure = "leave out --model-experts or --phase decode"
            raise ConfigError(rule("model_experts", case.model_experts, "be 0 in decoding", cure))

    def sizes(self, case: Case) -> str:
        """See ``Kind``; each operation has its own number of tokens."""
        return f"{case.layers} layers, H={case.hidden} I={case.intermediate}"

    def beside(self, ranks: int, on_gpus: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See ``Kind``."""
        return ((READ,), PLAIN[:1]) if on_gpus and ranks == 1 else ((), ())

    def of_options(self, args: argparse.Namespace, fields: dict[str, Any]) -> None:
        """See ``Kind``; the options are ``layer``'s."""
        tokens = DECODED_TOKENS if args.tokens is None else (args.tokens,)
        fields.setdefault("layers", DECODED_LAYERS)
        fields.update(tokens=max(tokens), operations=tuple(f"T={count}" for count in tokens))
        if args.quant is not None:
            names = [f"{name}-{args.quant}" for name in fields["compare"]]
            fields["compare"] += tuple(name for name in names if name in self.comparable)

    def make_data(self, case: Case, world: World) -> Data:
        """Tokens and weights, made on the devices."""
        rng = np.random.default_rng(case.seed)
        operations = case.operations or self.operations
        tokens = {operation: _tokens(_case_of(case, operation), world, rng) for operation in operations}
        return Data(tokens, [_weights(case, world, number) for number in range(case.layers)])

    def calls(self, case: Case, world: World, data: Data) -> list[Call]:
        """Every pair, with each number of tokens."""
        format = schemes.format_name(Place.of(world.mesh, AXIS).architecture)

        @functools.cache
        def weights_of(name: str) -> list[MoEParams]:
            if name in PLAIN or pair_of(name)[2] is None:
                return data.weights
            transport, experts, scheme = pair_of(name)
            cfg = case.config(transport=transport, experts=experts, quant=scheme)
            return [prepare.prepare_params(one, cfg, world.mesh, ep_axis=AXIS) for one in data.weights]

        @functools.cache
        def oracle_of(scheme: str | None) -> decode_oracle.Weights:
            return decode_oracle.Weights(case, scheme, "int8" if scheme == "int8_token" else format)

        made = []
        for operation in case.operations or self.operations:
            of, tokens = _case_of(case, operation), data.tokens[operation]
            if READ in case.floors:
                used = sum(np.unique(of_layer).size for of_layer in tokens.ids) / case.layers
                made.append(floors.read(operation, of, world, used))
            for name in case.compare:
                scheme = None if name in PLAIN else pair_of(name)[2]
                weights = weights_of(name)
                specs = params.param_specs(of.config(quant=scheme), AXIS, params=weights[0])
                check = functools.partial(_check, name, operation, of, world, tokens.ids, oracle_of(scheme))
                fns = [layer.of_name(name, of, world, ids) for ids in tokens.ids]
                made.append(
                    mesh_call(
                        Entry(name, operation, of, world),
                        functools.partial(_chained, fns),
                        (*tokens.placed, weights),
                        ((P(AXIS), P(AXIS), [specs] * case.layers), P(AXIS)),
                        check,
                        case.layers,
                    )
                )
        return made
