"""The faces of the bench's kinds, and what all kinds share: the pool that compiles, and calls by turns."""

import inspect
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moriep.bench.kinds import kernels, plan, quantised, tune
from jax_moriep.bench.kinds.kind import Kind, Study
from jax_moriep.bench.kinds.table import KINDS, new_case, title_of, transports_of
from jax_moriep.bench.measure import pool, turns
from jax_moriep.bench.measure.pool import Pool
from jax_moriep.bench.measure.programs import Program, on_device
from jax_moriep.bench.measure.turns import Call
from jax_moriep.bench.problem.cases import Case
from jax_moriep.config import TRANSPORTS
from jax_moriep.errors import ConfigError


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_has_the_whole_face(name):
    kind: Kind = KINDS[name]
    assert kind.name == name
    assert kind.operations
    assert set(kind.compared) <= set(kind.comparable)
    assert set(kind.compared_on_gpus) <= set(kind.comparable)
    assert kind.memory_operation in (*kind.operations, "")
    assert min(*kind.iterations, kind.repeats_on_gpus) >= 1
    for method in ("make_data", "calls"):
        assert getattr(type(kind), method) is not getattr(Kind, method)
    case = new_case(name, ranks=1, processes=1)
    assert case.compare == kind.compared
    assert title_of(case).startswith(f"{name}: ")
    assert title_of(case).endswith("uniform routing, 1 ranks in 1 process")
    assert set(transports_of(case)) <= set(TRANSPORTS)
    # What counts bytes can say of each of its operations how many.
    if kind.traffic(case) is not None:
        assert all(kind.times_moved(case, case.compare[0], operation) > 0 for operation in kind.operations)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_refuses_what_it_cannot_compare(name):
    with pytest.raises(ConfigError, match="compare='smoke' must be one of"):
        new_case(name, compare=("smoke",))


@pytest.mark.parametrize("study", [kernels, plan, quantised, tune])
def test_every_study_has_the_face(study: Study):
    assert isinstance(study, Study)
    assert list(inspect.signature(study.run).parameters) == ["asked", "say", "save"]
    assert study.run.__annotations__["asked"] == "Asked"


def test_a_case_has_no_rules_of_one_kind():
    """They are the kind's; those of all kinds hold without it."""
    assert Case("train", hidden=9).compare == ()
    with pytest.raises(ConfigError, match="hidden=9 must be a multiple of 8 in training"):
        new_case("train", hidden=9)


class Spied(Program):
    """A program that compiles nothing, and notes when it would have."""

    running, at_once, order = 0, 0, []
    lock = threading.Lock()

    def __init__(self, name, alone=False, error=None):
        super().__init__(lambda x: x, (jnp.ones(1),), alone)
        self.name, self.error = name, error

    def lower(self):
        self.order.append(f"lower {self.name}")
        if self.error == "lower":
            raise ValueError("it does not trace")

    def compile(self):
        with self.lock:
            if self.alone:
                Spied.running += 1
                Spied.at_once = max(Spied.at_once, Spied.running)
        threading.Event().wait(0.02)
        with self.lock:
            if self.alone:
                Spied.running -= 1
            self.order.append(f"compile {self.name}")
        if self.error == "compile":
            raise ValueError("it does not compile")


@pytest.fixture
def spied(monkeypatch):
    monkeypatch.setattr(Spied, "order", [])
    monkeypatch.setattr(Spied, "at_once", 0)
    return Spied


def test_programs_are_traced_in_order_and_those_alone_are_compiled_last(spied):
    groups = [
        [spied("a", alone=True), spied("b")],
        [spied("c", error="lower"), spied("d")],
        [spied("e", error="compile")],
        [spied("f", alone=True), spied("g")],
    ]
    errors = pool.prepare(groups)
    # A group that does not trace is of no use: its other program is not traced.
    assert [line for line in spied.order if line.startswith("lower")] == [f"lower {n}" for n in "abcefg"]
    compiled = [line for line in spied.order if line.startswith("compile")]
    assert sorted(compiled[:3]) == ["compile b", "compile e", "compile g"]
    assert compiled[3:] == ["compile a", "compile f"]
    assert errors == [
        None,
        "ValueError: it does not trace",
        "ValueError: it does not compile",
        None,
    ]


def test_the_pool_compiles_one_that_is_alone_at_a_time(spied):
    own = Pool()
    for name in "abcd":
        own.start(name, spied(name, alone=True))
        own.start(name.upper(), spied(name.upper()))
    own.wait()
    own.close()
    assert spied.at_once == 1
    assert len(spied.order) == 8


def test_a_program_keeps_no_operands_and_is_compiled_once():
    traced = []

    def double(x):
        traced.append(1)
        return 2 * x

    program = on_device(double, (jnp.ones(3),))
    assert not any(isinstance(value, jnp.ndarray) for value in vars(program).values())
    np.testing.assert_array_equal(program(jnp.arange(3.0)), [0, 2, 4])
    np.testing.assert_array_equal(program.begin(jnp.arange(3.0)), [0, 2, 4])
    assert len(traced) == 1


def test_turns_in_one_process_count_a_repetition_and_leave_out_the_first_round(monkeypatch):
    said, clock = [], iter(range(100))
    monkeypatch.setattr(turns.time, "clock_gettime", lambda _: float(next(clock)))
    calls = [Call(name, "op", lambda name=name: said.append(name), repeats=4) for name in "ab"]
    assert turns.by_turns(calls, 3) == {"a": [0.25] * 3, "b": [0.25] * 3}
    assert "".join(said) == "abababab"


def test_calls_in_a_row_give_the_median_of_rounds(monkeypatch):
    clock = iter([0.0, 6.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    calls = []
    assert turns.in_a_row(lambda: calls.append(1), 2, 3) == 2.0
    assert len(calls) == 1 + 2 * 3
