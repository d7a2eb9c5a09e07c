"""Launches on the simulator: many kernels of one code object in one process."""

import dataclasses
import subprocess
from pathlib import Path

import numpy as np

from isa import toolchain


@dataclasses.dataclass
class Launch:
    """A kernel with its shape and its arguments, arrays that the kernel may write."""

    kernel: str
    arguments: list
    grid: tuple = (1, 1, 1)
    block: tuple = (64, 1, 1)
    lds: int = 0


@dataclasses.dataclass
class Result:
    """What a launch left: the buffers, and the text of the fault that ended it, or None."""

    buffers: list
    fault: str | None


def run(code_object, launches, folder, *options, timeout=240):
    """Runs the launches one after the other, each whatever became of the one before."""
    folder = Path(folder)
    lines = []
    for i, launch in enumerate(launches):
        words = [
            launch.kernel,
            f"grid={_triple(launch.grid)}",
            f"block={_triple(launch.block)}",
            f"lds={launch.lds}",
        ]
        for j, argument in enumerate(launch.arguments):
            if isinstance(argument, np.ndarray):
                path = folder / f"{i}.{j}.bin"
                argument.tofile(path)
                words.append(f"buf:{path}")
            else:
                words.append(f"u64:{argument}")
        lines.append(" ".join(words))
    batch = folder / "batch"
    batch.write_text("\n".join(lines) + "\n")
    command = [toolchain.simulator(), *options, code_object, batch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.returncode}\n{done.stderr[-4000:]}"
    answers = done.stdout.splitlines()
    assert len(answers) == len(launches), (
        f"{len(answers)} answers to {len(launches)} launches\n{done.stdout[-2000:]}"
    )
    results = []
    for i, (launch, answer) in enumerate(zip(launches, answers, strict=True)):
        name, verdict, *text = answer.split(" ", 2)
        assert name == launch.kernel, answer
        buffers = [
            np.fromfile(folder / f"{i}.{j}.bin", argument.dtype).reshape(argument.shape)
            for j, argument in enumerate(launch.arguments)
            if isinstance(argument, np.ndarray)
        ]
        results.append(Result(buffers, None if verdict == "ok" else text[0].replace("\\n", "\n")))
    return results


def _triple(values):
    return ",".join(map(str, values))
