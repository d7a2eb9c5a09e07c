"""Every matrix instruction: the place of each element and, of whole numbers, the exact product."""

import zlib

import numpy as np
import pytest

from isa import kernels, simulator, table_matrix, toolchain

CASES = table_matrix.CASES


def words(values, count):
    """[64, n] of any type -> uint32 [64, count], zero behind the values."""
    out = np.zeros((64, count), np.uint32)
    data = np.ascontiguousarray(values).view(np.uint8)
    out.view(np.uint8)[:, : data.shape[1]] = data
    return out


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    toolchain.simulator()
    folder = tmp_path_factory.mktemp("matrix")
    source = kernels.source([table_matrix.kernel(one, f"case{i}") for i, one in enumerate(CASES)])
    code = toolchain.assemble(source, folder / "cases.co")
    inputs, launches = [], []
    for i, one in enumerate(CASES):
        a, b, c = table_matrix.operands(one, np.random.default_rng(zlib.crc32(one.id.encode())))
        inputs.append((a, b, c))
        arguments = [words(a, 4), words(b, 4), words(c, 32), np.zeros((64, 32), np.uint32)]
        launches.append(simulator.Launch(f"case{i}", arguments))
    return inputs, simulator.run(code, launches, folder)


@pytest.mark.parametrize("i", range(len(CASES)), ids=[f"{i}-{one.id[:60]}" for i, one in enumerate(CASES)])
def test_matrix(outcomes, i):
    one, inputs, result = CASES[i], outcomes[0][i], outcomes[1][i]
    assert result.fault is None, f"{one.text}: {result.fault}"
    right, size = table_matrix.expected(one, *inputs)
    count = right.shape[1]
    got = np.ascontiguousarray(result.buffers[3][:, : one.registers]).view(one.out_type)
    assert got.shape == (64, count)
    if one.whole:
        wrong = got != right.astype(one.out_type)
    else:
        # Each of the k sums and the last one may round once.
        wrong = ~(
            np.abs(got.astype(np.longdouble) - right) <= (one.k + 1) * np.finfo(one.out_type).eps * size
        )
    places = [
        f"lane {lane} element {e}: got {got[lane, e]} expected {right[lane, e]}"
        for lane, e in np.argwhere(wrong)[:8]
    ]
    assert not wrong.any(), f"{one.text}: {wrong.sum()} elements wrong\n" + "\n".join(places)
    beyond = result.buffers[3][:, one.registers :]
    assert (beyond == 2**32 - 1).all(), f"{one.text}: writes behind its destination"
