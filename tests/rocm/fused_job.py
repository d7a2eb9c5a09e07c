"""One process of test_fused.py, which is one rank: python -m tests.rocm.fused_job CASE...

Layers with transport="mori" and experts="aiter". Every process draws the same, and has the results of all.
"""

import dataclasses
import os
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_moriep as jm
from jax_moriep.aiter import kernels
from jax_moriep.runtime import group
from tests import processes
from tests.rocm import aiter_oracle as oracle
from tests.rocm import counters
from tests.rocm.aiter_experts_cases import all_to_one
from tests.rocm.mori_job import failure_of

HIDDEN, INNER, EXPERTS, TOP_K = 512, 256, 10, 3
TOKENS = 12  # of a rank
REPLAYS = 6
KILLED_WITHIN = 18  # seconds, three limits of the exchange
# As in test_aiter_experts.py; a token's sum over experts and ranks is rounded more often.
ROUNDING = 0.008
SCHEMES = tuple(kernels.KERNELS)
FOLDER = Path(os.environ.get("JAX_MORIEP_TEST_FOLDER", "."))  # of programs that are kept


def config(scheme, **more):
    settings = {
        "transport": "mori",
        "experts": "aiter",
        "expert_quant": scheme,
        "tuning": jm.Tuning(block_num=2, warp_num_per_block=4),
    }
    return jm.MoEConfig(EXPERTS, TOP_K, HIDDEN, INNER, **settings | more)


def error(found, wanted):
    found, wanted = (np.asarray(a, np.float64) for a in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


class Job:
    """The mesh, and the layers of all schemes."""

    def __init__(self):
        devices = np.array(jax.devices())
        self.mesh = Mesh(devices, ("ep",), axis_types=(AxisType.Auto,))
        self.count = len(devices) * TOKENS - 1
        rng = np.random.default_rng(23)
        self.x = rng.normal(size=(self.count, HIDDEN)).astype(jnp.bfloat16)
        self.all_x = np.concatenate([self.x, self.x[:1]])  # as many for each rank
        self.some = rng.random(self.count) < 0.6
        self.floating = jm.init_params(jax.random.key(3), config("fp8_token"))

    def run(self, cfg, params, x, mask=None, times=1):
        """The results of a layer on all ranks, and its statistics."""
        prepared = jm.prepare_params(params, cfg, self.mesh)
        run = jax.jit(lambda x, params: jm.ep_moe(x, params, cfg, mesh=self.mesh, token_mask=mask))
        text = run.lower(x, prepared).as_text()
        calls = [text.count(f"@moriep_{name}") for name in ("fused_experts", "send", "aiter_experts")]
        found = [run(x, prepared) for _ in range(times)]
        group.check_failures()
        found = [(self.whole(y), jax.tree.map(self.whole, stats)) for y, stats in found]
        return found, calls

    def whole(self, array):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True), np.float32)

    def want(self, cfg, params, x, mask=None):
        """The layer by NumPy: tokens by the wire, if it is float8, then the sum of their experts."""
        plain = jm.quantize_params(params, cfg, "e4m3fnuz")
        w1, w2 = (
            tuple(map(np.asarray, pair)) for pair in ((plain.w1, plain.w1_scale), (plain.w2, plain.w2_scale))
        )
        route = jm.route(jnp.asarray(x), plain, cfg)
        ids, weights = np.asarray(route.ids), np.asarray(route.weights, np.float64)
        ids = ids if mask is None else np.where(mask[:, None], ids, -1)
        rows = oracle.quantised_rows(x, "fp8_block") if cfg.wire_dtype == "fp8" else np.asarray(x, np.float64)
        kernel = kernels.choose(cfg.expert_quant, HIDDEN, INNER)
        assert isinstance(kernel, kernels.Kernel)
        y = np.zeros(rows.shape)
        for k in range(ids.shape[1]):
            order = np.argsort(ids[:, k], kind="stable")
            order = order[ids[order, k] >= 0]
            sizes = np.bincount(ids[order, k], minlength=EXPERTS)
            y[order] += oracle.experts(
                cfg.expert_quant, kernel.tile, 1, rows[order], weights[order, k], sizes, w1, w2
            )
        return y


