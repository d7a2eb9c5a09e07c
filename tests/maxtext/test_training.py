"""Twenty training steps of tiny MaxText models, their experts by ep_moe and by MaxText's own dense products.

Both runs begin with the same weights and see the same batches; each follows its own gradients from there, so
that an error of one step would be carried into all later ones. In f32 both sum the same products in other
orders, which leaves some 1e-7 of the largest value in a tensor and grows with the steps; the tolerances are
some ten times what was seen after twenty. A wrong route, a weight of another expert or a missing gradient is
an error of the size of the value itself.
"""

import numpy as np
import pytest

from jax_moriep.maxtext import routed
from tests.maxtext import training

# The compilations of two models: a minute of two idle cores for each test.
pytestmark = pytest.mark.timeout(900)

MIXTRAL = {
    "decoder_block": "mixtral",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "base_num_decoder_layers": 2,
    "load_balance_loss_weight": 0.01,
    "ici_data_parallelism": 2,
    "ici_expert_parallelism": 4,
}
# With a shared expert, and a dense layer as the first of three.
DEEPSEEK = (
    MIXTRAL
    | training.DEEPSEEK
    | {
        "moe_use_megatron_seq_aux_loss": True,
        "first_num_dense_layers": 1,
        "base_num_decoder_layers": 3,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
)
# Six experts, an odd number of tokens in a sequence, weights split by fsdp and by tensor parallelism as well.
THREE_AXES = MIXTRAL | {
    "num_experts": 6,
    "base_num_decoder_layers": 1,
    "scan_layers": False,
    "max_target_length": 23,
    "ici_data_parallelism": 1,
    "ici_fsdp_parallelism": 2,
    "ici_tensor_parallelism": 2,
    "ici_expert_parallelism": 2,
}


def both(installed, monkeypatch, tmp_path, steps, options):
    """The steps by MaxText's dense products, and by ep_moe, which must have been called."""
    with monkeypatch.context() as patched:
        dense = training.run(training.config(tmp_path, sparse_matmul=False, **options), steps, patched)
    calls = []
    installed()
    with monkeypatch.context() as patched:
        ours = routed.ep_moe
        patched.setattr(routed, "ep_moe", lambda *args, **kw: calls.append(kw) or ours(*args, **kw))
        sparse = training.run(training.config(tmp_path, sparse_matmul=True, **options), steps, patched)
    assert calls
    return dense, sparse


def compare(got, want, tol):
    """Each tensor by its largest value: a sum of many terms is as exact as the terms are large."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = np.abs(got[name] - value).max() / max(np.abs(value).max(), 1e-6)
        assert error < tol, (name, error)


@pytest.mark.parametrize(
    "options", [MIXTRAL, DEEPSEEK, THREE_AXES], ids=["mixtral", "deepseek", "three_axes"]
)
def test_losses_and_gradients_are_those_of_the_dense_products(installed, monkeypatch, tmp_path, options):
    dense, sparse = both(installed, monkeypatch, tmp_path, 20, options)
    np.testing.assert_allclose(sparse.losses, dense.losses, rtol=3e-6)
    np.testing.assert_allclose(sparse.balance_losses, dense.balance_losses, rtol=3e-6)
    assert np.mean(dense.losses[-3:]) < 0.9 * np.mean(dense.losses[:3])  # it did train
    for got, want in zip(sparse.gradients, dense.gradients, strict=True):
        compare(got, want, tol=2e-5)
    compare(sparse.weights, dense.weights, tol=2e-5)
    biases = [value for name, value in dense.weights.items() if "['gate']['bias']" in name]
    assert len(biases) == (options is DEEPSEEK)
    assert all((np.abs(bias).max(axis=-1) > 0).all() for bias in biases)  # [layers, E]: each layer's moved
