"""Every load, store and atomic against its meaning, and the regions around it against change."""

import zlib

import numpy as np
import pytest

from isa import kernels, simulator, table_memory, toolchain

CASES = table_memory.CASES


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    toolchain.simulator()
    folder = tmp_path_factory.mktemp("memory")
    source = kernels.source([table_memory.kernel(one, f"case{i}") for i, one in enumerate(CASES)])
    code = toolchain.assemble(source, folder / "cases.co")
    inputs, launches = [], []
    for i, one in enumerate(CASES):
        lanes, memory, exec_ = table_memory.operands(
            one, np.random.default_rng(zlib.crc32(one.text.encode()))
        )
        out = np.zeros((table_memory.WAVES, 64, table_memory.WORDS_OUT), np.uint32)
        inputs.append((lanes, memory, exec_))
        arguments = [lanes, memory, out, exec_]
        launches.append(simulator.Launch(f"case{i}", arguments, grid=(table_memory.WAVES, 1, 1)))
    return inputs, simulator.run(code, launches, folder)


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{i}-{one.id[:60]}" for i, one in enumerate(CASES)])
def test_access(outcomes, i):
    one, (lanes, memory, exec_), result = CASES[i], outcomes[0][i], outcomes[1][i]
    assert result.fault is None, f"{one.text}: {result.fault}"
    _, after, out, _ = result.buffers
    right_out, right_memory = table_memory.expected(one, lanes, memory, exec_)
    wrong = np.argwhere((out != right_out).any(axis=-1))
    lines = [
        f"wave {w} lane {lane} offset {lanes[w, lane, 4]}: got {_hex(out[w, lane])}"
        f" expected {_hex(right_out[w, lane])}"
        for w, lane in wrong[:5]
    ]
    lines += [
        f"wave {w} byte {b}: got {after[w, b]:#x} expected {right_memory[w, b]:#x}, was {memory[w, b]:#x}"
        for w, b in np.argwhere(after != right_memory)[:8]
    ]
    assert not lines, f"{one.text}: {len(wrong)} lanes wrong\n" + "\n".join(lines)


def _hex(words):
    return " ".join(f"{word:x}" for word in words[:6])
