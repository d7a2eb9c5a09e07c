"""One process of test_mori_layer.py, which is one rank: python -m tests.rocm.mori_layer_job EP CASE...

The cases of a job share its start, which takes longer than most of them. Each runs training steps with
transport="mori" and compares values and gradients with the contract suite's oracle, with another transport,
or both. CASE is a name, or a name and a kernel type of MORI's: every_routing:InterNodeV1.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

import jax_moriep as jm
from jax_moriep.runtime import group
from jax_moriep.runtime.place import Place
from tests import processes
from tests.contract import oracle

HIDDEN, INNER, EXPERTS, TOP_K = 40, 8, 10, 3
TOKENS = 4  # of a rank, but one in all is missing
REPLAYS = 200
REMAT = {
    "none": lambda layer: layer,
    "policy": functools.partial(jax.checkpoint, policy=jm.checkpoint_policy()),
    "plain": jax.checkpoint,
}


def config(transport: str, kernel: str = "auto", **options) -> jm.MoEConfig:
    tuning = jm.Tuning(kernel, block_num=2, warp_num_per_block=4) if transport == "mori" else None
    return jm.MoEConfig(EXPERTS, TOP_K, HIDDEN, INNER, transport=transport, tuning=tuning, **options)


def keeps_some(logits, bias, cfg):
    """A router that has no expert for a choice that is unlikely."""
    del bias
    scores = jax.nn.softmax(logits)
    weights, ids = lax.top_k(scores, cfg.top_k)
    kept = weights > 0.15
    return jnp.where(kept, ids, -1).astype(jnp.int32), jnp.where(kept, weights, 0.0), scores


def two_layers(cfg: jm.MoEConfig, mesh: Mesh, remat: str = "none"):
    """Jitted value and gradients of sum(y * dy) of a scan over two residual layers."""

    @REMAT[remat]
    def layer(x, params, mask):
        return x + jm.ep_moe(x, params, cfg, mesh=mesh, token_mask=mask)[0]

    def loss(x, stack, dy, mask):
        y, _ = lax.scan(lambda x, params: (layer(x, params, mask), None), x, stack)
        return jnp.sum((y * dy).astype(jnp.float32)), y

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def values(result) -> dict[str, np.ndarray]:
    (_, y), (d_x, d_params) = result
    named = {"y": y, "x": d_x, "router": d_params.router, "w1": d_params.w1, "w2": d_params.w2}
    found = {name: np.asarray(value).astype(np.float32) for name, value in named.items()}
    group.check_failures()
    return found


def close(got: dict, want: dict, tol: float, what: str) -> None:
    for name, value in want.items():
        # A weight's gradient is a sum over tokens.
        atol = tol if name in "xy" else 10 * tol
        np.testing.assert_allclose(got[name], value, atol=atol, rtol=tol, err_msg=f"{what}: {name}")


class Job:
    """The mesh, two layers and their tokens; every process draws the same."""

    def __init__(self, num_ranks: int):
        self.kernel = "auto"
        self.mesh = Mesh(np.array(jax.devices()).reshape(-1, num_ranks), ("dp", "ep"))
        self.count = jax.device_count() * TOKENS - 1
        rng = np.random.default_rng(17)
        self.layers = [oracle.random_layer(rng, EXPERTS, TOP_K, HIDDEN, INNER) for _ in range(2)]
        self.x, self.dy = rng.normal(size=(2, self.count, HIDDEN)).astype(np.float32)
        self.some = rng.random(self.count) < 0.6
        # What MORI is compared with: native stays on one machine.
        self.other = "native" if Place.of(self.mesh, "ep").num_nodes == 1 else "collective"

    def configs(self, **options) -> tuple[jm.MoEConfig, jm.MoEConfig]:
        """Of MORI and of what it is compared with."""
        return config("mori", self.kernel, **options), config(self.other, **options)

    def stack(self, layers=None) -> jm.MoEParams:
        layers = layers or self.layers
        of = {name: np.stack([getattr(x, name) for x in layers]) for name in ("router", "w1", "w2")}
        return jm.MoEParams(**{name: value.astype(np.float32) for name, value in of.items()})

    def want(self, layers, x, dy, mask) -> dict[str, np.ndarray]:
        """The oracle's two layers."""
        x, dy = x.astype(np.float64), dy.astype(np.float64)
        first, second = layers
        between = x + first.forward_backward(x, dy, mask)[0]
        y, above = second.forward_backward(between, dy, mask)
        d_between = dy + above["x"]
        _, below = first.forward_backward(x, d_between, mask)
        grads = {name: np.stack([below[name], above[name]]) for name in ("router", "w1", "w2")}
        return {"y": between + y, "x": d_between + below["x"], **grads}


