"""What the formats require an exchange's kernels to read and write at least, counted from the routes.

NumPy alone, of one rank. n tokens come to it, u of its C rows are used:

- **collect**, from MORI's buffers to XLA's: of each arrival the token, its ids, weights and source are read
  once and written once, the source in MORI's numbers too, along which they go back. In a replay the tokens
  alone.
- **expand**: of each arrival the token, ids and source are read once, of each used row the weight; the C
  rows, their padding among them, and their weights are written once, and the routes of all R * T tokens and
  the experts' counts.
- **reexpand**, in a replay: of each arrival the token, source and routes are read once; the C rows are
  written once.
- **gather**: each used row is read once, and of each arrival the source and the routes; of each arrival the
  token is written once.

To each come the number of arrivals, the rank and the order, 4 bytes each, where it needs them. What a
kernel keeps for another one is not required by a format: it counts as too much. **share** and **seal**, the
beginning of a step and the end of a combine, move words and the order only; a part of what share reads
is waiting.
"""

import dataclasses

import numpy as np

from tests.rocm.counted_inputs import Given, Sizes


@dataclasses.dataclass(frozen=True)
class Routed:
    """What comes to one rank: n arrivals, which fill u rows; and what of that is not its own.

    ``sent`` are this rank's tokens that go to other ranks, one for each.
    """

    arrivals: int
    rows: int
    others_arrivals: int
    others_rows: int
    sent: int


def routed(given: Given, sizes: Sizes, capacity: int, block: int, rank: int) -> Routed:
    """Walks through the experts of a rank; what does not fit into its rows is dropped."""
    owner = np.where(given.ids >= 0, given.ids // sizes.local_experts, -1)
    rows, start = np.zeros(sizes.ranks, int), 0
    for expert in range(rank * sizes.local_experts, (rank + 1) * sizes.local_experts):
        sources = np.nonzero(given.ids == expert)[0]  # in the order of the ranks
        np.add.at(rows, sources[: max(0, capacity - start)], 1)
        start += -(-len(sources) // block) * block
    arrivals = np.sum((owner == rank).any(axis=-1), axis=-1)
    sent = sum(int(np.sum((owner[rank] == r).any(axis=-1))) for r in range(sizes.ranks) if r != rank)
    return Routed(
        arrivals=int(arrivals.sum()),
        rows=int(rows.sum()),
        others_arrivals=int(arrivals.sum() - arrivals[rank]),
        others_rows=int(rows.sum() - rows[rank]),
        sent=sent,
    )


def required(sizes: Sizes, capacity: int, found: Routed) -> dict[str, dict[str, int]]:
    """Bytes read and written, for each phase and each operation."""
    word = 4
    tokens = found.arrivals * sizes.row_bytes
    sources = found.arrivals * word
    routes = found.arrivals * sizes.top_k * word
    order = 2 * word
    number_of_arrivals = rank = word
    rows = capacity * sizes.row_bytes
    all_routes = sizes.ranks * sizes.tokens * sizes.top_k * word
    return {
        "dispatch": {
            "collect": 2 * (tokens + 2 * routes + sources) + sources + number_of_arrivals + order,
            "expand": (tokens + routes + sources + found.rows * word + number_of_arrivals + rank)
            + (rows + capacity * word + all_routes + sizes.local_experts * word),
        },
        "combine": {
            "gather": found.rows * sizes.row_bytes + routes + sources + number_of_arrivals + tokens,
        },
        "replay": {
            "collect": 2 * tokens + number_of_arrivals + order,
            "reexpand": tokens + routes + sources + number_of_arrivals + rows,
        },
    }


SIGNAL_BYTES = 24
"""What a step says to each other rank: its number, what it exchanges, and its order."""


def native_between_devices(sizes: Sizes, found: Routed, delivery: str) -> dict[str, int]:
    """Bytes that the native transport reads and writes in other devices' memory.

    A dispatch that pulls reads each token that comes from another rank once, all ranks' ids, the weight of
    each used row and the words. One that puts writes each token once to each other rank that it goes to, and
    to all of them its ids, weights and words. A combine writes a row for each token that came. A replay moves
    the dispatch's tokens alone. All signal.
    """
    word, others = 4, sizes.ranks - 1
    came = found.others_arrivals * sizes.row_bytes
    ids = others * sizes.tokens * sizes.top_k * word
    words = others * sizes.words * word
    signals = others * SIGNAL_BYTES
    tokens, weights = {"pull": (came, found.others_rows * word), "put": (found.sent * sizes.row_bytes, ids)}[
        delivery
    ]
    return {
        "dispatch": tokens + ids + weights + words + signals,
        "combine": came + signals,
        "replay": tokens + signals,
    }


def share_between_devices(sizes: Sizes) -> dict[str, int]:
    """What share adds to MORI's own bytes: a dispatch tells each other rank the words; every step signals."""
    others = sizes.ranks - 1
    return {
        "dispatch": others * (SIGNAL_BYTES + 4 * sizes.words),
        "combine": others * SIGNAL_BYTES,
        "replay": others * SIGNAL_BYTES,
    }
