"""One RoutedMoE of each family that is served, beside MaxText's own methods; and what is refused."""

# pyright: reportMissingImports=false
# MaxText is in the environment of these tests alone.

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from maxtext.layers import moe
from maxtext.layers.initializers import nd_dense_init

import jax_moriep as jm
from tests.maxtext import training

BATCH, LENGTH = 8, 5
MIXTRAL = {
    "decoder_block": "mixtral",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "load_balance_loss_weight": 0.1,
    "ici_data_parallelism": 2,
    "ici_expert_parallelism": 4,
}
FAMILIES = {
    "mixtral": MIXTRAL,
    "prefused": MIXTRAL | {"prefuse_moe_weights": True},
    "qwen3": MIXTRAL | {"decoder_block": "qwen3_moe", "norm_topk_prob": True},
    "llama4": MIXTRAL | {"decoder_block": "llama4", "num_experts_per_tok": 1},
    "gpt_oss": MIXTRAL
    | {
        "decoder_block": "gpt_oss",
        "mlp_bias": True,
        "mlp_activations": "['sigmoid','linear']",
        "mlp_activations_limit": 0.7,
    },
}
DEEPSEEK = MIXTRAL | training.DEEPSEEK


@functools.cache
def config(**options):
    return training.config("unused", **options)


class Changed:
    """A config in which some options have other values, of combinations that MaxText itself refuses too."""

    def __init__(self, base, **changes):
        self._base, self._changes = base, changes

    def __getattr__(self, name):
        return self._changes[name] if name in self._changes else getattr(self._base, name)


def mesh_of(cfg, **sizes):
    shape = [sizes.get(axis, 1) for axis in cfg.mesh_axes]
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return jax.sharding.Mesh(devices.reshape(shape), cfg.mesh_axes)


def make(cfg, mesh):
    """A layer with the same weights for the same sizes, none of them zero."""
    with jax.set_mesh(mesh), linen.logical_axis_rules(cfg.logical_axis_rules):
        layer = moe.RoutedMoE(
            config=cfg,
            num_experts=cfg.num_experts,
            num_experts_per_tok=cfg.num_experts_per_tok,
            mesh=mesh,
            kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"),
            kernel_axes=("embed_router", None),
            intermediate_dim=cfg.moe_mlp_dim,
            weight_dtype=cfg.weight_dtype,
            dtype=cfg.dtype,
            rngs=nnx.Rngs(params=0),
        )
    for module in (layer, layer.gate):
        for name, value in vars(module).items():
            if name.endswith("bias") and isinstance(value, nnx.Variable):
                value.value = 0.2 * jax.random.normal(jax.random.key(len(name)), value.value.shape)
    return layer


def tokens(cfg):
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=(BATCH, LENGTH, cfg.emb_dim)).astype(np.float32) for _ in range(2))


def run(layer, cfg, **routing):
    """(output, balance loss, bias updates), what was sown, and the gradients of x and of the parameters."""
    x, dy = tokens(cfg)
    graph, weights, rest = nnx.split(layer, nnx.Param, ...)

    def loss(weights, x):
        used = nnx.merge(graph, weights, rest)
        output, balance, updates = used(x, **routing)
        sown = nnx.state(used, nnx.Intermediate).to_pure_dict()
        return jnp.sum(output * dy) + (0 if balance is None else balance), (
            (output, balance, updates),
            sown,
        )

    with jax.set_mesh(layer.mesh), linen.logical_axis_rules(cfg.logical_axis_rules):
        (_, (results, sown)), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, x)
    return results, sown, (gradients[1], nnx.to_pure_dict(gradients[0]))


