"""``bench layer``: ep_moe, forward and with its gradients, over pairs of a transport and experts.

Tokens and weights are a formula's and made on the devices, at any size. Every expert has the same random
matrices, turned by a number of rows of its own: a wrong expert shows, and the oracle needs two matrices only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_moriep import exchange, layer, params, routing
from jax_moriep.bench.against import floors, plain, ragged, torch_layer
from jax_moriep.bench.kinds.experts import BACKWARD, FORWARD, TOLERANCE
from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.measure.calls import Entry, mesh_call
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem import formula, layer_oracle, oracle, patterns
from jax_moriep.bench.problem.cases import DECODED_LAYERS, Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.names import DENSE_COPY, OTHERS, PAIRS, PLAIN, TOKAMAX, TORCH, pair_of
from jax_moriep.bench.problem.world import AXIS, World
from jax_moriep.config import SCHEMES, MoEParams
from jax_moriep.errors import ConfigError, rule

_CHECKED_TOKENS = 8
"""Tokens of each rank whose results are compared."""
_CHECKED_COLUMNS = 64
"""Columns of one expert's weight gradients of each rank that are compared."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The problem.

    Attributes:
      ids: i32[R*T, K], the experts that the router chooses, in its order.
      placed: on the devices: x [R*T, H], the weights, and d_y [R*T, H], the gradient of the result.
    """

    ids: np.ndarray
    placed: tuple[jax.Array, MoEParams, jax.Array]


def of_name(
    name: str, case: Case, world: World, ids: np.ndarray
) -> Callable[[jax.Array, MoEParams], jax.Array]:
    """fn(x [R*T, H], weights) -> y [R*T, H], for tokens with the experts i32[R*T, K]."""
    if name in OTHERS:
        return plain.layer(name, case)
    transport, experts, scheme = pair_of(name)
    if experts != "ragged_dot":
        cfg = case.config(transport=transport, experts=experts, quant=scheme)

        def whole(x: jax.Array, weights: MoEParams) -> jax.Array:
            if case.routed_experts == case.experts:
                return layer.ep_moe(x, weights, cfg, mesh=world.mesh)[0]
            of_model = dataclasses.replace(cfg, num_experts=case.routed_experts)
            route = routing.route(x, weights, of_model)
            # Data leads to the share alone: of the others' scores the layer needs none.
            route = dataclasses.replace(
                route, scores=route.scores[:, : case.experts], logits=route.logits[:, : case.experts]
            )
            of_share = dataclasses.replace(weights, router=weights.router[:, : case.experts])
            return layer.ep_moe(x, of_share, cfg, mesh=world.mesh, route=route)[0]

        return whole

    cfg, shape = case.config(transport=transport), case.shape
    fullest = int(np.bincount(ids.ravel() // shape.num_local_experts).max())

    def local(x: jax.Array, weights: MoEParams) -> jax.Array:
        route = routing.route(x, weights, cfg)
        disp = exchange.dispatch(x, route.ids, route.weights, cfg, axis_name=AXIS)
        rows = ragged.expert_mlp(
            disp.rows, disp.row_weights, disp.group_sizes, weights.w1, weights.w2, disp.block, fullest
        )
        return exchange.combine(rows, disp.plan, axis_name=AXIS)

    specs = (P(AXIS), params.param_specs(cfg, AXIS))
    return jax.shard_map(local, mesh=world.mesh, in_specs=specs, out_specs=P(AXIS))


class _Expected:
    """Compares some tokens, and some columns of the weight gradients of one expert of each rank."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case = case
        self.problem = layer_oracle.Problem(case, data.ids)
        count = min(_CHECKED_TOKENS, case.tokens)
        self.tokens = np.linspace(0, case.tokens - 1, count).astype(int)
        columns = functools.partial(np.linspace, 0, num=_CHECKED_COLUMNS, dtype=int)
        self.columns1, self.columns2 = (np.unique(columns(n - 1)) for n in (case.hidden, case.intermediate))
        self._of_rank = functools.cache(lambda rank: self.problem.of_tokens(rank * case.tokens + self.tokens))
        self._of_expert = functools.cache(
            lambda expert: self.problem.weight_gradients(expert, self.columns1, self.columns2)
        )

    def check(self, name: str, operation: str, world: World, result: Any) -> list[Check]:
        """Compares this process's part of a result."""
        checks: list[Check] = []

        def compare(what: str, rank: int, got: Any, want: np.ndarray) -> None:
            limit = TOLERANCE[self.case.dtype] * float(np.max(np.abs(want), initial=0.0))
            error = oracle.largest_error(np.asarray(got), want)
            checks.append(Check(name, operation, f"{what} of rank {rank}", error, limit))

        y, gradients = (result, None) if operation == FORWARD else result
        for rank, shard in world.parts(y).items():
            compare("y", rank, shard[self.tokens], self._of_rank(rank)[0])
        if gradients is None:
            return checks
        d_x, d_weights = gradients
        for rank, shard in world.parts(d_x).items():
            compare("d_x", rank, shard[self.tokens], self._of_rank(rank)[1])
        d_w1, d_w2 = world.parts(d_weights.w1), world.parts(d_weights.w2)
        for rank in world.ranks:
            first = rank * self.case.shape.num_local_experts
            if first < self.case.experts:
                want1, want2 = self._of_expert(first)
                compare("d_w1", rank, d_w1[rank][0][:, self.columns1], want1)
                compare("d_w2", rank, d_w2[rank][0][:, self.columns2], want2)
        return checks


