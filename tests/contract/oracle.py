"""What the exchange and the layer must give, in NumPy float64 loops that share nothing with the package."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Received:
    """What one rank holds after dispatch."""

    rows: np.ndarray
    row_weights: np.ndarray
    group_sizes: np.ndarray
    source: list  # of each row: (rank, token, k), or None


def dispatched(x, ids, weights, num_experts, num_local, block, capacity):
    """x [R, T, H], ids and weights [R, T, K] -> what each rank holds, and the set of dropped routes."""
    num_ranks, num_tokens, width = x.shape
    received, dropped = [], set()
    for rank in range(num_ranks):
        rows = np.zeros((capacity, width))
        row_weights = np.zeros(capacity)
        source = [None] * capacity
        sizes = []
        start = 0
        for expert in range(rank * num_local, (rank + 1) * num_local):
            row, kept = start, 0
            for s in range(num_ranks):
                for t in range(num_tokens):
                    for k in range(ids.shape[2]):
                        if ids[s, t, k] != expert or expert >= num_experts:
                            continue
                        if row < capacity:
                            rows[row], row_weights[row], source[row] = x[s, t], weights[s, t, k], (s, t, k)
                            kept += 1
                        else:
                            dropped.add((s, t, k))
                        row += 1
            sizes.append(kept)
            while row % block:
                row += 1
            start = row
        received.append(Received(rows, row_weights, np.array(sizes), source))
    return received, dropped


def combined(received, rows_of_rank, num_ranks, num_tokens):
    """rows_of_rank: for each rank [C, H] -> y [R, T, H]."""
    y = np.zeros((num_ranks, num_tokens, rows_of_rank[0].shape[1]))
    for rank, held in enumerate(received):
        for row, where in enumerate(held.source):
            if where is not None:
                y[where[0], where[1]] += rows_of_rank[rank][row]
    return y


def _silu(v):
    s = 1 / (1 + np.exp(-v))
    return v * s, s * (1 + v * (1 - s))


@dataclasses.dataclass
class Layer:
    """softmax_topk routing and silu experts, with everything's gradient, one token at a time."""

    router: np.ndarray
    w1: np.ndarray
    w2: np.ndarray
    top_k: int
    norm: bool = True
    shared_w1: np.ndarray | None = None
    shared_w2: np.ndarray | None = None

    def forward_backward(self, x, dy, mask=None):
        """x, dy [N, H] -> y, and a dict of gradients of sum(y * dy)."""
        grads = {name: np.zeros_like(getattr(self, name)) for name in self._weights()}
        grads["x"] = np.zeros_like(x)
        y = np.zeros_like(x)
        for n in range(len(x)):
            if mask is None or mask[n]:
                self._token(n, x[n], dy[n], y, grads)
        return y, grads

    def _weights(self):
        return [n for n in ("router", "w1", "w2", "shared_w1", "shared_w2") if getattr(self, n) is not None]

    def _token(self, n, x, dy, y, grads):
        logits = x @ self.router
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
        chosen = np.argsort(-scores, kind="stable")[: self.top_k]
        total = scores[chosen].sum() if self.norm else 1.0
        d_scores = np.zeros_like(scores)
        d_weights = []
        for e in chosen:
            weight = scores[e] / total
            out, d_x, d_w1, d_w2 = self._mlp(x, self.w1[e], self.w2[e], weight * dy)
            y[n] += weight * out
            d_weights.append(out @ dy)
            grads["x"][n] += d_x
            grads["w1"][e] += d_w1
            grads["w2"][e] += d_w2
        for e, d_weight in zip(chosen, d_weights, strict=True):
            d_scores[e] += d_weight / total
            if self.norm:
                d_scores[chosen] -= d_weight * scores[e] / total**2
        d_logits = scores * (d_scores - (d_scores * scores).sum())
        grads["router"] += np.outer(x, d_logits)
        grads["x"][n] += self.router @ d_logits
        if self.shared_w1 is not None:
            out, d_x, d_w1, d_w2 = self._mlp(x, self.shared_w1, self.shared_w2, dy)
            y[n] += out
            grads["x"][n] += d_x
            grads["shared_w1"] += d_w1
            grads["shared_w2"] += d_w2

    @staticmethod
    def _mlp(x, w1, w2, d_out):
        inner = len(w1) // 2
        gate, up = w1[:inner] @ x, w1[inner:] @ x
        act, slope = _silu(gate)
        hidden = act * up
        d_hidden = w2.T @ d_out
        d_pre = np.concatenate([d_hidden * up * slope, d_hidden * act])
        return w2 @ hidden, w1.T @ d_pre, np.outer(d_pre, x), np.outer(d_out, hidden)


def random_layer(rng, num_experts, top_k, hidden, inner, shared=None, norm=True):
    """A layer with weights of unit gain, exact in float32."""

    def draw(*shape, fan_in):
        return (rng.normal(size=shape) * fan_in**-0.5).astype(np.float32).astype(np.float64)

    return Layer(
        router=draw(hidden, num_experts, fan_in=hidden),
        w1=draw(num_experts, 2 * inner, hidden, fan_in=hidden),
        w2=draw(num_experts, hidden, inner, fan_in=inner),
        top_k=top_k,
        norm=norm,
        shared_w1=None if shared is None else draw(2 * shared, hidden, fan_in=hidden),
        shared_w2=None if shared is None else draw(hidden, shared, fan_in=shared),
    )