def every_wire(job, scheme):
    """Tokens as they are and in float8; masks; a rank without a token; all tokens to one expert."""
    everyone, idle = np.ones(job.count, bool), np.ones(job.count, bool)
    idle[:TOKENS] = False
    cases = {
        "as they are": (config(scheme), None),
        "float8": (config(scheme, wire_dtype="fp8"), None),
        "some masked": (config(scheme, wire_dtype="fp8"), job.some),
        "a rank without a token": (config(scheme), idle),
        "no token": (config(scheme), ~everyone),
        "all to one": (config(scheme, router=all_to_one), None),
    }
    for what, (cfg, mask) in cases.items():
        if what == "all to one":
            cfg = dataclasses.replace(cfg, top_k=1)
        ((y, stats),), calls = job.run(cfg, job.floating, job.x, mask)
        assert calls == [1, 0, 0], (what, calls)
        want = job.want(cfg, job.floating, job.x, mask)
        if want.any():
            assert error(y, want) < ROUNDING, (what, error(y, want))
        assert not y[want == 0].any(), what
        routed = job.count if mask is None else mask.sum()
        assert stats.expert_counts.sum() == cfg.top_k * routed, what


def uneven(job, scheme):
    """Rank r has r + 1 tokens, and rank 1 none; two programs by both wires."""
    rank, place = np.divmod(np.arange(job.count), TOKENS)
    mask = (place <= rank) & (rank != 1)
    for wire in (None, "fp8"):
        cfg = config(scheme, wire_dtype=wire)
        ((y, stats),), calls = job.run(cfg, job.floating, job.x, mask)
        assert calls == [1, 0, 0], calls
        want = job.want(cfg, job.floating, job.x, mask)
        assert error(y, want) < ROUNDING, (wire, error(y, want))
        assert not y[~mask].any()
        assert stats.expert_counts.sum() == cfg.top_k * mask.sum()


def replays(job, scheme):
    """The same call again and again: it is recorded once, and results differ by roundings only."""
    found, _ = job.run(config(scheme, wire_dtype="fp8"), job.floating, job.x, times=REPLAYS)
    for y, _ in found[1:]:
        assert error(y, found[0][0]) < ROUNDING


def gradients(job, scheme):
    """A program that is differentiated runs the rows' way, and has the gradients of native's."""
    found = {}
    for transport in ("mori", "native"):
        cfg = config(scheme, transport=transport)
        params = jm.prepare_params(job.floating, cfg, job.mesh)

        def loss(x, router, params, cfg=cfg):
            y, _ = jm.ep_moe(x, dataclasses.replace(params, router=router), cfg, mesh=job.mesh)
            return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size).reshape(y.shape)))

        grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
        given = (job.x, params.router, params)
        assert "@moriep_fused_experts" not in grad.lower(*given).as_text()
        found[transport] = [job.whole(g) for g in grad(*given)]
        group.check_failures()
    for ours, native in zip(found["mori"], found["native"], strict=True):
        assert error(ours, native) < 0.02, error(ours, native)


def what_runs(job, scheme):
    """What explain says, and what does not run as one call."""
    assert jm.explain(config(scheme), job.mesh).one_call
    assert "are one call" in str(jm.explain(config(scheme), job.mesh))
    for more in ({"capacity_factor": 4.0}, {"transport": "native"}):
        cfg = config(scheme, **more)
        assert not jm.explain(cfg, job.mesh).one_call
        ((y, _),), calls = job.run(cfg, job.floating, job.x)
        assert calls[::2] == [0, 1], calls
        assert error(y, job.want(cfg, job.floating, job.x)) < ROUNDING
    ((y, _),), calls = job.run(config(scheme), job.floating, job.x.astype(np.float32))
    assert calls[0] == 0, calls


