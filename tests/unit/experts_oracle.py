"""The experts in NumPy float64, one row at a time, forward and backward written out; shares no code."""

import math

import numpy as np

LIMIT, ALPHA = 0.7, 1.702


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(gate, up):
    s = _sigmoid(gate)
    return gate * s * up, (s + gate * s * (1 - s)) * up, gate * s


def _gelu(gate, up):
    cdf = np.array([(1 + math.erf(g / math.sqrt(2))) / 2 for g in gate])
    density = np.exp(-(gate**2) / 2) / math.sqrt(2 * math.pi)
    return gate * cdf * up, (cdf + gate * density) * up, gate * cdf


def _swiglu_clamped(gate, up):
    g, u = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    s = _sigmoid(ALPHA * g)
    d_gate = (u + 1) * (s + ALPHA * g * s * (1 - s)) * (gate <= LIMIT)
    return (u + 1) * g * s, d_gate, g * s * (np.abs(up) <= LIMIT)


# Each gives the value and its derivatives by gate and by up.
ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "swiglu_clamped": _swiglu_clamped}


def starts_of(sizes, block):
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += -(-int(size) // block) * block
    return starts


def experts(rows, weights, sizes, params, d_out, *, activation, weight_input, block):
    """The result and the gradients of rows, weights and of ``params``: w1, w2, and b1, b2 or None, None."""
    w1, w2, b1, b2 = params
    rows, weights, w1, w2, d_out = (np.asarray(a, np.float64) for a in (rows, weights, w1, w2, d_out))
    biased = b1 is not None
    b1 = np.asarray(b1, np.float64) if biased else np.zeros(w1.shape[:2])
    b2 = np.asarray(b2, np.float64) if biased else np.zeros(w2.shape[:2])
    inner = w2.shape[2]
    out, d_rows, d_weights = np.zeros(rows.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    dw1, dw2, db1, db2 = (np.zeros(a.shape) for a in (w1, w2, b1, b2))
    for e, (start, size) in enumerate(zip(starts_of(sizes, block), sizes, strict=True)):
        for r in range(start, start + int(size)):
            q = weights[r]
            x = q * rows[r] if weight_input else rows[r]
            pre = w1[e] @ x + b1[e]
            h, by_gate, by_up = ACTIVATIONS[activation](pre[:inner], pre[inner:])
            y = w2[e] @ h + b2[e]
            d_y = d_out[r] if weight_input else q * d_out[r]
            d_h = w2[e].T @ d_y
            d_pre = np.concatenate([d_h * by_gate, d_h * by_up])
            d_x = w1[e].T @ d_pre
            if weight_input:
                out[r], d_rows[r], d_weights[r] = y, q * d_x, d_x @ rows[r]
            else:
                out[r], d_rows[r], d_weights[r] = q * y, d_x, d_out[r] @ y
            dw1[e] += np.outer(d_pre, x)
            dw2[e] += np.outer(d_y, h)
            db1[e] += d_pre
            db2[e] += d_y
    return out, d_rows, d_weights, dw1, dw2, *((db1, db2) if biased else (None, None))
