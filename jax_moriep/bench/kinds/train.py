"""A training step of a model built as the demo's, with as many windows a rank as its tokens fill.

Every transport begins with the same weights and sees the same text: the losses of its steps are compared with
those of the first one, and the loss before the first step is known, for the model begins by saying nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_moriep.bench.kinds.kind import Kind
from jax_moriep.bench.measure.pool import describe
from jax_moriep.bench.measure.programs import Program
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.cases import Case
from jax_moriep.bench.problem.checks import Check
from jax_moriep.bench.problem.world import World
from jax_moriep.config import TRANSPORTS
from jax_moriep.errors import ConfigError, MoriepError, rule

_LEAST_STEPS = 3
_HEAD_WIDTH = 64
"""Of attention, where the model is wide enough for more than four heads."""
_TOLERANCE = 2e-2
"""Of a loss in nats: transports agree to the bit, but XLA may cut their products differently."""


@dataclasses.dataclass(frozen=True)
class Data:
    """For each transport the demo's trainer, its first state and a batch."""

    trainers: dict[str, Any]
    states: dict[str, Any]
    tokens: jax.Array


def _steps(trainer: Any, count: int, state: Any, tokens: jax.Array) -> jax.Array:
    """f32[count], the loss before each step."""

    def once(i: jax.Array, carried: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        state, losses = carried
        state, loss, _ = trainer.step(state, tokens)
        return state, losses.at[i].set(loss)

    return lax.fori_loop(0, count, once, (state, jnp.zeros(count, jnp.float32)))[1]


def _check(name: str, losses: dict[str, list[float]], result: jax.Array) -> list[Check]:
    """Compares the losses of some steps."""
    found = np.asarray(result.addressable_data(0))
    losses[name] = found.tolist()
    first, *others = (abs(a - b) for a, b in zip(found, next(iter(losses.values())), strict=True))
    checks = [Check(name, "step", "loss before the first step", abs(float(found[0]) - math.log(256)), 1e-3)]
    checks.append(
        Check(name, "step", "losses against the first one's", float(max(first, *others)), _TOLERANCE)
    )
    # Learning letters' frequencies takes more than this off.
    checks.append(Check(name, "step", "loss after some steps", float(found[-1]), math.log(256) - 0.1))
    return checks


class Train(Kind):
    """A step of each transport, some in one program."""

    name = "train"
    operations = ("step",)
    comparable = TRANSPORTS
    compared = ("native", "collective")
    iterations = (5, 1)
    repeats_on_gpus = 5
    has_layers = True

    def check(self, case: Case) -> None:
        """See ``Kind``."""
        super().check(case)
        if case.hidden % 8:
            must = "be a multiple of 8 in training"
            raise ConfigError(rule("hidden", case.hidden, must, "four heads of pairs need it"))

    def sizes(self, case: Case) -> str:
        """See ``Kind``."""
        return f"{case.layers} layers, {super().sizes(case)}"

    def make_data(self, case: Case, world: World) -> Data:
        """Builds the model on the mesh.

        Raises:
          MoriepError: what the demo needs is not installed.
        """
        try:
            # Imported here: no other kind of run needs flax, optax and orbax.
            from jax_moriep.demo import data as demo_data
            from jax_moriep.demo import model as demo_model
            from jax_moriep.demo import settings as demo_settings
            from jax_moriep.demo import train as demo_train
        except ImportError as e:
            raise MoriepError(
                f"the demo cannot be imported ({describe(e)}); pip install 'jax-moriep[flax]'"
            ) from e

        rng = np.random.default_rng(case.seed)
        # Letters of which some are frequent: there is something to learn at once.
        letters = np.minimum(rng.geometric(0.1, 1 << 20), demo_data.VOCABULARY - 1).astype(np.uint8)
        corpus = demo_data.Corpus(letters, letters, 1, 1)
        trainers = {}
        for name in case.compare:
            settings = demo_settings.Settings(
                ranks=case.ranks,
                steps=10,
                experts=case.experts,
                transport=name,
                seed=case.seed,
                checkpoint_dir="",
                checkpoint_every=1,
                resume=False,
            )
            windows = max(1, case.tokens // settings.context) * case.ranks
            # Adam moves every weight as far, so a sum over more of them takes smaller steps.
            width = demo_model.ModelConfig.width
            rate = settings.learning_rate * width / max(width, case.hidden)
            settings = dataclasses.replace(settings, windows=windows, learning_rate=rate)
            model = demo_model.ModelConfig(
                case.experts,
                name,
                dtype=case.dtype,
                width=case.hidden,
                layers=case.layers,
                heads=max(4, case.hidden // _HEAD_WIDTH),
                top_k=case.top_k,
                expert_width=case.intermediate,
            )
            trainers[name] = demo_train.Trainer(settings, world.mesh, corpus, model)
        states = {name: trainer.init() for name, trainer in trainers.items()}
        return Data(trainers, states, next(iter(trainers.values())).train_batch(0))

    def calls(self, case: Case, world: World, data: Data) -> list[Call]:
        """Some steps of each transport, in one program that leaves the first state as it is."""
        del world
        count = max(_LEAST_STEPS, case.repeats)
        losses: dict[str, list[float]] = {}
        made = []
        for name in case.compare:
            operands = (data.states[name], data.tokens)
            # The trainer's own step donates its state; inside another program it does not.
            program = Program(jax.jit(functools.partial(_steps, data.trainers[name], count)), operands)
            check = functools.partial(_check, name, losses)
            made.append(
                Call(name, "step", functools.partial(program, *operands), check, count, programs=(program,))
            )
        return made
