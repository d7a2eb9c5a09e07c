"""Quantisation in NumPy float64, by the definitions of the number formats alone; shares no code."""

import functools

import numpy as np

MOST = {"e4m3fn": 448.0, "e4m3fnuz": 240.0}
BIAS = {"e4m3fn": 7, "e4m3fnuz": 8}


def value_of(code, name):
    """Of one float8 code."""
    if (name == "e4m3fn" and code & 0x7F == 0x7F) or (name == "e4m3fnuz" and code == 0x80):
        return np.nan
    exponent, fraction = code >> 3 & 15, (code & 7) / 8
    bias = BIAS[name]
    magnitude = fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
    return -magnitude if code & 0x80 else magnitude


@functools.cache
def positive_values(name):
    """All up to the largest, in the order of their codes."""
    table = np.array([value_of(c, name) for c in range(0x80)])
    return table[: np.flatnonzero(table == MOST[name])[0] + 1]


def round_float8(values, name):
    """To the nearest value of the format, of two the one with an even code."""
    table = positive_values(name)
    above = np.clip(np.searchsorted(table, np.abs(values)), 1, len(table) - 1)
    below = above - 1
    to_below, to_above = np.abs(values) - table[below], table[above] - np.abs(values)
    codes = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
    return np.sign(values) * table[codes]


def rounded_group(values, name):
    """What is left of a group that shares a scale, and the scale; name is a float8's or "int8"."""
    largest = np.abs(values).max(initial=0.0)
    if not np.isfinite(largest):
        return np.full(values.shape, np.nan), np.nan
    if largest < 2.0**-100:
        return np.zeros(values.shape), 0.0
    if name == "int8":
        scale = np.float64(np.float32(largest) / np.float32(127))
        return np.rint(values / scale) * scale, scale
    scale = 2.0**-150
    while largest / scale > MOST[name]:
        scale *= 2
    return round_float8(values / scale, name) * scale, scale


def rounded_columns(x, group, name):
    """Rows [t, W] with a scale for every ``group`` columns of each."""
    out = np.zeros(x.shape)
    for row in range(len(x)):
        for first in range(0, x.shape[1], group):
            at = np.s_[row, first : first + group]
            out[at] = rounded_group(x[at], name)[0]
    return out


def rows(x, scheme, name):
    """The experts' rows [t, H]."""
    return rounded_columns(x, 128 if scheme == "fp8_block" else x.shape[1], name)


def weights(w, scheme, name, parts):
    """(values [E, N, D], scales) of experts' weights, in ``parts`` whose blocks do not mix."""
    values = np.zeros(w.shape)
    if scheme != "fp8_block":
        scales = np.zeros(w.shape[:2])
        for at in np.ndindex(w.shape[:2]):
            values[at], scales[at] = rounded_group(w[at], name)
        return values, scales
    height = w.shape[1] // parts
    tall, wide = -(-height // 128), -(-w.shape[2] // 128)
    scales = np.zeros((len(w), parts * tall, wide))
    for expert, part, row, col in np.ndindex(len(w), parts, tall, wide):
        rows_at = slice(part * height + row * 128, part * height + min(height, (row + 1) * 128))
        at = np.s_[expert, rows_at, col * 128 : (col + 1) * 128]
        values[at], scales[expert, part * tall + row, col] = rounded_group(w[at], name)
    return values, scales


def experts(activate, rows_in, row_weights, sizes, starts, w1, w2, biases, d_out, scheme, name, *, frozen):
    """The result and the gradients of rows, row weights, w1, w2 and the biases, by loops.

    Args:
      activate: activate(gate, up) -> the activation and its derivatives by gate and by up.
      rows_in: [C, H].
      row_weights: [C].
      sizes: rows of each expert.
      starts: the first of each.
      w1: [L, 2*I, H], of codes the values.
      w2: [L, H, I].
      biases: (b1, b2).
      d_out: [C, H].
      scheme: how things are quantised.
      name: of the codes.
      frozen: w1 and w2 are values of codes already, and no cotangent is quantised.
    """
    inner = w2.shape[2]
    back = scheme == "fp8_block" and not frozen
    if not frozen:
        seen1, seen2 = weights(w1, scheme, name, 2)[0], weights(w2, scheme, name, 1)[0]
    else:
        seen1, seen2 = w1, w2
    out, d_rows, d_weights = np.zeros(rows_in.shape), np.zeros(rows_in.shape), np.zeros(row_weights.shape)
    dw1, dw2, db1, db2 = (np.zeros(a.shape) for a in (w1, w2, *biases))
    for e, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        at = slice(start, start + int(size))
        x, q, d_y = rows_in[at], row_weights[at, None], d_out[at]
        pre = rows(x, scheme, name) @ seen1[e].T + biases[0][e]
        h, by_gate, by_up = activate(pre[:, :inner], pre[:, inner:])
        seen_h = rounded_columns(h, 128, name)
        out[at] = q * (seen_h @ seen2[e].T + biases[1][e])
        d_h = (rounded_columns(d_y, 128, name) if back else d_y) @ seen2[e]
        d_weights[at] = np.sum(d_h * seen_h, axis=1) + d_y @ biases[1][e]
        d_pre = np.concatenate([q * d_h * by_gate, q * d_h * by_up], axis=1)
        seen_d = d_pre
        if back:
            seen_d = np.concatenate([rounded_columns(d, 128, name) for d in np.split(d_pre, 2, 1)], axis=1)
        d_rows[at] = seen_d @ seen1[e]
        dw1[e], dw2[e] = d_pre.T @ x, (q * d_y).T @ h
        db1[e], db2[e] = d_pre.sum(0), (q * d_y).sum(0)
    return out, d_rows, d_weights, dw1, dw2, db1, db2
