"""Prints the tables of docs/benchmarks.md that are counted on the simulated MI300X.

Usage, in the repository's root: .venv/bin/python -m tests.rocm.count_table
"""

import tempfile
from pathlib import Path

from tests.rocm import counted
from tests.rocm import counted_oracle as oracle
from tests.rocm.counted_inputs import Given
from tests.rocm.test_counted import SIZES, TIGHT


def mean(values) -> int:
    values = list(values)
    return round(sum(values) / len(values))


def row(*cells: object) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


def operations(runs: list[tuple[counted.Sizes, list[counted.Counts]]]) -> list[str]:
    """A line for each operation around MORI's kernels and each capacity."""
    lines = [row("C", "in", "kernels", "required", "counted", "", "lines"), "|" + "---|" * 7]
    for sizes, ranks in runs:
        capacity, block = counted.capacity_and_block(sizes)
        given = Given.draw(sizes)
        found = [oracle.routed(given, sizes, capacity, block, rank) for rank in range(sizes.ranks)]
        for phase, names in counted.OPERATIONS.items():
            for operation, kernels in names.items():
                sums = [counted.total(one[phase], kernels) for one in ranks]
                required = mean(oracle.required(sizes, capacity, one)[phase][operation] for one in found)
                moved = mean(map(counted.requested, sums))
                lines_touched = mean(
                    sum(counted.touched(one, home) for home in counted.HOMES) for one in sums
                )
                lines.append(
                    row(capacity, phase, operation, required, moved, f"{moved / required:.3f}", lines_touched)
                )
    return lines


def devices(runs: dict[str, list[counted.Counts]]) -> list[str]:
    """A line for each way to exchange: what it moves between devices, and what it touches at home."""
    header = [f"{phase}: {what}" for phase in ("dispatch", "combine") for what in ("between devices", "own")]
    lines = [row("", *header), "|" + "---|" * 5]
    for name, ranks in runs.items():
        cells = []
        for phase in ("dispatch", "combine"):
            cells.append(mean(counted.between_devices(one[phase]) for one in ranks))
            own = (counted.touched(kernel, "own") for one in ranks for kernel in one[phase].values())
            cells.append(round(sum(own) / len(ranks)))
        lines.append(row(name, *cells))
    return lines


def main() -> None:
    with tempfile.TemporaryDirectory() as root:

        def folder(name: str) -> Path:
            path = Path(root) / name
            path.mkdir()
            return path

        mori = counted.of_transport("mori", SIZES, folder("mori"))
        tight = counted.of_transport("mori", TIGHT, folder("tight"))
        alone = counted.of_mori_alone(SIZES, folder("alone"))
        native = counted.of_transport("native", SIZES, folder("native"))
    print("\n".join(operations([(SIZES, mori), (TIGHT, tight)])), end="\n\n")
    ways = {"MORI alone": alone, '`transport="mori"`': mori, '`transport="native"`': native}
    print("\n".join(devices(ways)))


if __name__ == "__main__":
    main()
