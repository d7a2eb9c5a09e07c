"""Routing: which experts a token goes to and with what weight, one function per published formula.

Each formula is that of transformers 5.24.0, forward and gradient.

Every router maps f32 logits [T, E] to ``(ids i32[T, K], weights f32[T, K], scores f32[T, E])``. The ids come
in falling order of what they were chosen by, and of equal candidates the lower id wins. ``scores`` is what
the load-balance loss averages. Letters: T tokens, H hidden, E experts, K top_k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.config import MoEConfig, MoEParams, check_type
from jax_moriep.errors import ConfigError, rule
from jax_moriep.operands import check_array
from jax_moriep.router_product import product

Routed = tuple[jax.Array, jax.Array, jax.Array]
Router = Callable[[jax.Array, jax.Array | None, MoEConfig], Routed]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Route:
    """Where each token goes. The leading dimensions are those of the x that was routed."""

    ids: jax.Array
    """i32[..., K], expert ids; -1 means no route."""
    weights: jax.Array
    """f32[..., K], what each chosen expert's result is multiplied by (llama4: what its input is)."""
    scores: jax.Array
    """f32[..., E], the router's scores of all experts, none negative; not yet normalised."""
    logits: jax.Array
    """f32[..., E]"""


@jax.custom_jvp
def divide(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, and 0 where the denominator is 0 or subnormal.

    The stock derivative of a quotient squares the denominator, which gives NaN for the tiny sums that a
    sigmoid router can reach (1e-20 squared is 0 in f32); this one divides twice instead.
    """
    small = jnp.abs(denominator) < jnp.finfo(denominator.dtype).tiny
    return jnp.where(small, 0, numerator / jnp.where(small, 1, denominator))


@divide.defjvp
def _divide_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    quotient = divide(*primals)
    return quotient, divide(tangents[0] - quotient * tangents[1], primals[1])


def _top_ids(choice: jax.Array, k: int) -> jax.Array:
    # top_k puts 0.0 before -0.0, and so a higher id before a lower one that is its equal.
    return jax.lax.top_k(jnp.where(choice == 0, jnp.abs(choice), choice), k)[1]


def _chosen(values: jax.Array, ids: jax.Array) -> jax.Array:
    """``values[t, ids[t, k]]``; top_k only gives ids in bounds, so nothing is checked again."""
    return jnp.take_along_axis(values, ids, axis=-1, mode="promise_in_bounds")


def _sum(chosen: jax.Array) -> jax.Array:
    return chosen.sum(axis=-1, keepdims=True)


def weights_of(chosen: jax.Array, total: jax.Array, cfg: MoEConfig) -> jax.Array:
    """Of chosen scores the weights: over ``total`` with ``norm_topk``, times ``routed_scaling``."""
    shares = divide(chosen, total) if cfg.norm_topk else chosen
    return shares * cfg.routed_scaling


def _biased(scores: jax.Array, score_bias: jax.Array | None) -> jax.Array:
    return scores if score_bias is None else scores + score_bias


def _keep_best_groups(
    choice: jax.Array, group_score: Callable[[jax.Array], jax.Array], fill: float, cfg: MoEConfig
) -> jax.Array:
    """Puts ``fill`` for experts outside the best ``top_groups`` groups.

    ``group_score`` maps [T, G, E/G] to [T, G]. MoEConfig sees to it that kept groups hold ``top_k`` experts.
    """
    if cfg.num_groups is None or cfg.top_groups is None:
        return choice
    size = choice.shape[-1] // cfg.num_groups
    grouped = choice.reshape(*choice.shape[:-1], cfg.num_groups, size)
    kept = _best(group_score(grouped), cfg.top_groups)
    return jnp.where(kept[..., None], grouped, fill).reshape(choice.shape)


def _best(scores: jax.Array, count: int) -> jax.Array:
    """Which of the last dimension are among the ``count`` largest; of equals the lower index, NaN first.

    Each is compared with every other, which for a few groups is cheaper than a sort.
    """
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    mine, other = scores[..., :, None], scores[..., None, :]
    index = jnp.arange(scores.shape[-1])
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return before.sum(axis=-1) < count


def _sum_of_two_best(scores: jax.Array) -> jax.Array:
    """Of the last dimension the sum of the two largest, or of the only one; two maxima, without a sort."""
    best = scores.max(axis=-1, keepdims=True)
    if scores.shape[-1] == 1:
        return best[..., 0]
    is_best = scores == best
    next_best = jnp.where(is_best, -jnp.inf, scores).max(axis=-1)
    twice = is_best.sum(axis=-1) > 1
    return best[..., 0] + jnp.where(twice, best[..., 0], next_best)


def softmax_topk(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """Softmax over all experts, the k largest, over their sum with ``norm_topk``.

    Mixtral (Jiang et al. 2024, arXiv:2401.04088), OLMoE and Qwen-MoE; transformers ``MixtralTopKRouter``
    (always normalised), ``OlmoeTopKRouter`` and ``Qwen3MoeTopKRouter`` (by ``norm_topk_prob``).
    """
    scores = jax.nn.softmax(logits, axis=-1)
    ids = _top_ids(scores, cfg.top_k)
    chosen = _chosen(scores, ids)
    return ids, weights_of(chosen, _sum(chosen), cfg), scores


def topk_softmax(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """The k largest logits, softmax over these k; ``norm_topk`` has nothing to add.

    Granite MoE (Granite 3.0 language models, 2024; the gate of Shazeer et al. 2017, arXiv:1701.06538, without
    its noise); transformers ``GraniteMoeTopKRouter``. The loss averages the softmax over all experts.
    """
    ids = _top_ids(logits, cfg.top_k)
    weights = jax.nn.softmax(_chosen(logits, ids), axis=-1) * cfg.routed_scaling
    return ids, weights, jax.nn.softmax(logits, axis=-1)


def sigmoid_topk(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """Sigmoid scores, the k largest of score + bias, weights from the unbiased scores.

    MiniMax-M2 (MiniMax 2025); transformers ``MiniMaxM2TopKRouter`` (always normalised).
    """
    scores = jax.nn.sigmoid(logits)
    ids = _top_ids(_biased(scores, score_bias), cfg.top_k)
    chosen = _chosen(scores, ids)
    return ids, weights_of(chosen, _sum(chosen), cfg), scores


def deepseek_v3(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """Sigmoid scores plus bias, limited to the groups with the largest sum of their two best.

    DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437), also GLM-4 MoE and dots1; ``DeepseekV3TopkRouter``,
    ``Glm4MoeTopkRouter`` and ``Dots1TopkRouter`` of transformers 5.24.0. Experts outside the kept groups
    stand at -inf, as in transformers since 5.6.0, so that none of them is ever chosen; until 5.5.4 they
    stood at 0.0 and won where the bias made kept ones negative.
    """
    scores = jax.nn.sigmoid(logits)
    choice = _keep_best_groups(_biased(scores, score_bias), _sum_of_two_best, -jnp.inf, cfg)
    ids = _top_ids(choice, cfg.top_k)
    chosen = _chosen(scores, ids)
    return ids, weights_of(chosen, _sum(chosen) + 1e-20, cfg), scores


def deepseek_v2(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """Softmax over all experts, limited to the groups with the largest maximum, then the k largest.

    DeepSeek-V2 (DeepSeek-AI 2024, arXiv:2405.04434); transformers ``DeepseekV2TopkRouter``,
    "group_limited_greedy" with groups and "greedy" without (both ignore ``norm_topk_prob``: pass
    ``norm_topk=False`` to match them). Experts outside the kept groups stand at 0.0, below every softmax.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    limited = _keep_best_groups(scores, lambda grouped: grouped.max(axis=-1), 0.0, cfg)
    ids = _top_ids(limited, cfg.top_k)
    chosen = _chosen(limited, ids)
    return ids, weights_of(chosen, _sum(chosen), cfg), scores


