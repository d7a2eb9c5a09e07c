"""``bench layer``: ep_moe, forward and with its gradients, over pairs of a transport and experts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_moriep import exchange, layer, params, routing
from jax_moriep.bench import oracle, patterns, ragged
from jax_moriep.bench.cases import Case
from jax_moriep.bench.experts import FORWARD, MEMORY_OPERATION, OPERATIONS, TOLERANCE
from jax_moriep.bench.timing import Call, Check
from jax_moriep.bench.world import AXIS, World
from jax_moriep.config import MoEParams

__all__ = ["MEMORY_OPERATION", "OPERATIONS", "calls", "make_data"]

_CHECKED_TOKENS = 8
"""Tokens of each rank whose results are compared; the oracle computes K experts for each."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The whole problem on the host, and its part on the devices.

    Attributes:
      x: [R*T, H], tokens.
      d_y: [R*T, H], the gradient of the result.
      ids: i32[R*T, K], the experts that the router chooses, in its order.
      params: the weights.
      placed: x, the weights and d_y.
    """

    x: np.ndarray
    d_y: np.ndarray
    ids: np.ndarray
    params: MoEParams
    placed: tuple[jax.Array, MoEParams, jax.Array]


def make_data(case: Case, world: World) -> Data:
    """Tokens that the router sends where the pattern says; the same in every process.

    The router's matrix picks the first E columns of a token, so these columns are its logits.
    """
    rng = np.random.default_rng(case.seed)
    num_tokens = case.ranks * case.tokens
    ids = patterns.PATTERNS[case.routing](rng, num_tokens, case.experts, case.top_k)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    x = normal(num_tokens, case.hidden)
    x[:, : case.experts] = rng.uniform(-1, 1, (num_tokens, case.experts))
    # Above all others, and so far apart that no rounding changes their order.
    chosen = np.linspace(3, 2, case.top_k, dtype=np.float32)
    np.put_along_axis(x[:, : case.experts], ids, chosen[None], axis=1)
    inner, dtype = case.intermediate, case.numpy_dtype
    weights = MoEParams(
        router=np.eye(case.hidden, case.experts, dtype=dtype),
        w1=normal(case.experts, 2 * inner, case.hidden, scale=case.hidden**-0.5).astype(dtype),
        w2=normal(case.experts, case.hidden, inner, scale=inner**-0.5).astype(dtype),
    )
    x, d_y = x.astype(dtype), normal(num_tokens, case.hidden).astype(dtype)
    cfg = case.config()
    padded = jax.tree.map(np.asarray, params.pad_params(weights, case.ranks))
    placed = jax.tree.map(world.place, padded, params.param_specs(cfg, AXIS))
    return Data(x, d_y, ids, weights, (world.place(x, P(AXIS)), placed, world.place(d_y, P(AXIS))))


def calls(case: Case, world: World, data: Data) -> list[Call]:
    """Every pair, forward and with its gradients."""
    expected = _Expected(case, data)
    x, weights, d_y = data.placed
    made = []
    for operation in OPERATIONS:
        for name in case.compare:
            fn = _layer(name, case, world, data)

            def backward(x: jax.Array, weights: MoEParams, d_y: jax.Array, fn: Any = fn) -> Any:
                y, pull = jax.vjp(fn, x, weights)
                return y, pull(d_y)

            forward_only = operation == FORWARD
            compiled = jax.jit(fn if forward_only else backward)
            inputs = (x, weights) if forward_only else (x, weights, d_y)

            def run(compiled: Any = compiled, inputs: Any = inputs) -> Any:
                return jax.block_until_ready(compiled(*inputs))

            made.append(Call(name, operation, run, functools.partial(expected.check, name, operation, world)))
    return made


def _layer(name: str, case: Case, world: World, data: Data) -> Callable[[jax.Array, MoEParams], jax.Array]:
    """fn(x [R*T, H], weights) -> y [R*T, H]."""
    transport, experts = name.split("+")
    if experts != "ragged_dot":
        cfg = case.config(transport=transport, experts=experts)
        return lambda x, weights: layer.ep_moe(x, weights, cfg, mesh=world.mesh)[0]

    cfg, shape = case.config(transport=transport), case.shape
    fullest = int(np.bincount(data.ids.ravel() // shape.num_local_experts).max())

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
    """The results of some tokens, and the weight gradients of one expert of each rank."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case = case
        self.data = data
        self.kept = oracle.place_routes(data.ids, case.shape).row_of_route != oracle.DROPPED
        logits = np.take_along_axis(data.x[:, : case.experts].astype(np.float64), data.ids, axis=1)
        # softmax_topk's weights, normalised, are a softmax over the chosen logits.
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        self.weights = shares / shares.sum(axis=1, keepdims=True)

    def check(self, name: str, operation: str, world: World, result: Any) -> list[Check]:
        """Compares this process's part of a result."""
        checks: list[Check] = []

        def compare(what: str, rank: int, got: np.ndarray, want: np.ndarray) -> None:
            limit = TOLERANCE[self.case.dtype] * float(np.max(np.abs(want), initial=0.0))
            error = oracle.largest_error(got, want)
            checks.append(Check(name, operation, f"{what} of rank {rank}", error, limit))

        y, gradients = (result, None) if operation == FORWARD else result
        tokens = np.linspace(0, self.case.tokens - 1, min(_CHECKED_TOKENS, self.case.tokens)).astype(int)
        of_rank = {rank: self._tokens(rank * self.case.tokens + tokens) for rank in world.ranks}
        for rank, shard in world.shards(y).items():
            compare("y", rank, shard[tokens], of_rank[rank][0])
        if gradients is None:
            return checks
        d_x, d_weights = gradients
        for rank, shard in world.shards(d_x).items():
            compare("d_x", rank, shard[tokens], of_rank[rank][1])
        d_w1, d_w2 = world.shards(d_weights.w1), world.shards(d_weights.w2)
        for rank in world.ranks:
            first = rank * self.case.shape.num_local_experts
            if first < self.case.experts:
                want = self._expert(first)
                compare("d_w1", rank, d_w1[rank][0], want.d_w1)
                compare("d_w2", rank, d_w2[rank][0], want.d_w2)
        return checks

    def _tokens(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """y and d_x of some tokens, each f64[n, H]."""
        data, weights = self.data, self.data.params
        y = np.zeros((tokens.size, self.case.hidden))
        d_x = np.zeros_like(y)
        for i, token in enumerate(tokens):
            d_route = np.zeros(self.case.top_k)
            for k, expert in enumerate(data.ids[token]):
                if not self.kept[token, k]:
                    continue
                weight = self.weights[token, k]
                d_y = data.d_y[token].astype(np.float64)
                x, w1, w2 = data.x[token][None], weights.w1[expert], weights.w2[expert]
                one = oracle.mlp(x, w1, w2, weight * d_y[None])
                y[i] += weight * one.y[0]
                d_x[i] += one.d_x[0]
                d_route[k] = d_y @ one.y[0]
            share = self.weights[token]
            d_x[i, data.ids[token]] += share * (d_route - share @ d_route)
        return y, d_x

    def _expert(self, expert: int) -> oracle.Mlp:
        """The gradients of one expert's weights."""
        data = self.data
        token, k = np.nonzero((data.ids == expert) & self.kept)
        d_y = self.weights[token, k, None] * data.d_y[token].astype(np.float64)
        return oracle.mlp(data.x[token], data.params.w1[expert], data.params.w2[expert], d_y)
