"""One rank of test_mori.py: rounds of dispatch and combine by the real amd-mori, checked against NumPy.

Usage: python -m tests.rocm.mori_rank CONFIG RANK [UNIQUE_ID]. Without an id the rank makes one and prints it.
Every rank draws the inputs of all ranks from the same seed, so that each can tell what it must receive.
"""

import ctypes
import json
import sys
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tests.rocm import hip
from tests.rocm.counted_inputs import Given

# (NumPy type, hipDataType) of a row's elements.
TYPES = {
    "float32": (np.float32, 0),
    "bfloat16": (ml_dtypes.bfloat16, 14),
    "float8_e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, 1000),
}


@dataclass(frozen=True)
class Config:
    """What all ranks of a test know."""

    host: str  # the library of kernels/mori_host.cc
    kernels: str  # the folder of the code object
    ranks: int
    hidden: int
    top_k: int
    experts_per_rank: int
    max_tokens: int
    dtype: str
    rounds: int
    seed: int
    blocks: int = 2
    waves: int = 4
    low_latency: bool = False
    fetch: bool = False  # combine's rows lie in MORI's own buffer, from where peers fetch them
    given: str = ""  # a file of counted.Given: the inputs, in place of drawn ones

    @property
    def received(self) -> int:
        return self.ranks * self.max_tokens


class Results(ctypes.Structure):
    _fields_ = [
        (name, c_void_p)
        for name in (
            "tokens",
            "weights",
            "indices",
            "count",
            "sources",
            "fetched",
            "combined",
            "combined_weights",
        )
    ]


