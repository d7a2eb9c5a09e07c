"""What each process of the demo runs: training, measuring, checkpoints and sampling, all on one mesh ("ep",).

Tokens and experts are split over the ranks. Process 0 tells the demo's first process what happens, one line
of JSON at a time (``emit``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.demo import data
from jax_moriep.demo.checkpoint import Checkpoints
from jax_moriep.demo.model import LanguageModel, ModelConfig
from jax_moriep.demo.settings import EVENT_MARK, Settings
from jax_moriep.flax import ScoreBias

PROMPT = 'def read_lines(path):\n    """'
TEMPERATURE = 0.7
EVAL_BATCHES = 12
SCORE_BIAS_RATE = 0.01


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What training changes, and what a checkpoint holds."""

    params: nnx.State
    """Every ``nnx.Param``: the experts' split over the ranks, the others replicated."""
    biases: nnx.State
    """The experts' selection biases, which no gradient reaches."""
    opt_state: optax.OptState


def emit(event: str, **fields: Any) -> None:
    """Tells the demo's first process of an event; only process 0 speaks."""
    if jax.process_index() == 0:
        print(EVENT_MARK + json.dumps({"event": event, **fields}), flush=True)


class Trainer:
    """The compiled programs and the data of one run.

    Args:
      settings: what the user asked for.
      mesh: one axis "ep".
      corpus: the text.
      model_config: the model's sizes; None for the demo's.
    """

    def __init__(
        self,
        settings: Settings,
        mesh: jax.sharding.Mesh,
        corpus: data.Corpus,
        model_config: ModelConfig | None = None,
    ) -> None:
        self.settings, self.mesh, self.corpus = settings, mesh, corpus
        self.num_ranks = mesh.shape["ep"]
        self.windows_per_rank = -(-settings.windows // self.num_ranks)
        self.model_config = model_config or ModelConfig(
            settings.experts, settings.transport, settings.quant, settings.dtype
        )
        schedule = optax.warmup_cosine_decay_schedule(
            0.0,
            settings.learning_rate,
            min(40, settings.steps // 10),
            settings.steps,
            0.02 * settings.learning_rate,
        )
        self.optimizer = optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.05)
        self.replicated, self.split = NamedSharding(mesh, P()), NamedSharding(mesh, P("ep"))
        self.graph, abstract = nnx.split(nnx.eval_shape(self._build))
        self.shardings = nnx.get_named_sharding(abstract, mesh)

    def _build(self) -> LanguageModel:
        return LanguageModel(self.model_config, self.mesh, nnx.Rngs(self.settings.seed))

    def init(self) -> TrainState:
        """The state before the first step."""

        def make() -> TrainState:
            _, params, biases = nnx.split(self._build(), nnx.Param, ...)
            return TrainState(params, biases, self.optimizer.init(params))

        def sharding(path: Any, leaf: Any) -> NamedSharding:
            """Adam's moments are split as their weights are: those below the name of an experts' weight."""
            names = [str(getattr(entry, "key", getattr(entry, "name", ""))) for entry in path]
            return self.split if {"w1", "w2"} & set(names) else self.replicated

        abstract = jax.eval_shape(make)
        return jax.jit(make, out_shardings=jax.tree_util.tree_map_with_path(sharding, abstract))()

    def batch(self, windows: np.ndarray) -> jax.Array:
        """Windows u8[R * B, S + 1], known to every process, as i32[R, B, S + 1] split over the ranks."""
        shaped = windows.reshape(self.num_ranks, -1, windows.shape[-1]).astype(np.int32)
        return jax.make_array_from_callback(shaped.shape, self.split, lambda index: shaped[index])

    def train_batch(self, step: int) -> jax.Array:
        """The tokens of a step."""
        count = self.num_ranks * self.windows_per_rank
        settings = self.settings
        return self.batch(data.train_windows(self.corpus.train, settings.seed, step, count, settings.context))

    def _losses(
        self, params: nnx.State, biases: nnx.State, tokens: jax.Array
    ) -> tuple[jax.Array, list[jm.MoEStats]]:
        """Mean loss in nats of each rank's tokens, f32[R]."""
        logits, stats = nnx.merge(self.graph, params, biases)(tokens[..., :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:])
        return losses.mean(axis=(1, 2)), stats

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(self, state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array, jm.MoEStats]:
        """One step of training: the new state, the mean loss, and the statistics stacked over the layers.

        XLA would add the gradient of each replicated weight over the ranks by a collective of its own, and
        over gloo each of these takes milliseconds, however small it is. So the step works on one copy of
        these weights per rank, whose gradients stay where they are, and adds them all as one array.
        """
        experts, dense = nnx.split_state(state.params, nnx.PathContains("moe"), ...)

        def copy(w: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(
                jnp.broadcast_to(w, (self.num_ranks, *w.shape)), self.split
            )

        def loss(experts: nnx.State, copies: nnx.State) -> tuple[jax.Array, Any]:
            losses, stats = self._losses(nnx.merge_state(experts, copies), state.biases, tokens)
            return losses.sum() / self.num_ranks, (losses, stats)

        copies = jax.tree.map(copy, dense)
        (expert_grads, grads), (losses, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(experts, copies)
        dense_grads, mean_loss = self._add_over_ranks((grads, losses / self.num_ranks))
        updates, opt_state = self.optimizer.update(
            nnx.merge_state(expert_grads, dense_grads), state.opt_state, state.params
        )
        model = nnx.merge(self.graph, state.params, state.biases)
        for block, measured in zip(model.blocks, stats, strict=True):
            block.moe.update_score_bias(measured.expert_counts, SCORE_BIAS_RATE)
        biases = nnx.state(model, ScoreBias)
        # The losses and the entropy would be added over the ranks only to be dropped.
        unused = dict.fromkeys(("load_balance_loss", "z_loss", "router_entropy"))
        stats = jax.tree.map(
            lambda *each: jnp.stack(each), *[dataclasses.replace(s, **unused) for s in stats]
        )
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(params, biases, opt_state), mean_loss, stats

    def _add_over_ranks(self, tree: Any) -> Any:
        """Sums each [R, ...] array over the ranks that hold its parts, by one collective for all."""

        def add(local: Any) -> Any:
            flat, restore = ravel_pytree(jax.tree.map(lambda part: part[0], local))
            return restore(jax.lax.psum(flat, "ep"))

        return jax.shard_map(add, mesh=self.mesh, in_specs=P("ep"), out_specs=P())(tree)

    @functools.partial(jax.jit, static_argnums=0)
    def _eval_step(self, params: nnx.State, biases: nnx.State, tokens: jax.Array) -> jax.Array:
        return self._losses(params, biases, tokens)[0].mean()

    def heldout_loss(self, state: TrainState) -> float:
        """Mean loss on held-out text, in nats per byte."""
        losses = [self._eval_step(state.params, state.biases, self.batch(w)) for w in self.heldout_windows()]
        return float(np.mean([float(loss) for loss in losses]))

    def heldout_windows(self) -> list[np.ndarray]:
        """The windows that are measured, in batches."""
        count = self.num_ranks * self.windows_per_rank
        windows = data.heldout_windows(self.corpus.heldout, EVAL_BATCHES * count, self.settings.context)
        return np.split(windows, EVAL_BATCHES)

    @functools.partial(jax.jit, static_argnums=0)
    def _continue(self, state: TrainState, text: jax.Array) -> jax.Array:
        """Adds bytes to i32[R, 1, S]; every rank draws a text of its own."""
        length = self.settings.context
        model = nnx.merge(self.graph, state.params, state.biases)
        key = jax.random.key(self.settings.seed)

        def add(i: jax.Array, text: jax.Array) -> jax.Array:
            window = jax.lax.dynamic_slice_in_dim(text, i, length, axis=2)
            logits = model(window)[0][:, 0, -1] / TEMPERATURE
            drawn = jax.random.categorical(jax.random.fold_in(key, i), logits).astype(text.dtype)
            text = jax.lax.dynamic_update_slice_in_dim(text, drawn[:, None, None], i + length, axis=2)
            return jax.lax.with_sharding_constraint(text, self.split)

        count = self.settings.sample_bytes
        text = jnp.pad(text, ((0, 0), (0, 0), (0, count)))
        return jax.lax.fori_loop(0, count, add, text)[..., length:]

    def sample(self, state: TrainState) -> str:
        """A continuation of ``PROMPT``."""
        prompt = np.frombuffer(PROMPT.encode(), np.uint8)[-self.settings.context :]
        start = np.full((self.num_ranks, self.settings.context), data.END_OF_FILE, np.uint8)
        start[:, -len(prompt) :] = prompt
        drawn = self._continue(state, self.batch(start)).addressable_shards[0].data
        text = bytes(np.asarray(drawn).reshape(-1).astype(np.uint8).tolist())
        return text.split(bytes([data.END_OF_FILE]))[0].decode(errors="replace")


def train(settings: Settings) -> None:
    """Runs the demo in one process of the job.

    Args:
      settings: what the user asked for.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("ep",))
    corpus = data.read_corpus()
    trainer = Trainer(settings, mesh, corpus)
    explanation = jm.explain(trainer.model_config.moe(), mesh)
    checkpoints = Checkpoints(settings)
    state = trainer.init()
    history: dict[str, Any] = {"loss": [], "load": [], "heldout_before": None}
    first = 0
    if settings.resume:
        first, state, history = checkpoints.restore(state)
    windows = np.concatenate(trainer.heldout_windows())
    emit(
        "start",
        transport=explanation.transport,
        experts=explanation.experts,
        parameters=sum(w.size for w in jax.tree.leaves(state.params)),
        train_bytes=corpus.train.size,
        train_files=corpus.num_train_files,
        heldout_bytes=corpus.heldout.size,
        heldout_files=corpus.num_heldout_files,
        tokens_per_step=trainer.num_ranks * trainer.windows_per_rank * settings.context,
        byte_frequency_loss=data.byte_frequency_loss(corpus.train, windows[:, 1:]),
        first_step=first,
        history=history,
    )
    if history["heldout_before"] is None:
        history["heldout_before"] = trainer.heldout_loss(state)
        emit("heldout", when="before", nats=history["heldout_before"])
    for step in range(first, settings.steps):
        began = time.perf_counter()
        state, loss, stats = trainer.step(state, trainer.train_batch(step))
        history["loss"].append(float(loss))
        history["load"].append(np.asarray(stats.expert_counts).tolist())
        jm.check_stats(stats)
        emit(
            "step",
            step=step + 1,
            loss=history["loss"][-1],
            load=history["load"][-1],
            seconds=time.perf_counter() - began,
        )
        if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
            checkpoints.save(step + 1, state, history)
            emit("checkpoint", step=step + 1)
    checkpoints.close()
    emit("heldout", when="after", nats=trainer.heldout_loss(state))
    emit("sample", prompt=PROMPT, text=trainer.sample(state))


if __name__ == "__main__":
    train(Settings(**json.loads(sys.argv[1])))