def gpt_oss(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """The k largest logits (``router_bias`` included), softmax over these k.

    gpt-oss (OpenAI 2025, arXiv:2508.10925); transformers ``GptOssTopKRouter``. The formula is topk_softmax's;
    what differs is the bias, which ``route`` has added to the logits.
    """
    return topk_softmax(logits, score_bias, cfg)


def llama4(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """The k largest logits, each weight the sigmoid of its logit; it multiplies the expert's input.

    Llama 4 (Meta 2025); transformers ``Llama4Router`` and ``Llama4TextMoe``. ``norm_topk`` is not part of it.
    """
    ids = _top_ids(logits, cfg.top_k)
    scores = jax.nn.sigmoid(logits)
    return ids, _chosen(scores, ids) * cfg.routed_scaling, scores


def ernie45(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Routed:
    """Softmax over all experts, the k largest of score + bias, over the sum of the unbiased scores.

    ERNIE 4.5 (Baidu 2025); transformers ``Ernie4_5_MoeTopKRouter`` (always normalised). The sum counts as at
    least 1e-12, its default ``moe_norm_min``.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    ids = _top_ids(_biased(scores, score_bias), cfg.top_k)
    chosen = _chosen(scores, ids)
    return ids, weights_of(chosen, jnp.maximum(_sum(chosen), 1e-12), cfg), scores


ROUTERS: dict[str, Router] = {
    "softmax_topk": softmax_topk,
    "topk_softmax": topk_softmax,
    "sigmoid_topk": sigmoid_topk,
    "deepseek_v3": deepseek_v3,
    "deepseek_v2": deepseek_v2,
    "gpt_oss": gpt_oss,
    "llama4": llama4,
    "ernie45": ernie45,
}


def route(x: jax.Array, params: MoEParams, cfg: MoEConfig) -> Route:
    """Chooses each token's experts with ``cfg.router``.

    The logits are a product of exact terms that are added in f32, whatever the dtypes of x and of the weights
    (``router_product``). Of padded parameters (``jm.pad_params``) only the first ``num_experts`` experts are
    seen.

    Args:
      x: [..., H], floating.
      params: ``router`` [H, E], and ``router_bias`` and ``score_bias`` [E] where the config asks for them.
      cfg: the layer; ``cfg.router`` is a name in ROUTERS or a callable of the same signature. A callable gets
        f32 logits [T, E] with all leading dimensions in T, and f32[E] or None for the bias.

    Returns:
      Route: ids i32[..., K], weights f32[..., K], scores and logits f32[..., E].

    Raises:
      ConfigError: an argument is of another type, a shape or dtype does not fit the config, a bias is missing
        or not asked for, or a callable router returned other shapes.
    """
    cure = "pass route(x, params, cfg)"
    check_array("x", x, cure)
    check_type("params", params, MoEParams, cure)
    check_type("cfg", cfg, MoEConfig, cure)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ConfigError(rule("x.dtype", str(x.dtype), "be floating", "cast x, for example to bfloat16"))
    if x.ndim < 1 or x.shape[-1] != cfg.hidden_size:
        raise ConfigError(
            rule("x.shape", x.shape, f"end with hidden_size={cfg.hidden_size}", "pass [..., hidden_size]")
        )
    return choose(x, params, cfg)


def choose(x: jax.Array, params: MoEParams, cfg: MoEConfig) -> Route:
    """``route`` of tokens that have been checked already."""
    return chosen(*scored(x, params, cfg), cfg)


def scored(x: jax.Array, params: MoEParams, cfg: MoEConfig) -> tuple[jax.Array, jax.Array | None]:
    """The logits f32[..., E] of tokens that have been checked already, and the bias of the choice, f32[E]."""
    experts = cfg.num_experts
    weight = _expert_slice("router", params.router, True, (cfg.hidden_size, experts))
    router_bias = _expert_slice("router_bias", params.router_bias, cfg.router_bias, (experts,))
    score_bias = _expert_slice("score_bias", params.score_bias, cfg.score_bias, (experts,))
    logits = product(x, weight)
    if router_bias is not None:
        logits = logits + router_bias.astype(jnp.float32)
    if score_bias is not None:
        score_bias = jax.lax.stop_gradient(score_bias.astype(jnp.float32))
    return logits, score_bias


def chosen(logits: jax.Array, score_bias: jax.Array | None, cfg: MoEConfig) -> Route:
    """What ``cfg.router`` makes of logits f32[..., E]."""
    router = cfg.router if callable(cfg.router) else ROUTERS[cfg.router]
    flat = logits.reshape(-1, cfg.num_experts)
    ids, weights, scores = _checked_choice(router(flat, score_bias, cfg), flat.shape, cfg)
    lead = logits.shape[:-1]
    return Route(
        ids=ids.astype(jnp.int32).reshape(*lead, cfg.top_k),
        weights=weights.astype(jnp.float32).reshape(*lead, cfg.top_k),
        scores=scores.astype(jnp.float32).reshape(logits.shape),
        logits=logits,
    )


def _checked_choice(choice: Any, shape: tuple[int, ...], cfg: MoEConfig) -> tuple[jax.Array, ...]:
    """What a router returned, if it is ids, weights and scores; a user's may return anything."""
    cure = f"change what router={cfg.router!r} returns"
    if not isinstance(choice, (tuple, list)) or len(choice) != 3:
        raise ConfigError(rule("router(...)", type(choice).__name__, "be (ids, weights, scores)", cure))
    narrow = (shape[0], cfg.top_k)
    wanted = (
        ("ids", jnp.integer, narrow),
        ("weights", jnp.floating, narrow),
        ("scores", jnp.floating, shape),
    )
    for array, (name, kind, want) in zip(choice, wanted, strict=True):
        if array.shape != want:
            raise ConfigError(rule(f"{name}.shape", array.shape, f"be {want}", cure))
        if not jnp.issubdtype(array.dtype, kind):
            raise ConfigError(rule(f"{name}.dtype", str(array.dtype), f"be of kind {kind.__name__}", cure))
    return tuple(choice)


def check_route(route: Any, lead: tuple[int, ...], cfg: MoEConfig) -> None:
    """Raises ConfigError unless what a caller gives is a route of tokens with these leading dimensions."""
    check_type("route", route, Route, "pass what jm.route returns, or a jm.Route of four arrays")
    wanted = (
        ("ids", jnp.integer, cfg.top_k),
        ("weights", jnp.floating, cfg.top_k),
        ("scores", jnp.floating, cfg.num_experts),
        ("logits", jnp.floating, cfg.num_experts),
    )
    for name, kind, last in wanted:
        array, want = getattr(route, name), (*lead, last)
        check_array(f"route.{name}", array, "pass one")
        if array.shape != want:
            cure = "make it for this x and this cfg"
            raise ConfigError(rule(f"route.{name}.shape", array.shape, f"be {want}", cure))
        if not jnp.issubdtype(array.dtype, kind):
            must = f"be of kind {kind.__name__}"
            raise ConfigError(rule(f"route.{name}.dtype", str(array.dtype), must, "cast it"))


def in_rows(route: Route) -> Route:
    """A route that a caller gave, of any leading dimensions, as ``choose`` makes it of tokens in rows."""

    def as_rows(array: jax.Array) -> jax.Array:
        array = array.reshape(-1, array.shape[-1])
        if not jnp.issubdtype(array.dtype, jnp.integer):
            return array.astype(jnp.float32)
        if array.dtype.itemsize > 4:
            # What int32 cannot hold is no expert's id, and must not become one.
            array = jnp.where((array >= 0) & (array <= jnp.iinfo(jnp.int32).max), array, -1)
        return array.astype(jnp.int32)

    return jax.tree.map(as_rows, route)


def _expert_slice(name: str, array: Any, used: bool, shape: tuple[int, ...]) -> Any:
    """The first E columns of a router parameter, or None where the config does not use it."""
    if not used:
        if array is not None:
            raise ConfigError(
                f"params.{name} is given but cfg.{name}=False; set {name}=True in MoEConfig or pass None"
            )
        return None
    if array is None:
        raise ConfigError(rule(f"params.{name}", None, f"have shape {shape}", "make it with jm.init_params"))
    if array.ndim != len(shape) or array.shape[:-1] != shape[:-1] or array.shape[-1] < shape[-1]:
        raise ConfigError(
            rule(
                f"params.{name}.shape",
                array.shape,
                f"be {shape}, or wider where padded",
                "make params and cfg agree on hidden_size and num_experts",
            )
        )
    return jnp.asarray(array)[..., : shape[-1]]