def every_routing(job: Job) -> None:
    """Padding, masks, a rank without a token, no token at all, and all tokens to the first experts."""
    everyone = np.ones(job.count, bool)
    idle = everyone.copy()
    idle[:TOKENS] = False
    crowded = oracle.Layer(**vars(job.layers[0]))
    crowded.router = np.full((HIDDEN, EXPERTS), -1.0)
    crowded.router[:, :TOP_K] = [0.3, 0.2, 0.1]
    cases = {
        "an odd number of tokens": (job.layers, job.x, everyone),
        "some masked": (job.layers, job.x, job.some),
        "a rank without a token": (job.layers, job.x, idle),
        "no token": (job.layers, job.x, ~everyone),
        "the first experts only": ((crowded, job.layers[1]), np.abs(job.x), everyone),
    }
    step, other = (two_layers(cfg, job.mesh) for cfg in job.configs())
    for what, (layers, x, mask) in cases.items():
        given = (x, job.stack(layers), job.dy, mask)
        got = values(step(*given))
        close(got, job.want(layers, x, job.dy, mask), 3e-5, what)
        close(got, values(other(*given)), 3e-5, f"{what}, {job.other}")


def bfloat16(job: Job) -> None:
    """Also ids of -1, which the router gives, and rematerialised by the policy."""
    cast = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
    given = (*cast((job.x, job.stack(), job.dy)), job.some)
    ids, _, _ = keeps_some(job.x @ job.layers[0].router, None, config("mori"))
    assert (np.asarray(ids) < 0).any()
    got, want = (
        values(two_layers(cfg, job.mesh, "policy")(*given)) for cfg in job.configs(router=keeps_some)
    )
    assert np.abs(want["router"]).max() > 0
    close(got, want, 3e-2, "bfloat16")


def fp8_wire(job: Job) -> None:
    """Rematerialised without a policy, so that the exchanges run anew."""
    given = (job.x, job.stack(), job.dy, job.some)
    got, want = (values(two_layers(cfg, job.mesh, "plain")(*given)) for cfg in job.configs(wire_dtype="fp8"))
    close(got, want, 3e-5, "fp8")
    exact = job.want(job.layers, job.x, job.dy, job.some)["y"]
    assert 0 < np.abs(want["y"] - exact).mean() < 0.1, "the wire did not round"


def all_forward_then_all_backward(job: Job) -> None:
    """Three batches: their dispatches lie behind each other before the first is given back along its way."""
    cfg, layer = job.configs()[0], job.layers[0]
    params = jax.tree.map(lambda leaf: leaf[0], job.stack())
    xs = np.stack([job.x, 2 * job.x[::-1], job.x * job.some[:, None]])

    @jax.jit
    def run(xs, params, dy):
        def forward(x, params):
            return jm.ep_moe(x, params, cfg, mesh=job.mesh)[0]

        done = [jax.vjp(forward, x, params) for x in xs]
        grads = [back(y * dy) for y, back in done]
        total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), [p for _, p in grads])
        return jnp.stack([y for y, _ in done]), jnp.stack([d_x for d_x, _ in grads]), total

    y, d_x, total = run(xs, params, job.dy)
    want = {name: 0.0 for name in ("router", "w1", "w2")}
    for i, x in enumerate(xs.astype(np.float64)):
        want_y, _ = layer.forward_backward(x, job.dy)
        _, grads = layer.forward_backward(x, want_y * job.dy)
        np.testing.assert_allclose(np.asarray(y)[i], want_y, atol=5e-5, rtol=5e-5)
        np.testing.assert_allclose(np.asarray(d_x)[i], grads["x"], atol=2e-4, rtol=2e-4)
        want = {name: want[name] + grads[name] for name in want}
    for name, value in want.items():
        np.testing.assert_allclose(np.asarray(getattr(total, name)), value, atol=1e-3, rtol=2e-4)
    group.check_failures()


def replays(job: Job) -> None:
    """The same step again and again gives the same bits: it is recorded once, and only its replays follow."""
    step = two_layers(config("mori"), job.mesh)
    given = jax.tree.map(jnp.asarray, (job.x, job.stack(), job.dy, job.some))

    def here(result) -> list[bytes]:
        return [np.asarray(leaf.addressable_data(0)).tobytes() for leaf in jax.tree.leaves(result)]

    first = here(step(*given))
    for i in range(REPLAYS):
        assert here(step(*given)) == first, i
    group.check_failures()


def refusals(job: Job) -> None:
    """Kernel types that do not run here are named while the program is traced, before MORI hears of them."""
    for kernel in ("InterNode", "AsyncLL", "InterNodeV1", "InterNodeV1LL"):
        cfg = dataclasses.replace(config("mori"), tuning=jm.Tuning(kernel))
        try:
            two_layers(cfg, job.mesh).lower(job.x, job.stack(), job.dy, job.some)
        except jm.ConfigError as e:
            assert f"mori_kernel='{kernel}' must be" in str(e), e  # noqa: PT017 - no pytest in a job
        else:
            raise AssertionError(f"{kernel} was taken")


CASES = {
    case.__name__: case
    for case in (every_routing, bfloat16, fp8_wire, all_forward_then_all_backward, replays, refusals)
}


def main(num_ranks: str, *cases: str) -> None:
    processes.join()
    # By default f32 is multiplied with fewer bits, on gfx942 too.
    jax.config.update("jax_default_matmul_precision", "highest")
    job = Job(int(num_ranks))
    for case in cases:
        name, _, kernel = case.partition(":")
        job.kernel = kernel or "auto"
        CASES[name](job)
        print(f"rank {jax.process_index()} agrees: {case}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