class Layer(Kind):
    """Every pair, forward and with its gradients."""

    name = "layer"
    operations = (FORWARD, BACKWARD)
    comparable = (*PAIRS, *OTHERS)
    compared = ("native+blocked", "collective+ragged_dot")
    compared_on_gpus = ("native+triton", "collective+triton")
    iterations = (7, 1)
    repeats_on_gpus = 3
    memory_operation = BACKWARD
    tokens_unless_told = "1024, with --phase decode 1, 8, 32 and 128"

    def check(self, case: Case) -> None:
        """See ``Kind``."""
        super().check(case)
        check_router(case)

    def beside(self, ranks: int, on_gpus: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See ``Kind``."""
        if not on_gpus or ranks > 1:
            return (), ()
        others = [name for name in (TOKAMAX, TORCH) if importlib.util.find_spec(name.removeprefix("plain_"))]
        return (DENSE_COPY,), (*PLAIN, *others)

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """See ``Kind``; a phase is a kind of its own, with options of this one's."""
        parser.add_argument(
            "--model-experts",
            type=int,
            default=0,
            help="experts that the router chooses from, where --experts are a share that gets all tokens",
        )
        parser.add_argument(
            "--phase", choices=("decode",), help="few tokens, forward, through several layers of one program"
        )
        parser.add_argument(
            "--layers", type=int, help=f"of one program, with --phase decode (default: {DECODED_LAYERS})"
        )
        parser.add_argument(
            "--quant",
            choices=SCHEMES,
            help="with --phase decode: compare each of them with its experts quantised as well",
        )

    def of_options(self, args: argparse.Namespace, fields: dict[str, Any]) -> None:
        """See ``Kind``."""
        del fields
        if args.quant is not None:
            cure = "add it, or leave out --quant"
            raise ConfigError(rule("quant", args.quant, "come with --phase decode", cure))

    def make_data(self, case: Case, world: World) -> Data:
        """Tokens that the router sends where the pattern says.

        The router's matrix picks the first E columns of a token, so these columns are its logits.
        """
        rng = np.random.default_rng(case.seed)
        ids = patterns.PATTERNS[case.routing](rng, case.ranks * case.tokens, case.experts, case.top_k)
        specs = params.param_specs(case.config(), AXIS)
        chosen = layer_oracle.chosen_logits(case)

        def iota(size: int) -> jax.Array:
            return lax.iota(jnp.uint32, size)

        def make(ids: jax.Array) -> tuple[jax.Array, MoEParams, jax.Array]:
            rank = lax.axis_index(AXIS).astype(jnp.uint32)
            row = (rank * np.uint32(case.tokens) + iota(case.tokens))[:, None]
            column = iota(case.hidden)[None]
            x = formula.values(formula.TOKENS, row, column)
            x = x.at[jnp.arange(case.tokens)[:, None], ids].set(chosen)
            d_y = formula.values(formula.COTANGENTS, row, column)
            local = case.shape.num_local_experts
            expert = (rank * np.uint32(local) + iota(local))[:, None, None]

            def weights(what: int, out: int, inner: int) -> jax.Array:
                by = expert * np.uint32(formula.STEPS[what]) % np.uint32(out)
                turned = (iota(out)[None, :, None] + np.uint32(out) - by) % np.uint32(out)
                made = formula.values(what, turned, iota(inner)[None, None], formula.exponent_for(inner))
                return jnp.where(expert < case.experts, made, 0).astype(case.numpy_dtype)

            made = MoEParams(
                router=jnp.eye(case.hidden, case.routed_experts, dtype=case.numpy_dtype),
                w1=weights(formula.W1, 2 * case.intermediate, case.hidden),
                w2=weights(formula.W2, case.hidden, case.intermediate),
            )
            return x.astype(case.numpy_dtype), made, d_y.astype(case.numpy_dtype)

        out_specs = (P(AXIS), specs, P(AXIS))
        made = jax.jit(jax.shard_map(make, mesh=world.mesh, in_specs=P(AXIS), out_specs=out_specs))
        return Data(ids, jax.block_until_ready(made(world.place(ids, P(AXIS)))))

    def calls(self, case: Case, world: World, data: Data) -> list[Call]:
        """Every pair, forward and with its gradients."""
        expected = _Expected(case, data)
        by_torch = functools.cache(lambda: torch_layer.Layer(case.top_k, *data.placed))
        laid_out = functools.cache(lambda: jax.jit(plain.swapped)(data.placed[1]))
        made = []
        for operation in case.operations or self.operations:
            made += [floors.dense_copy(floor, operation, case, world) for floor in case.floors]
            for name in case.compare:
                entry = Entry(name, operation, case, world)
                check = functools.partial(expected.check, name, operation, world)
                if name == TORCH:
                    made.append(_by_torch(entry, by_torch, check))
                    continue
                placed = data.placed
                if name == TOKAMAX:
                    placed = (placed[0], laid_out(), placed[2])
                    check = functools.partial(_check_swapped, check)
                made.append(_by_jax(entry, placed, data.ids, check))
        return made


def _by_jax(
    entry: Entry, placed: tuple[jax.Array, MoEParams, jax.Array], ids: np.ndarray, check: Callable[..., Any]
) -> Call:
    case, is_forward = entry.case, entry.operation == FORWARD
    specs = params.param_specs(case.config(), AXIS)

    # Traced here and not before, for what is not installed is missed then.
    def forward(x: jax.Array, weights: MoEParams) -> jax.Array:
        return of_name(entry.name, case, entry.world, ids)(x, weights)

    def backward(x: jax.Array, weights: MoEParams, d_y: jax.Array) -> Any:
        y, pull = jax.vjp(forward, x, weights)
        return y, pull(d_y)

    inputs = placed[:2] if is_forward else placed
    in_specs = (P(AXIS), specs, P(AXIS))[: len(inputs)]
    out_specs = P(AXIS) if is_forward else (P(AXIS), (P(AXIS), specs))
    return mesh_call(entry, forward if is_forward else backward, inputs, (in_specs, out_specs), check)


def _by_torch(entry: Entry, made: Callable[[], torch_layer.Layer], check: Callable[..., Any]) -> Call:
    """A call of ``against.torch_layer``; nothing of torch is imported before it runs."""
    backward, repeats = entry.operation == BACKWARD, entry.case.repeats
    return Call(
        entry.name,
        entry.operation,
        lambda: made().repeat(backward, repeats),
        check,
        repeats,
        lambda: made().once(backward),
        how=lambda: made().how,
        memory=lambda: made().memory(backward),
    )


def _check_swapped(check: Callable[[Any], list[Check]], result: Any) -> list[Check]:
    """The check of a result whose weights' gradients are swapped, if it has any."""
    if isinstance(result, tuple):
        y, (d_x, d_weights) = result
        result = y, (d_x, plain.swapped(d_weights))
    return check(result)


def check_router(case: Case) -> None:
    """Refuses tokens too narrow for their logits.

    Raises:
      ConfigError: they are.
    """
    if case.hidden < case.routed_experts:
        must = f"be at least experts={case.routed_experts}"
        cure = "the tokens carry their router logits in their first columns; raise --hidden"
        raise ConfigError(rule("hidden", case.hidden, must, cure))