def counted(job, scheme):
    """One call whose launches are counted: 256 tokens in all, by both wires."""
    del job
    mesh = Mesh(np.array(jax.devices()), ("ep",), axis_types=(AxisType.Auto,))
    x = np.random.default_rng(5).normal(size=(256, 1024)).astype(jnp.bfloat16)
    for wire in (None, "fp8"):
        cfg = dataclasses.replace(
            config(scheme, wire_dtype=wire), num_experts=8, top_k=8, hidden_size=1024, intermediate_size=512
        )
        params = jm.prepare_params(jm.init_params(jax.random.key(3), cfg, jnp.bfloat16), cfg, mesh)
        run = jax.jit(lambda x, params, cfg=cfg: jm.ep_moe(x, params, cfg, mesh=mesh)[0])
        jax.block_until_ready(run(x, params))
        counters.mark(os.environ["ROCM_SIM_COUNT"], "warm", jax.process_index())
        jax.block_until_ready(run(x, params))
        counters.mark(os.environ["ROCM_SIM_COUNT"], f"{scheme} {wire}", jax.process_index())


def placed(job, x):
    """Tokens [R * TOKENS, H] on their ranks: nothing but the one call needs the others."""
    sharding = NamedSharding(job.mesh, P("ep"))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def stopped_inside(job, scheme):
    """Goes round until it is told that another rank was killed, wherever that was: until then results are
    right, and then there are none."""
    cfg = config(scheme)
    params = jm.prepare_params(job.floating, cfg, job.mesh)
    mine = slice(jax.process_index() * TOKENS, (jax.process_index() + 1) * TOKENS)
    want = job.want(cfg, job.floating, job.all_x)[mine]
    x = placed(job, job.all_x)
    run = jax.jit(lambda x, params: (jm.ep_moe(x, params, cfg, mesh=job.mesh)[0],))
    jax.block_until_ready(run(x, params))
    for number in range(500):
        said, y = failure_of(run, (x, params), KILLED_WITHIN)
        if said:
            assert y is None or np.isnan(y.astype(np.float32)).all()
            print(f"saw after {number}: {said}", flush=True)
            # Not the long way out: jax.distributed would wait for the dead.
            sys.stdout.flush()
            os._exit(0)
        assert y is not None
        assert error(y, want) < ROUNDING, error(y, want)
    raise AssertionError("nothing was said of the failure")


def saved(job, scheme):
    """Writes the compiled layer and what it gives to a file of this rank."""
    cfg = config(scheme)
    params = jm.prepare_params(job.floating, cfg, job.mesh)
    x = placed(job, job.all_x)
    run = jax.jit(lambda x, params: jm.ep_moe(x, params, cfg, mesh=job.mesh)[0]).lower(x, params).compile()
    y = np.asarray(run(x, params).addressable_data(0))
    group.check_failures()
    FOLDER.joinpath(str(jax.process_index())).write_bytes(pickle.dumps((serialize(run)[0], y)))


def loaded(job, scheme):
    """Runs what another process has compiled, where no layer was traced."""
    cfg = config(scheme)
    program, want = pickle.loads(FOLDER.joinpath(str(jax.process_index())).read_bytes())
    params = jm.prepare_params(job.floating, cfg, job.mesh)
    jm.initialize(job.mesh, cfg=cfg, num_tokens=TOKENS, dtype=jnp.bfloat16)
    x = placed(job, job.all_x)
    run = deserialize_and_load(program, jax.tree.structure(((x, params), {})), jax.tree.structure(x))
    for _ in range(2):
        y = np.asarray(run(x, params).addressable_data(0))
        group.check_failures()
        assert error(y, want) < ROUNDING, error(y, want)


ALL = (every_wire, uneven, replays, gradients, what_runs, counted, stopped_inside, saved, loaded)
CASES = {case.__name__: case for case in ALL}


def main(schemes: str, *cases: str) -> None:
    processes.join()
    job = Job()
    for scheme in schemes.split(","):
        for case in cases:
            CASES[case](job, scheme)
            print(f"rank {jax.process_index()} agrees: {scheme} {case}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
