"""One process of test_mori_exchange.py, which is one rank: python -m tests.rocm.mori_job CASES.

CASES are pairs of a name and its options, in JSON: they share the start, which takes longer than most.

Every rank draws the inputs of all ranks from the same seed, so that each can tell what it must see.
"""

import dataclasses
import json
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.plan import ExchangeShape, Link
from jax_moriep.runtime import group
from jax_moriep.runtime.place import Place
from jax_moriep.transports import mori
from tests import processes
from tests.rocm import wire_oracle

TOKENS, WORDS = 24, 5
SHARDED = P("ep")


class Job:
    """The mesh, the layer and the inputs of all ranks."""

    def __init__(self, ranks: int, rank: int, options: dict):
        self.ranks, self.rank = ranks, rank
        self.mesh = Mesh(np.array(jax.devices()), ("ep",))
        self.dtype = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[options.get("dtype", "float32")]
        kernel = options.get("kernel", "auto")
        self.low_latency = kernel == "IntraNodeLL"
        self.experts = options.get("experts", 3 * ranks + 3)
        tuning = jm.Tuning(mori_kernel=kernel, block_num=options.get("blocks", 2), warp_num_per_block=4)
        self.cfg = jm.MoEConfig(
            self.experts,
            options.get("top_k", 4),
            options.get("hidden", 64),
            8,
            transport="mori",
            wire_dtype=options.get("wire"),
            tuning=tuning,
        )
        self.num_tokens = options.get("tokens", TOKENS)
        self.full = options.get("full", False)
        place = Place.of(self.mesh, "ep")
        self.per_node = ranks // place.num_nodes
        assert place.num_processes == ranks
        assert mori.unavailable_reason(place) is None, mori.unavailable_reason(place)
        self.shape = ExchangeShape.of(self.cfg, ranks, self.num_tokens)
        opened = mori.open(place, self.cfg, self.shape, np.dtype(self.dtype).name)
        assert opened.quantises == (self.cfg.wire_dtype == "fp8")
        self.link = Link(self.shape, "mori", "ep", place.platform, place.architecture, opened)

    def draw(self, seed: int) -> dict[str, np.ndarray]:
        """[R, ...] each; ``there`` is what x is where it arrives."""
        rng = np.random.default_rng(seed)
        ranks, tokens, k = self.ranks, self.num_tokens, self.cfg.top_k
        ids = np.argsort(rng.random((ranks, tokens, self.experts)), axis=-1)[..., :k].astype(np.int32)
        if not self.full:
            ids[rng.random(ids.shape) < 0.2] = -1
            ids[rng.random(ids.shape) < 0.05] = self.experts + 1
            ids[rng.random(ids.shape) < 0.02] = 2**31 - 1
            if tokens:
                ids[:, 0] = -1
            if seed == 1:
                ids[-self.per_node :] = -1  # the last node has no token
        x = rng.normal(size=(ranks, tokens, self.cfg.hidden_size)).astype(self.dtype)
        if self.cfg.wire_dtype == "fp8":
            x = wire_oracle.wild(rng, x.shape, self.dtype)
        return {
            "x": x,
            "there": wire_oracle.there(x) if self.cfg.wire_dtype == "fp8" else x,
            "ids": ids,
            "weights": rng.random(ids.shape, dtype=np.float32),
            "words": rng.integers(-(2**31), 2**31, (ranks, WORDS)).astype(np.int32),
        }

    def put(self, value: np.ndarray) -> jax.Array:
        """What all ranks have, [R, n, ...], as one array [R * n, ...]."""
        flat = value.reshape(-1, *value.shape[2:])
        here = value[self.rank]
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, P("ep")), here, flat.shape)

    def jit(self, body, out_specs=SHARDED):
        return jax.jit(jax.shard_map(body, mesh=self.mesh, in_specs=SHARDED, out_specs=out_specs))

    def ranks_of(self, ids: np.ndarray) -> list[int]:
        """The ranks of a token as MORI adds them: by their first expert, with IntraNodeLL by their last."""
        found = [e // self.shape.num_local_experts for e in ids.tolist() if 0 <= e < self.experts]
        if self.low_latency:
            return list(dict.fromkeys(found[::-1]))[::-1]
        return list(dict.fromkeys(found))

    def arriving(self, drawn: dict) -> set[tuple[int, int]]:
        """(source rank, token) of all that come here."""
        return {
            (r, t)
            for r in range(self.ranks)
            for t in range(self.num_tokens)
            if self.rank in self.ranks_of(drawn["ids"][r, t])
        }

    def check_arrivals(self, drawn: dict, arrivals: dict) -> np.ndarray:
        """Compares what came as a set; gives (source rank, token) of each, in the order of arrival."""
        count = int(arrivals["count"][0])
        want = self.arriving(drawn)
        assert count == len(want), f"rank {self.rank}: {count} and not {len(want)}"
        pairs = np.array(
            [divmod(int(s), max(1, self.num_tokens)) for s in arrivals["sources"][:count]], np.int64
        )
        pairs = pairs.reshape(-1, 2)
        assert {tuple(p) for p in pairs.tolist()} == want
        for place, (r, t) in enumerate(pairs):
            assert arrivals["tokens"][place].tobytes() == drawn["there"][r, t].tobytes(), (place, r, t)
            ids = drawn["ids"][r, t]
            if self.experts != self.shape.num_local_experts * self.ranks:
                ids = np.where(ids < self.experts, ids, -1)
            np.testing.assert_array_equal(arrivals["ids"][place], ids)
            np.testing.assert_array_equal(arrivals["weights"][place], drawn["weights"][r, t])
        return pairs

    def sums(self, drawn: dict, x: np.ndarray) -> np.ndarray:
        """What give_back brings of ``factor(rank) * x``: the f32 sum over the ranks, rounded once; between
        nodes first over the ranks of each, rounded there too."""
        y = np.zeros_like(x)
        for t in range(self.num_tokens):
            of_nodes = {}
            for r in self.ranks_of(drawn["ids"][self.rank, t]):
                of_nodes.setdefault(r // self.per_node, []).append(
                    (x[t].astype(np.float32) * factor(r)).astype(self.dtype)
                )
            sums = [self.sum(of_nodes[node], x.shape[1]) for node in sorted(of_nodes)]
            y[t] = self.sum(sums, x.shape[1])
        return y

    def sum(self, rows: list[np.ndarray], width: int) -> np.ndarray:
        total = np.zeros(width, np.float32)
        for row in rows:
            total += row.astype(np.float32)
        return total.astype(self.dtype)

    def check_scalars(self, drawn: dict, scalars: np.ndarray) -> None:
        """Each route's own number comes back to it, 0 where there is no route."""
        ids = drawn["ids"][self.rank]
        has = (ids >= 0) & (ids < self.experts)
        np.testing.assert_array_equal(
            scalars, np.where(has, drawn["weights"][self.rank] + ids.astype(np.float32), 0)
        )


def factor(rank):
    return 0.25 * (rank + 1)


def local(tree):
    return jax.tree.map(lambda a: np.asarray(a.addressable_shards[0].data), tree)


def own_scalars(job: Job, arrivals) -> jax.Array:
    """A number for each route to an expert of this rank, and 0 for the others."""
    first = jax.lax.axis_index("ep") * job.shape.num_local_experts
    ids = arrivals.ids
    here = (ids >= first) & (ids < first + job.shape.num_local_experts) & (ids < job.experts)
    return jnp.where(here, arrivals.weights + ids, 0.0)


def worked(tokens: jax.Array) -> jax.Array:
    by = (0.25 * (jax.lax.axis_index("ep") + 1)).astype(jnp.float32)
    return (tokens.astype(jnp.float32) * by).astype(tokens.dtype)


def as_dict(arrivals) -> dict:
    return {name: getattr(arrivals, name) for name in ("tokens", "ids", "weights", "sources", "count")}


def round_trip(job: Job, options: dict) -> None:
    """send, give_back with scalars, resend and give_back along its plan."""

    def body(x, ids, weights, words, dx, order):
        arrivals, own, all_words, order = mori.send(job.link, x, ids, weights, words=words, order=order)
        y, scalars, order = mori.give_back(
            job.link, worked(arrivals.tokens), own, order=order, scalars=own_scalars(job, arrivals)
        )
        again, order = mori.resend(job.link, dx, own, order=order)
        dy, none, order = mori.give_back(job.link, worked(again), own, order=order, scalars=None)
        assert none is None
        return as_dict(arrivals), y, scalars, again, dy, all_words, order

    out = (P("ep"), P("ep"), P("ep"), P("ep"), P("ep"), P(), P("ep"))
    step = job.jit(body, out_specs=out)
    order = np.arange(job.ranks, dtype=np.int32).reshape(-1, 1) * 0
    for seed in range(options.get("rounds", 4)):
        drawn = job.draw(seed)
        dx = np.random.default_rng(seed + 1000).normal(size=drawn["x"].shape).astype(job.dtype)
        given = (drawn["x"], drawn["ids"], drawn["weights"], drawn["words"], dx, order)
        arrivals, y, scalars, again, dy, words, order_out = local(step(*map(job.put, given)))
        group.check_failures()
        pairs = job.check_arrivals(drawn, arrivals)
        np.testing.assert_array_equal(words, drawn["words"])
        for place, (r, t) in enumerate(pairs):
            assert again[place].tobytes() == dx[r, t].tobytes()
        np.testing.assert_array_equal(f32(y), f32(job.sums(drawn, drawn["there"][job.rank])))
        np.testing.assert_array_equal(f32(dy), f32(job.sums(drawn, dx[job.rank])))
        job.check_scalars(drawn, scalars)
        assert order_out == [4]


def f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


def any_order(job: Job, options: dict) -> None:
    """Two sends before any give_back, two give_backs before any send, in orders that MORI alone mixes up."""

    def body(x1, x2, ids1, ids2, weights, words, order):
        link = job.link
        a1, own1, _, order = mori.send(link, x1, ids1, weights, words=words, order=order)
        a2, own2, _, order = mori.send(link, x2, ids2, weights, words=words, order=order)
        y2, _, order = mori.give_back(link, worked(a2.tokens), own2, order=order, scalars=None)
        y1, _, order = mori.give_back(link, worked(a1.tokens), own1, order=order, scalars=None)
        again2, order = mori.resend(link, x1, own2, order=order)
        again1, order = mori.resend(link, x2, own1, order=order)
        z1, _, order = mori.give_back(link, worked(again1), own1, order=order, scalars=None)
        z2, _, order = mori.give_back(link, worked(again2), own2, order=order, scalars=None)
        z1_too, _, order = mori.give_back(link, worked(again1), own1, order=order, scalars=None)
        return as_dict(a1), as_dict(a2), y1, y2, z1, z2, z1_too

    step = job.jit(body)
    order = np.zeros((job.ranks, 1), np.int32)
    for seed in range(options.get("rounds", 6)):
        one, two = job.draw(seed), job.draw(seed + 500)
        two["weights"] = one["weights"]
        mine = (one["x"], two["x"], one["ids"], two["ids"], one["weights"], one["words"], order)
        a1, a2, y1, y2, z1, z2, z1_too = local(step(*map(job.put, mine)))
        group.check_failures()
        job.check_arrivals(one, a1)
        job.check_arrivals(two, a2)
        for drawn, x, y in (
            (one, one, y1),
            (two, two, y2),
            (one, two, z1),
            (two, one, z2),
            (one, two, z1_too),
        ):
            np.testing.assert_array_equal(f32(y), f32(job.sums(drawn, x["x"][job.rank])))


def send_alone(job: Job, options: dict) -> None:
    """One send, whose bytes are counted; says how many tokens came, and how many copies went to peers."""
    del options

    def body(x, ids, weights, words, order):
        arrivals, _, _, order = mori.send(job.link, x, ids, weights, words=words, order=order)
        return as_dict(arrivals), order

    drawn = job.draw(0)
    given = (*(drawn[name] for name in ("x", "ids", "weights", "words")), np.zeros((job.ranks, 1), np.int32))
    arrivals, _ = local(job.jit(body)(*map(job.put, given)))
    job.check_arrivals(drawn, arrivals)
    gone = [rank for ids in drawn["ids"][job.rank] for rank in job.ranks_of(ids) if rank != job.rank]
    print(f"came and gone: {arrivals['count'][0]} {len(gone)}", flush=True)


def counted(job: Job, options: dict) -> None:
    """One send and one give_back, whose bytes are counted; says how many copies went to other nodes."""
    del options
    step, arguments, want = there_and_back(job)
    np.testing.assert_array_equal(f32(local(step(*arguments)[0])), f32(want))
    group.check_failures()
    said = mori.describe(Place.of(job.mesh, "ep"), job.cfg, job.shape, np.dtype(job.dtype).name)
    assert said is not None
    assert "between machines: sent by a thread of MORI" in said
    ids = job.draw(0)["ids"][job.rank]
    here = job.rank // job.per_node
    gone = [{rank // job.per_node for rank in job.ranks_of(one)} - {here} for one in ids]
    print(f"crossing: {sum(map(len, gone))}", flush=True)


def there_and_back(job: Job):
    """A program of one send and one give_back, and its arguments."""

    def body(x, ids, weights, words, order):
        arrivals, own, _, order = mori.send(job.link, x, ids, weights, words=words, order=order)
        y, _, order = mori.give_back(job.link, worked(arrivals.tokens), own, order=order, scalars=None)
        return y, order

    drawn = job.draw(0)
    order = np.zeros((job.ranks, 1), np.int32)
    given = (*(drawn[name] for name in ("x", "ids", "weights", "words")), order)
    return job.jit(body), tuple(map(job.put, given)), job.sums(drawn, drawn["there"][job.rank])


def failure_of(step, arguments, seconds: float) -> tuple[str, np.ndarray | None]:
    """What a step says that cannot end well, and what it gives; it takes no longer than that."""
    begin = time.monotonic()
    y = None
    try:
        y = local(step(*arguments)[0])
        group.check_failures()
        said = ""
    except Exception as e:  # noqa: BLE001 - whatever says it
        said = str(e)
    took = time.monotonic() - begin
    assert took < seconds, f"{took} s"
    return said, y


def killed(job: Job, options: dict) -> None:
    """The last rank is killed between two steps; the others name it, and go on saying so."""
    step, arguments, want = there_and_back(job)
    for _ in range(2):
        np.testing.assert_array_equal(f32(local(step(*arguments)[0])), f32(want))
    lost = job.ranks - 1
    if job.rank == lost:
        print(f"rank {job.rank} agrees", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    said, y = failure_of(step, arguments, 3 * options["timeout"])
    assert f"rank {lost} did not arrive" in said or f"rank {lost} " in said or "has failed" in said, said
    assert y is None or np.isnan(f32(y)).all()
    print(f"rank {job.rank} saw: {said}", flush=True)
    later, _ = failure_of(step, arguments, 1)
    assert later, "nothing was said of the failure"


def stopped_inside(job: Job, options: dict) -> None:
    """Goes round until it is told that another rank was killed, wherever that was."""
    step, arguments, _ = there_and_back(job)
    said = ""
    for _ in range(options["rounds"]):
        said, y = failure_of(step, arguments, 3 * options["timeout"])
        if said:
            assert y is None or np.isnan(f32(y)).all()
            break
        print("again", flush=True)
    print(f"rank {job.rank} saw: {said}", flush=True)


def another_program(job: Job, options: dict) -> None:
    """One rank runs another program, which both learn; then all begin anew."""
    step, arguments, want = there_and_back(job)
    local(step(*arguments))

    def body(x, ids, weights, words, order):
        arrivals, own, _, order = mori.send(job.link, x, ids, weights, words=words, order=order + 1)
        y, _, order = mori.give_back(job.link, worked(arrivals.tokens), own, order=order, scalars=None)
        return y, order

    other = job.jit(body) if job.rank == 1 else step
    said, y = failure_of(other, arguments, 2 * options["timeout"])
    assert "runs another program" in said or "has failed" in said, said
    assert y is None or np.isnan(f32(y)).all()
    print(f"rank {job.rank} saw: {said}", flush=True)
    place = Place.of(job.mesh, "ep")
    for _ in range(2):
        mori.open(place, job.cfg, job.shape, np.dtype(job.dtype).name, again=True)
        np.testing.assert_array_equal(f32(local(step(*arguments)[0])), f32(want))
        group.check_failures()


def another_config(job: Job, options: dict) -> None:
    """One rank is told of wider tokens."""
    del options
    cfg = dataclasses.replace(job.cfg, hidden_size=64 * (job.rank + 2))
    shape = ExchangeShape.of(cfg, job.ranks, job.num_tokens)
    try:
        mori.open(Place.of(job.mesh, "ep"), cfg, shape, "float32", again=True)
    except jm.TransportError as e:
        print(f"rank {job.rank} saw: {e}", flush=True)


CASES = {
    "another_config": another_config,
    "round_trip": round_trip,
    "send_alone": send_alone,
    "counted": counted,
    "any_order": any_order,
    "killed": killed,
    "stopped_inside": stopped_inside,
    "another_program": another_program,
}


def main(cases: list[tuple[str, dict]]) -> None:
    processes.join()
    ranks, rank = jax.process_count(), jax.process_index()
    for case, options in cases:
        CASES[case](Job(ranks, rank, options), options)
    print(f"rank {rank} agrees", flush=True)
    if any(options.get("abrupt") for _, options in cases):
        # The first process serves jax.distributed, and who comes later ends with it.
        if rank == 0:
            time.sleep(max(options.get("linger", 0) for _, options in cases))
        # Not the long way out: jax.distributed would wait for the dead.
        os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