@dataclass
class Inputs:
    """One rank's tokens [T, H], their experts [T, K], of which -1 is none, and weights [T, K]."""

    tokens: np.ndarray
    experts: np.ndarray
    weights: np.ndarray

    def ranks_of(self, token: int, config: Config) -> list[int]:
        """The ranks that a token goes to, in the order of its experts."""
        ranks = [e // config.experts_per_rank for e in self.experts[token].tolist() if e >= 0]
        return list(dict.fromkeys(ranks))


def draw(config: Config, round_number: int) -> list[Inputs]:
    """The inputs of all ranks in one round. The numbers of tokens differ, and some are 0 or the most."""
    if config.given:
        given = Given.load(config.given)
        return [Inputs(*one) for one in zip(given.x, given.ids, given.weights, strict=True)]
    rng = np.random.default_rng([config.seed, round_number])
    dtype = TYPES[config.dtype][0]
    inputs = []
    for _ in range(config.ranks):
        count = int(rng.choice([0, 1, config.max_tokens, rng.integers(2, config.max_tokens)]))
        tokens = rng.normal(size=(count, config.hidden)).astype(dtype)
        num_experts = config.ranks * config.experts_per_rank
        experts = np.argsort(rng.random((count, num_experts)), axis=1)[:, : config.top_k].astype(np.int32)
        experts[rng.random(experts.shape) < 0.1] = -1
        weights = rng.random((count, config.top_k), dtype=np.float32)
        inputs.append(Inputs(tokens, experts, weights))
    return inputs


def expert(rows: np.ndarray, rank: int) -> np.ndarray:
    """What a rank makes of the rows it received: something that tells ranks apart."""
    return (rows.astype(np.float32) * (0.25 * (rank + 1))).astype(rows.dtype)


class Array:
    """Device memory of a fixed size."""

    def __init__(self, size: int):
        self.address = hip.malloc(size)

    def write(self, array: np.ndarray) -> c_void_p:
        if array.nbytes:
            hip.write(self.address, array.tobytes())
        return self.address


def read(address: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(hip.read(c_void_p(address), size) if size else b"", dtype).reshape(shape)


class Rank:
    """This process's handle, its device memory and its stream."""

    def __init__(self, config: Config, rank: int, unique_id: bytes | None):
        self.config, self.rank = config, rank
        self.dtype, self.type_code = TYPES[config.dtype]
        self.host = ctypes.CDLL(config.host)
        self.host.mori_rank_handle.restype = c_void_p
        hip.check("hipSetDevice", c_int(rank))
        buffer = ctypes.create_string_buffer(unique_id or b"", 128)
        if unique_id is None:
            assert self.host.mori_rank_unique_id(buffer) == 0
            print(buffer.raw.hex(), flush=True)
        assert self.host.mori_rank_init(rank, config.ranks, buffer, c_char_p(config.kernels.encode())) == 0
        size = np.dtype(self.dtype).itemsize
        shape = (rank, config.ranks, config.hidden, size, config.max_tokens, config.experts_per_rank)
        how = (config.blocks, config.waves, config.low_latency, config.fetch)
        self.handle = c_void_p(self.host.mori_rank_handle(*shape, config.top_k, *how))
        assert self.handle.value
        # Peers must not dispatch into buffers that this process still clears.
        hip.check("hipDeviceSynchronize")
        self.host.mori_rank_barrier()
        self.stream = hip.stream()
        self.tokens = Array(max(1, config.max_tokens * config.hidden * size))
        self.rows = Array(config.received * config.hidden * size)
        self.experts = Array(config.max_tokens * config.top_k * 4)
        self.weights = Array(config.max_tokens * config.top_k * 4)

    def _call(self, name: str, rows: c_void_p, weights: c_void_p | None, count: int) -> None:
        function = getattr(self.host, name)
        function.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_void_p]
        assert (
            function(self.handle, rows, weights, self.experts.address, count, self.type_code, self.stream)
            == 0
        )
        hip.check("hipStreamSynchronize", self.stream)

    def results(self) -> Results:
        results = Results()
        self.host.mori_rank_results.argtypes = [c_void_p, POINTER(Results)]
        self.host.mori_rank_results(self.handle, byref(results))
        return results

    def dispatch(self, mine: Inputs) -> None:
        tokens, weights = self.tokens.write(mine.tokens), self.weights.write(mine.weights)
        self.experts.write(mine.experts)
        self._call("mori_rank_dispatch", tokens, weights, len(mine.tokens))

    def combine(self, rows: np.ndarray, count: int) -> None:
        if self.config.fetch:
            self.rows.address = c_void_p(self.results().fetched)
        self._call("mori_rank_combine", self.rows.write(rows), None, count)

    def finish(self) -> None:
        self.host.mori_rank_barrier()
        assert self.host.mori_rank_finish(self.handle) == 0


def check_dispatch(config: Config, rank: int, inputs: list[Inputs], results: Results) -> np.ndarray:
    """Compares what a rank received as a set of rows, for their order is free. Gives the rows."""
    expected = {
        (source, token)
        for source, other in enumerate(inputs)
        for token in range(len(other.tokens))
        if rank in other.ranks_of(token, config)
    }
    count = int(read(results.count, (1,), np.int32)[0])
    assert count == len(expected), f"rank {rank} received {count} rows and not {len(expected)}"
    dtype = TYPES[config.dtype][0]
    rows = read(results.tokens, (count, config.hidden), dtype)
    experts = read(results.indices, (count, config.top_k), np.int32)
    weights = read(results.weights, (count, config.top_k), np.float32)
    sources = read(results.sources, (count,), np.int32)
    # A source is numbered rank * (ranks * max_tokens) + token.
    pairs = [divmod(int(source), config.received) for source in sources]
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == expected
    for row, (source, token) in enumerate(pairs):
        given = inputs[source]
        assert rows[row].tobytes() == given.tokens[token].tobytes()
        np.testing.assert_array_equal(experts[row], given.experts[token])
        np.testing.assert_array_equal(weights[row], given.weights[token])
    return rows


def check_combine(config: Config, inputs: list[Inputs], mine: Inputs, results: Results) -> None:
    """A token's result is the float32 sum over the ranks it went to, rounded once."""
    combined = read(results.combined, mine.tokens.shape, mine.tokens.dtype)
    for token in range(len(mine.tokens)):
        total = np.zeros(config.hidden, np.float32)
        for rank in mine.ranks_of(token, config):
            total += expert(mine.tokens[token], rank).astype(np.float32)
        np.testing.assert_array_equal(
            combined[token].astype(np.float32), total.astype(mine.tokens.dtype).astype(np.float32)
        )


def main(config: Config, number: int, unique_id: bytes | None) -> None:
    rank = Rank(config, number, unique_id)
    results = rank.results()
    for round_number in range(config.rounds):
        inputs = draw(config, round_number)
        rank.dispatch(inputs[number])
        rows = check_dispatch(config, number, inputs, results)
        rank.combine(expert(rows, number), len(inputs[number].tokens))
        check_combine(config, inputs, inputs[number], results)
    rank.finish()


if __name__ == "__main__":
    given = bytes.fromhex(sys.argv[3]) if len(sys.argv) > 3 else None
    main(Config(**json.loads(sys.argv[1])), int(sys.argv[2]), given)
