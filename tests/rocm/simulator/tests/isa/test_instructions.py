"""Every scalar and vector instruction against its meaning in NumPy, on special and on random operands."""

import zlib

import numpy as np
import pytest

from isa import (
    frame,
    kernels,
    simulator,
    table_convert,
    table_float,
    table_integer,
    table_lanes,
    table_packed,
    table_salu,
    toolchain,
)

TABLES = {
    "salu": table_salu.CASES,
    "integer": table_integer.CASES,
    "float": table_float.CASES,
    "convert": table_convert.CASES,
    "packed": table_packed.CASES,
    "lanes": table_lanes.CASES,
}
PLACES = [(table, i) for table, cases in TABLES.items() for i in range(len(cases))]


class Batches:
    """A table's cases, all run when the first of them is asked for."""

    def __init__(self, folder):
        self.folder = folder
        self.done = {}

    def of(self, table):
        if table not in self.done:
            self.done[table] = self._run(table)
        return self.done[table]

    def _run(self, table):
        folder = self.folder / table
        folder.mkdir()
        cases = TABLES[table]
        source = kernels.source([frame.kernel(one, f"case{i}") for i, one in enumerate(cases)])
        code = toolchain.assemble(source, folder / "cases.co")
        inputs, launches = [], []
        for i, one in enumerate(cases):
            lanes, state = frame.operands(one, np.random.default_rng(zlib.crc32(one.id.encode())))
            out = [np.zeros((one.waves, frame.LANES, 4), np.uint32), np.zeros_like(state)]
            inputs.append((lanes, state))
            launches.append(simulator.Launch(f"case{i}", [lanes, state, *out], grid=(one.waves, 1, 1)))
        return inputs, simulator.run(code, launches, folder)


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    toolchain.simulator()
    return Batches(tmp_path_factory.mktemp("instructions"))


@pytest.mark.parametrize(("table", "i"), PLACES, ids=[f"{t}-{i}-{TABLES[t][i].id[:60]}" for t, i in PLACES])
def test_instruction(batches, table, i):
    one = TABLES[table][i]
    inputs, results = batches.of(table)
    result = results[i]
    assert result.fault is None, f"{one.text}: {result.fault}"
    lanes, state = inputs[i]
    frame.check(one, lanes, state, frame.Outcome(*result.buffers[2:]))
