"""Serving: prefill and decode of two mixture-of-experts decoders in one process, each program compiled once.

python examples/serve.py, or with quantised experts: python examples/serve.py --quant fp8_block

A prompt is padded to the next of a few buckets and then read by one program; another one adds a token to each
request that runs. Padding and idle places are masked, so they are routed nowhere. Attention is split over the
devices by requests, the experts by experts. At the end what was decoded is compared with a plain forward pass
over whole texts, without a cache.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm

VOCABULARY, LAYERS, HEADS = 256, 2, 4
BUCKETS = (16, 64)
LENGTH = 96
"""Of the longest text, its prompt included."""
PLACES_PER_DEVICE = 2
"""Requests that a device can run at a time."""

mesh = jax.make_mesh((len(jax.devices()),), ("ep",), axis_types=(jax.sharding.AxisType.Auto,))
everywhere, by_request = NamedSharding(mesh, P()), NamedSharding(mesh, P("ep"))


def init(key: jax.Array, cfg: jm.MoEConfig) -> dict:
    """Random weights; the experts' as a server wants them: quantised, padded and sharded, once."""
    width = cfg.hidden_size

    def weight(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * width**-0.5

    def layer(key: jax.Array) -> dict:
        keys = jax.random.split(key, 3)
        moe = jm.init_params(keys[2], cfg)
        return {"qkv": weight(keys[0], width, 3 * width), "out": weight(keys[1], width, width), "moe": moe}

    def model(key: jax.Array) -> dict:
        keys = jax.random.split(key, LAYERS + 2)
        ends = {"embedding": weight(keys[0], VOCABULARY, width), "head": weight(keys[1], width, VOCABULARY)}
        return {"layers": [layer(key) for key in keys[2:]], **ends}

    made = jax.jit(model, out_shardings=everywhere)(key)
    for of_layer in made["layers"]:
        of_layer["moe"] = jm.prepare_params(of_layer["moe"], cfg, mesh)
    return made


def normed(x: jax.Array) -> jax.Array:
    """Without a weight of its own."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def rotated(x: jax.Array, position: jax.Array) -> jax.Array:
    """Rotary positions for x [..., HEADS, D], position [...]."""
    size = x.shape[-1] // 2
    angle = position[..., None, None] * 1000.0 ** (-jnp.arange(size) / size)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1
    )


def qkv(x: jax.Array, layer: dict, position: jax.Array) -> list[jax.Array]:
    """Queries, keys and values [..., HEADS, D] of x [..., H]."""
    q, k, v = jnp.split((normed(x) @ layer["qkv"]).reshape(*x.shape[:-1], 3 * HEADS, -1), 3, axis=-2)
    return [rotated(normed(q), position), rotated(normed(k), position), v]


def attended(x: jax.Array, layer: dict, qkv: tuple[jax.Array, ...], seen: jax.Array) -> jax.Array:
    """x [B, S, H] and what its queries find among B x M keys, where seen [B, S, M] lets them look."""
    found = jax.nn.dot_product_attention(*qkv, mask=seen[:, None])
    return x + found.reshape(x.shape) @ layer["out"]


def experts(x: jax.Array, layer: dict, cfg: jm.MoEConfig, mask: jax.Array) -> jax.Array:
    """x [..., H] and what the experts add; mask [...] is False where there is no token."""
    return x + jm.ep_moe(normed(x), layer["moe"], cfg, mesh=mesh, token_mask=mask)[0]


def logits(x: jax.Array, weights: dict) -> jax.Array:
    """[..., VOCABULARY] of x [..., H]."""
    return normed(x) @ weights["head"]


def causal(length: int) -> jax.Array:
    """bool[1, S, S]: a token sees itself and those before it."""
    return jnp.tril(jnp.ones((1, length, length), bool))


def forward(weights: dict, tokens: jax.Array, mask: jax.Array, cfg: jm.MoEConfig) -> tuple[jax.Array, list]:
    """Whole texts i32[B, S], real where mask is True: x [B, S, H] behind the layers, and keys and values."""
    x, kept, position = weights["embedding"][tokens], [], jnp.arange(tokens.shape[1])
    for layer in weights["layers"]:
        q, k, v = qkv(x, layer, position)
        kept.append((k, v))
        x = experts(attended(x, layer, (q, k, v), causal(tokens.shape[1])), layer, cfg, mask)
    return x, kept


def prefill(
    weights: dict, cache: list, tokens: jax.Array, length: jax.Array, place: jax.Array, cfg: jm.MoEConfig
) -> tuple[list, jax.Array]:
    """Reads a prompt of ``length`` tokens, i32[bucket]: the cache with it, and the token that comes next."""
    x, kept = forward(weights, tokens[None], jnp.arange(len(tokens))[None] < length, cfg)
    cache = [
        tuple(c.at[place, : len(tokens)].set(new[0]) for c, new in zip(held, of_layer, strict=True))
        for held, of_layer in zip(cache, kept, strict=True)
    ]
    return cache, jnp.argmax(logits(x[0, length - 1], weights))


def decode(
    weights: dict, cache: list, tokens: jax.Array, lengths: jax.Array, busy: jax.Array, cfg: jm.MoEConfig
) -> tuple[list, jax.Array]:
    """Reads one token more for each place, i32[places]: the cache with it, and the tokens that come next."""
    x, added, places = weights["embedding"][tokens], [], jnp.arange(len(tokens))
    seen = jnp.arange(LENGTH) <= lengths[:, None]
    for layer, (keys, values) in zip(weights["layers"], cache, strict=True):
        q, k, v = qkv(x, layer, lengths)
        keys, values = keys.at[places, lengths].set(k), values.at[places, lengths].set(v)
        added.append((keys, values))
        x = attended(x[:, None], layer, (q[:, None], keys, values), seen[:, None])[:, 0]
        x = experts(x, layer, cfg, busy)
    return added, jnp.argmax(logits(x, weights), axis=-1)


@dataclasses.dataclass
class Request:
    """A prompt, how many tokens are wanted, and those that have come."""

    prompt: list[int]
    wanted: int
    answer: list[int] = dataclasses.field(default_factory=list)


class Server:
    """One model: its weights, its cache, its programs, and the requests that wait or run."""

    def __init__(self, cfg: jm.MoEConfig, seed: int) -> None:
        self.cfg = cfg
        self.weights = init(jax.random.key(seed), cfg)
        self.waiting: list[Request] = []
        self.running: list[Request | None] = [None] * (PLACES_PER_DEVICE * mesh.size)
        size = (len(self.running), LENGTH, HEADS, cfg.hidden_size // HEADS)
        self.cache = [tuple(jnp.zeros(size, device=by_request) for _ in "kv") for _ in range(LAYERS)]

        def compiled(step: Callable[..., Any], *operands: Any) -> Any:
            def run(weights: dict, cache: list, *operands: jax.Array) -> tuple[list, jax.Array]:
                return step(weights, cache, *operands, cfg)

            # The cache is donated: a step changes it where it lies.
            program = jax.jit(run, donate_argnums=1, out_shardings=(by_request, everywhere))
            return program.lower(self.weights, self.cache, *operands).compile()

        one, each = np.int32(0), np.zeros(len(self.running), np.int32)
        self.prefill = {size: compiled(prefill, np.zeros(size, np.int32), one, one) for size in BUCKETS}
        self.decode = compiled(decode, each, each, each > 0)

    @property
    def is_busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting) or any(self.running)

    def step(self) -> None:
        """Lets waiting requests in where there is room, and gives each that runs one token more."""
        for place, running in enumerate(self.running):
            if running is None and self.waiting:
                request = self.running[place] = self.waiting.pop(0)
                bucket = next(size for size in BUCKETS if size >= len(request.prompt))
                tokens = np.zeros(bucket, np.int32)
                tokens[: len(request.prompt)] = request.prompt
                self.cache, token = self.prefill[bucket](
                    self.weights, self.cache, tokens, np.int32(len(request.prompt)), np.int32(place)
                )
                request.answer.append(int(token))
        self.running = [r if r is not None and len(r.answer) < r.wanted else None for r in self.running]
        busy = np.array([r is not None for r in self.running])
        if busy.any():
            tokens, lengths = np.zeros((2, len(busy)), np.int32)
            for place, request in enumerate(self.running):
                if request is not None:
                    tokens[place] = request.answer[-1]
                    # The last token has been chosen, but not read.
                    lengths[place] = len(request.prompt) + len(request.answer) - 1
            self.cache, chosen = self.decode(self.weights, self.cache, tokens, lengths, busy)
            for request, token in zip(self.running, np.asarray(chosen).tolist(), strict=True):
                if request is not None:
                    request.answer.append(token)

    def without_cache(self, requests: list[Request]) -> list[list[int]]:
        """The most likely token behind each one before an answer's, by one pass over all whole texts."""
        texts, mask = np.zeros((2, len(requests), LENGTH), np.int32)
        for i, request in enumerate(requests):
            text = request.prompt + request.answer
            texts[i, : len(text)], mask[i, : len(text)] = text, 1
        x, _ = jax.jit(forward, static_argnums=3)(self.weights, texts, mask > 0, self.cfg)
        likely = np.asarray(jnp.argmax(logits(x, self.weights), axis=-1))
        return [
            likely[i, len(r.prompt) - 1 : len(r.prompt) + len(r.answer) - 1].tolist()
            for i, r in enumerate(requests)
        ]


def serve(servers: list[Server], requests: list[list[Request]]) -> None:
    """Serves requests to each server; the models take turns."""
    for server, of_server in zip(servers, requests, strict=True):
        server.waiting += of_server
    while any(server.is_busy for server in servers):
        for server in servers:
            server.step()


def draw_requests(rng: np.random.Generator, count: int) -> list[Request]:
    """Prompts and answers of various lengths."""
    return [
        Request(rng.integers(VOCABULARY, size=rng.integers(1, BUCKETS[-1] + 1)).tolist(), int(wanted))
        for wanted in rng.integers(1, LENGTH - BUCKETS[-1], size=count)
    ]


def main() -> None:
    """Serves two models, and checks what they said and what was compiled."""
    parser = argparse.ArgumentParser(description="Serves two mixture-of-experts decoders.")
    parser.add_argument("--quant", choices=("fp8_block", "fp8_token", "int8_token"), help="of the experts")
    parser.add_argument("--requests", type=int, default=12, help="for each model (default: 12)")
    args = parser.parse_args()

    compilations = []

    def note(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    configs = [
        jm.MoEConfig(8, 2, 64, 128, router="sigmoid_topk", expert_quant=args.quant),
        jm.MoEConfig(6, 3, 128, 96, shared_intermediate_size=64, expert_quant=args.quant),
    ]
    began = time.perf_counter()
    servers = [Server(cfg, seed) for seed, cfg in enumerate(configs)]
    programs = sum(len(server.prefill) + 1 for server in servers)
    print(f"{programs} programs for {mesh.size} devices, ready after {time.perf_counter() - began:.1f} s")
    assert len(compilations) >= programs, "jax does not say any more what it compiles"

    rng = np.random.default_rng(0)
    requests: list[list[Request]] = [[] for _ in servers]
    for wave in range(2):
        compilations.clear()
        began = time.perf_counter()
        new = [draw_requests(rng, args.requests) for _ in servers]
        serve(servers, new)
        seconds = time.perf_counter() - began
        tokens = sum(len(request.answer) for of_server in new for request in of_server)
        print(
            f"wave {wave + 1}: {len(servers) * args.requests} requests, {tokens / seconds:.0f} tokens/s, "
            f"{len(compilations)} compilations"
        )
        assert not compilations, "serving compiled a program"
        requests = [old + of_server for old, of_server in zip(requests, new, strict=True)]

    for server, of_server in zip(servers, requests, strict=True):
        answers = [request.answer for request in of_server]
        assert all(len(request.answer) == request.wanted for request in of_server)
        assert server.without_cache(of_server) == answers, "decoding and the forward pass chose other tokens"
        print(f"{sum(map(len, answers))} tokens are those of a forward pass without a cache")


if __name__ == "__main__":
    main()
