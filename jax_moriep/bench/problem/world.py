"""The processes of a run: their mesh, their barrier, and which ranks are here."""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AXIS = "ep"
_POLL_SECONDS = 1e-4


class Barrier:
    """Lets processes of one machine go on together, within a fraction of a millisecond.

    A device collective would do, but leaving one takes its ranks milliseconds on CPUs, as much as some of the
    calls that are timed. Here each process counts its arrivals in its place of a shared file and looks at the
    others' places. A process that died is the launcher's matter: it ends all.
    """

    def __init__(self, path: Path, num_processes: int, process: int) -> None:
        self.place = path
        self._arrivals = np.memmap(path, np.int64, "r+", shape=(num_processes,))
        self._process = process

    @staticmethod
    def create(path: Path, num_processes: int) -> None:
        """Makes the file; before any process opens it."""
        np.zeros(num_processes, np.int64).tofile(path)

    def __call__(self) -> None:
        """Waits until every process has come here as often as this one."""
        self._arrivals[self._process] += 1
        mine = self._arrivals[self._process]
        while self._arrivals.min() < mine:
            time.sleep(_POLL_SECONDS)

    def leave(self) -> None:
        """Lets the others pass from now on: this process comes no more."""
        self._arrivals[self._process] = np.iinfo(np.int64).max - 1


class World:
    """What a process knows of the run.

    Attributes:
      mesh: all ranks, along one axis.
      ranks: those of this process.
      barrier: waits for all processes.
      on_gpus: whether the devices are GPUs.
    """

    def __init__(self, num_ranks: int, barrier_file: Path) -> None:
        self.mesh = jax.sharding.Mesh(np.array(jax.devices()[:num_ranks]), (AXIS,))
        mine = jax.process_index()
        self.ranks = [rank for rank, device in enumerate(self.mesh.devices) if device.process_index == mine]
        self.on_gpus = self.mesh.devices.flat[0].platform == "gpu"
        self.use_barrier(barrier_file)
        self._threads = concurrent.futures.ThreadPoolExecutor(len(self.ranks))

    def use_barrier(self, barrier_file: Path) -> None:
        """Takes another barrier, which counts from zero."""
        self.barrier = Barrier(barrier_file, jax.process_count(), jax.process_index())
        self._agreements = 0

    def agree(self, flags: list[bool]) -> list[bool]:
        """Which flags are true in all processes; none is where one process has left the barrier."""
        self._agreements += 1
        place = self.barrier.place
        files = [
            place.with_name(f"{place.name}-agreed-{self._agreements}-{i}.json")
            for i in range(jax.process_count())
        ]
        part = files[jax.process_index()].with_suffix(".part")
        part.write_text(json.dumps(flags))
        part.rename(files[jax.process_index()])
        self.barrier()
        said = [json.loads(file.read_text()) if file.exists() else [False] * len(flags) for file in files]
        return [all(of_flag) for of_flag in zip(*said, strict=True)]

    def place(self, array: np.ndarray, spec: PartitionSpec) -> jax.Array:
        """The array over the mesh; every process has all of it."""
        return jax.make_array_from_callback(
            array.shape, NamedSharding(self.mesh, spec), lambda index: array[index]
        )

    def make(self, fn: Callable[[], Any], spec: PartitionSpec) -> Any:
        """What a function gives, made on the devices and split over the mesh."""
        return jax.block_until_ready(jax.jit(fn, out_shardings=NamedSharding(self.mesh, spec))())

    def shards(self, array: jax.Array) -> dict[int, np.ndarray]:
        """This process's part of an array, by rank."""
        return {rank: np.asarray(part) for rank, part in self.parts(array).items()}

    def parts(self, array: jax.Array) -> dict[int, jax.Array]:
        """The same, left on the devices."""
        rank_of = {device: rank for rank, device in enumerate(self.mesh.devices)}
        return {rank_of[shard.device]: shard.data for shard in array.addressable_shards}

    def together(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        """Runs one job for each rank of this process, all at the same time."""
        if len(jobs) == 1:
            return [jobs[0]()]
        return list(self._threads.map(lambda job: job(), jobs))
