"""jax_moriep.maxtext without MaxText: a stand-in has its methods' signatures and computes what they are for.

The real one is tested by ``make test-maxtext``.
"""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import jax_moriep as jm

EXPERTS, TOP_K, HIDDEN, INNER, LENGTH = 8, 2, 16, 8, 3
RULES = {"activation_batch": ("data", "expert"), "exp": "expert", "embed_moe": "data"}
OPTIONS = {
    "sparse_matmul": True,
    "decoder_block": "mixtral",
    "mlp_activations": ["silu", "linear"],
    "mlp_activations_limit": -1.0,
    "mlp_bias": True,
    "attention": "dot_product",
    "custom_mesh_and_rule": "",
    "load_balance_loss_weight": 0.5,
    "gradient_accumulation_steps": 1,
    "routed_bias_update_rate": 0.25,
    "use_random_routing": False,
}


class RoutedMoE:
    """As MaxText 0.2.5 has it, of what the package touches."""

    def __init__(self, config, mesh):
        rng = np.random.default_rng(0)
        self.config, self.mesh, self.num_experts, self.dtype = config, mesh, EXPERTS, jnp.float32
        self.rngs = self.quant = self.wi_0_sparsity_module = None
        self.is_hash_routing = False
        self._expert_parallelism_name = "expert"
        self.wi_kernel_axes = ("exp", "embed_moe", "mlp_moe")
        self.gate = types.SimpleNamespace(kernel=jnp.asarray(rng.normal(size=(HIDDEN, EXPERTS)), jnp.float32))
        shapes = [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)] + [(INNER,)] * 2 + [(HIDDEN,)]
        self.weights = [jnp.asarray(rng.normal(size=(EXPERTS, *s)) / 4, jnp.float32) for s in shapes]
        self.sown = {}

    def sparse_matmul(
        self,
        inputs,
        gate_logits,
        pre_bias_logits,
        w0_kernel,
        w1_kernel,
        wo_kernel,
        w0_bias,
        w1_bias,
        wo_bias,
        input_ids=None,
        forced_routed_experts=None,
    ):
        return "its own"

    def get_topk(self, gate_logits, pre_bias_logits, rngs=None, input_ids=None, forced_routed_experts=None):
        weights, ids = jax.lax.top_k(gate_logits, TOP_K)
        return jax.nn.softmax(weights), ids

    def load_balance_loss(self, top_k_indices, logits, density_prob=None):
        return self.config.load_balance_loss_weight * jnp.sum(logits[..., 0] * top_k_indices[..., 0])

    def megatron_seq_aux_loss(self, scores): ...

    def should_update_load_balance(self):
        return True

    def get_ragged_buffer_factor(self):
        return -1.0

    def _logical_to_mesh_axes(self, logical_name):
        return PartitionSpec(*(RULES.get(name) for name in logical_name))

    def _maybe_shard_with_pspec(self, inputs, pspec, logical_axes=None):
        return jax.lax.with_sharding_constraint(inputs, jax.NamedSharding(self.mesh, pspec))

    def sow(self, kind, name, value):
        self.sown[name] = value


def load_balance_updates_from_counts(expert_counts, num_experts, rate):
    return rate * jnp.sign(jnp.mean(expert_counts) - expert_counts)


def uses_megatron_seq_aux_loss(config):
    return False


@pytest.fixture
def moe(monkeypatch):
    """The stand-in where MaxText would be; what is installed is undone."""
    names = ("RoutedMoE", "load_balance_updates_from_counts", "uses_megatron_seq_aux_loss")
    copied = type("RoutedMoE", (), dict(vars(RoutedMoE)))
    module = types.SimpleNamespace(**{name: globals()[name] for name in names[1:]}, RoutedMoE=copied)
    monkeypatch.setitem(sys.modules, "maxtext", types.SimpleNamespace(__version__="0.9.9"))
    monkeypatch.setitem(sys.modules, "maxtext.layers", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "maxtext.layers.moe", module)
    yield module
    jm.maxtext.uninstall()


def layer_of(moe, **options):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "expert"))
    return moe.RoutedMoE(types.SimpleNamespace(**OPTIONS | options), mesh)


@pytest.mark.parametrize("batch", [8, 3])  # the second is one that the devices do not divide
def test_routes_are_its_own_and_experts_are_ours(moe, batch):
    jm.maxtext.install()
    layer = layer_of(moe)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(batch, LENGTH, HIDDEN)), jnp.float32)

    def ours(x, weights):
        logits = x @ layer.gate.kernel
        output, balance, updates = layer.sparse_matmul(x, logits, None, *weights)
        return jnp.sum(output**2) + balance, (output, balance, updates)

    def dense(x, weights):
        w0, w1, wo, b0, b1, bo = weights
        logits = x @ layer.gate.kernel
        share, ids = layer.get_topk(logits, None)
        gate, up = (jnp.einsum("bsh,ehi->bsei", x, w) + b for w, b in ((w0, b0), (w1, b1)))
        down = jnp.einsum("bsei,eih->bseh", gate * jax.nn.sigmoid(gate) * up, wo) + bo
        output = jnp.einsum("bske,bsk,bseh->bsh", jax.nn.one_hot(ids, EXPERTS), share, down)
        balance = layer.load_balance_loss(ids, jax.nn.softmax(logits))
        return jnp.sum(output**2) + balance, (output, balance, 0.25 * np.sign(counts.mean() - counts))

    with jax.default_matmul_precision("highest"):
        counts = np.bincount(np.argsort(x @ layer.gate.kernel)[..., -TOP_K:].ravel(), minlength=EXPERTS)
        want = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(x, layer.weights)
        got = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(x, layer.weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)
    assert set(layer.sown) == {"moe_has_overflow"}


def test_uninstall_and_dense_layers_are_left_alone(moe):
    jm.maxtext.install()
    layer_of(moe, sparse_matmul=False, te_moe_block=True)  # nothing of it is ours
    jm.maxtext.uninstall()
    assert layer_of(moe, te_moe_block=True).sparse_matmul(*[None] * 9) == "its own"


def test_options_that_ep_moe_cannot_serve_are_refused_with_their_names(moe):
    jm.maxtext.install()
    with pytest.raises(
        jm.ConfigError, match="te_moe_block=True must be False for ep_moe; switch .*uninstall"
    ):
        layer_of(moe, te_moe_block=True)
    with pytest.raises(jm.ConfigError, match="transport='carrier pigeon' must be one of"):
        jm.maxtext.install(transport="carrier pigeon")


def test_another_maxtext_is_refused_with_its_version(moe):
    moe.RoutedMoE.get_topk = lambda self, gate_logits: None
    with pytest.raises(
        jm.ConfigError, match=r"maxtext 0.9.9 must .*RoutedMoE.get_topk takes \('self', 'gate_logits'\)"
    ):
        jm.maxtext.install()
    del moe.RoutedMoE
    with pytest.raises(jm.ConfigError, match="RoutedMoE.sparse_matmul is missing; use maxtext=="):
        jm.maxtext.install()


def test_without_maxtext_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "maxtext", None)
    with pytest.raises(ImportError, match="pip install maxtext=="):
        jm.maxtext.install()