def compare(got, want, tol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tol * max(np.abs(b).max(), 1e-3), jax.tree_util.keystr(path)


def both(installed, options, mesh=None, **routing):
    """MaxText's dense products and ep_moe: results and gradients of each, and what ep_moe's layer sowed."""
    outcomes = []
    for sparse in (False, True):
        cfg = config(**options, sparse_matmul=sparse)
        outcomes.append(run(make(cfg, mesh or mesh_of(cfg, data=2, expert=4)), cfg, **routing))
        installed()
    (want, _, want_grads), (got, sown, got_grads) = outcomes
    return (got, got_grads), (want, want_grads), sown


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_the_dense_product(installed, family):
    got, want, sown = both(installed, FAMILIES[family])
    compare(got, want)
    assert not np.asarray(sown["moe_has_overflow"][0])


def test_sequences_split_over_an_axis_of_their_own(installed):
    """Five tokens in a sequence, which two devices do not divide."""
    sizes = {"data": 2, "context": 2, "expert": 2}
    got, want, _ = both(installed, MIXTRAL, mesh_of(config(**MIXTRAL, sparse_matmul=True), **sizes))
    compare(got, want)


def test_replayed_routes(installed):
    """With missing, repeated and impossible experts."""
    forced = np.random.default_rng(2).integers(-1, 9, (BATCH, LENGTH, 2)).astype(np.int32)
    got, want, _ = both(installed, MIXTRAL, forced_routed_experts=np.where(forced == 8, -7, forced))
    compare(got, want)


def test_half_precision(installed):
    """Master weights in f32: both cast them to bfloat16, whose rounding is what differs."""
    got, want, _ = both(installed, MIXTRAL | {"dtype": "bfloat16"})
    assert got[0][0].dtype == jnp.bfloat16
    compare(got, want, tol=3e-2)


def test_deepseek_is_the_sparse_method_that_was_replaced(installed):
    """On one device, where a CPU runs it; its balance loss reads the scores without the bias, as ours."""
    cfg = config(**DEEPSEEK, sparse_matmul=True, megablox=False)
    want, _, want_grads = run(make(cfg, mesh_of(cfg)), cfg)
    installed()
    for sizes in ({}, {"data": 2, "expert": 4}):
        got, _, got_grads = run(make(cfg, mesh_of(cfg, **sizes)), cfg)
        compare((got, got_grads), (want, want_grads))


def test_buffers_that_drop_say_so_and_dropless_layers_do_not_drop(installed):
    options = MIXTRAL | {"ragged_buffer_factor": 0.3, "load_balance_loss_weight": 0.0}
    got, want, sown = both(installed, options)
    assert np.asarray(sown["moe_has_overflow"][0])
    assert np.abs(np.asarray(got[0][0]) - np.asarray(want[0][0])).max() > 0.01
    cfg = config(**options, sparse_matmul=True)
    layer = make(cfg, mesh_of(cfg, data=2, expert=4))
    layer.force_dropless = True  # as moe_dropless_fallback="step" sets it to run the step again
    results, sown, _ = run(layer, cfg)
    compare(results[0], want[0][0])
    assert not np.asarray(sown["moe_has_overflow"][0])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quantization": "fp8"}, "quantization='fp8' must be '' or None for ep_moe.*expert_quant="),
        ({"te_moe_block": True}, "te_moe_block=True must be False"),
        ({"use_batch_split_schedule": True}, "use_batch_split_schedule=True must be False"),
        ({"moe_dropless_fallback": "layer"}, "moe_dropless_fallback='layer' must be None or 'step'"),
        ({"attention": "vllm_rpa"}, "attention='vllm_rpa' must not be one of vLLM's"),
        ({"mlp_activations": ["gelu", "linear"]}, r"mlp_activations\[0\]='gelu' must be 'silu'"),
    ],
)
def test_what_ep_moe_cannot_serve_is_refused_when_the_layer_is_made(installed, change, text):
    installed()
    cfg = config(**MIXTRAL, sparse_matmul=True)
    with pytest.raises(jm.ConfigError, match=f"{text}.*uninstall"):
        make(Changed(cfg, **change), mesh_of(cfg))


@pytest.mark.parametrize(
    ("axis", "text"),
    [("stage", "ici_pipeline_parallelism .*=2 must be 1"), ("diloco", "ici_diloco_parallelism .*=2 must")],
)
def test_meshes_whose_layers_are_batched_are_refused(installed, axis, text):
    installed()
    cfg = config(**MIXTRAL, sparse_matmul=True)
    with pytest.raises(jm.ConfigError, match=text):
        make(cfg, mesh_of(cfg, **{axis: 2}))


def test_uninstall_gives_maxtext_back_its_own(installed):
    own = moe.RoutedMoE.__init__, moe.RoutedMoE.sparse_matmul
    installed()
    installed(transport="reference")
    assert moe.RoutedMoE.sparse_matmul is not own[1]
    jm.maxtext.uninstall()
    jm.maxtext.uninstall()
    assert (moe.RoutedMoE.__init__, moe.RoutedMoE.sparse_matmul) == own
