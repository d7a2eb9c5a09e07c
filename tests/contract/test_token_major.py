"""What the adapter between the formats adds to the contract: the order of arrivals decides nothing."""

import numpy as np

from tests.contract import meshes, test_exchange, token_major


def test_every_order_of_arrivals_gives_the_bits_of_the_reference(monkeypatch):
    """The sum order is defined (k, then rank), so in float32 all give the same bits."""
    sizes = {"num_experts": 32, "top_k": 6, "hidden": 64}
    reference = test_exchange.config("reference", **sizes)
    x, ids, weights = test_exchange.random_case(np.random.default_rng(11), meshes.ranks(8), 16, reference)
    want = test_exchange.run(reference, x, ids, weights)
    for salt in range(3):
        name = f"token_major_{salt}"
        token_major.install(monkeypatch, name, salt)
        got = test_exchange.run(test_exchange.config(name, **sizes), x, ids, weights)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
