"""The router of DeepSeek-V3 alone, forward and with its gradients; no kind of the command line has it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_moriep import routing
from jax_moriep.bench.kinds.experts import BACKWARD, FORWARD
from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.measure.calls import Entry, mesh_call
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem import oracle, router_oracle
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.world import AXIS, World
from jax_moriep.config import MoEConfig, MoEParams

ROUTE = "route"
_GROUPS, _TOP_GROUPS = 8, 4
_CHECKED = 64
"""Tokens whose gradients are compared, and columns of the router's matrix."""
_OTHER_CHOICES = 2e-3
"""Of the tokens, which may choose others: sums of f32 tell no near-ties."""
_TOLERANCE = {"f32": 1e-4, "bf16": 1e-2, "f16": 2e-3}
"""Of gradients, which are rounded to the dtype, in units of the largest value."""
_TOLERANCE_OF_WEIGHTS = 1e-4


@dataclasses.dataclass(frozen=True)
class Data:
    """x [T, H], the router [H, E], its score bias f32[E], and d_weights f32[T, K], on host and device."""

    host: tuple[np.ndarray, ...]
    placed: tuple[jax.Array, ...]


def config(case: Case) -> MoEConfig:
    """The layer's, whose groups are DeepSeek-V3's where the experts have room for them."""
    has_groups = case.experts % _GROUPS == 0 and case.experts // _GROUPS * _TOP_GROUPS >= case.top_k
    return dataclasses.replace(
        case.config(),
        router="deepseek_v3",
        score_bias=True,
        num_groups=_GROUPS if has_groups else None,
        top_groups=_TOP_GROUPS if has_groups else None,
    )


class Route(Kind):
    """``jm.route``, with gradients of the weights that it gives."""

    name = "route"
    operations = (FORWARD, BACKWARD)
    comparable = (ROUTE,)
    compared = (ROUTE,)
    iterations = (9, 1)
    repeats_on_gpus = 20
    fills_arenas = False

    def make_data(self, case: Case, world: World) -> Data:
        """Random tokens and weights."""
        rng = np.random.default_rng(case.seed)
        tokens, experts = case.ranks * case.tokens, case.experts
        x = rng.standard_normal((tokens, case.hidden), np.float32).astype(case.numpy_dtype)
        router = rng.standard_normal((case.hidden, experts), np.float32) * np.float32(case.hidden**-0.5)
        bias = rng.uniform(-0.1, 0.1, experts).astype(np.float32)
        d_weights = rng.standard_normal((tokens, case.top_k), np.float32)
        host = (x, router.astype(case.numpy_dtype), bias, d_weights)
        specs = (P(AXIS), P(), P(), P(AXIS))
        return Data(host, tuple(world.place(a, spec) for a, spec in zip(host, specs, strict=True)))

    def calls(self, case: Case, world: World, data: Data) -> list[Call]:
        """Both passes."""
        cfg = config(case)

        def forward(x: jax.Array, router: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
            nothing: Any = None
            params = MoEParams(router=router, w1=nothing, w2=nothing, score_bias=bias)
            route = routing.route(x, params, cfg)
            return route.weights, route.ids

        def backward(x: jax.Array, router: jax.Array, bias: jax.Array, d_weights: jax.Array) -> Any:
            weights, pull, ids = jax.vjp(lambda x, router: forward(x, router, bias), x, router, has_aux=True)
            return weights, ids, *pull(d_weights)

        made = []
        for operation in case.operations or self.operations:
            is_forward = operation == FORWARD
            work: Callable[..., Any] = forward if is_forward else backward
            inputs = data.placed[: 3 if is_forward else 4]
            specs = (P(AXIS), P(), P(), P(AXIS))[: len(inputs)]
            results = (P(AXIS), P(AXIS), P(AXIS), P())[: 2 if is_forward else 4]
            errors: dict[str, float] = {}
            check = functools.partial(_check, operation, case, data, errors)
            call = mesh_call(Entry(ROUTE, operation, case, world), work, inputs, (specs, results), check)
            made.append(dataclasses.replace(call, how=functools.partial(_told, errors)))
        return made


def _told(errors: dict[str, float]) -> str:
    return ", ".join(f"{what} {error:.2e}" for what, error in errors.items())


def _check(
    operation: str, case: Case, data: Data, errors: dict[str, float], result: tuple[jax.Array, ...]
) -> list[Check]:
    """Compares this process's tokens, if it has all; ``errors`` takes what was found."""
    if jax.process_count() > 1:
        return []
    got = [np.asarray(array) for array in result]
    want = router_oracle.Problem(config(case), *data.host[:3], ids=got[1])
    checks = []

    def compare(what: str, error: float, limit: float) -> None:
        errors[what] = error
        checks.append(Check(ROUTE, operation, what, error, limit))

    compare("tokens with other experts", want.other_choices(), _OTHER_CHOICES)
    compare("weights", oracle.largest_error(got[0], want.weights), _TOLERANCE_OF_WEIGHTS)
    if operation == FORWARD:
        return checks
    some = np.unique(np.linspace(0, got[0].shape[0] - 1, _CHECKED).astype(int))
    cols = np.unique(np.linspace(0, case.experts - 1, _CHECKED).astype(int))
    d_logits = want.d_logits(data.host[3])
    for what, part, whole in (
        ("d_x", got[2][some], d_logits[some] @ want.router.T),
        ("d_router", got[3][:, cols], want.x.T @ d_logits[:, cols]),
    ):
        # In units of the largest value, so that it says something by itself.
        error = oracle.largest_error(part, whole) / float(np.max(np.abs(whole)))
        compare(f"{what}, of the largest", error, _TOLERANCE[case.dtype])
    return checks
