"""As much of torch as ``against.torch_layer`` needs, on NumPy: for tests where torch is not installed."""

import numpy as np


def _array(x):
    return x.a if isinstance(x, Tensor) else x


class Tensor:
    device, dtype = "cpu", None

    def __init__(self, a):
        self.a = np.asarray(a)

    @property
    def shape(self):
        return self.a.shape

    def __getitem__(self, at):
        return Tensor(self.a[tuple(map(_array, at)) if isinstance(at, tuple) else _array(at)])

    def __setitem__(self, at, values):
        self.a[_array(at)] = _array(values)

    def __add__(self, x):
        return Tensor(self.a + _array(x))

    def __sub__(self, x):
        return Tensor(self.a - _array(x))

    def __rsub__(self, x):
        return Tensor(x - self.a)

    def __mul__(self, x):
        return Tensor(self.a * _array(x))

    def __matmul__(self, x):
        return Tensor(self.a @ _array(x))

    def __floordiv__(self, x):
        return Tensor(self.a // x)

    __radd__, __rmul__ = __add__, __mul__

    def float(self):
        return self

    def to(self, dtype):
        return self

    def t(self):
        return Tensor(self.a.T)

    def transpose(self, a, b):
        return Tensor(np.swapaxes(self.a, a, b))

    def reshape(self, *shape):
        return Tensor(self.a.reshape(*shape))

    view = reshape

    def sum(self, dim, keepdim=False):
        return Tensor(self.a.sum(axis=dim, keepdims=keepdim))

    def chunk(self, parts, dim):
        return [Tensor(x) for x in np.split(self.a, parts, axis=dim)]

    def sigmoid(self):
        return Tensor(1 / (1 + np.exp(-self.a)))

    def sort(self, stable):
        order = np.argsort(self.a, kind="stable" if stable else None)
        return Tensor(self.a[order]), Tensor(order)

    def topk(self, count, dim):
        ids = np.argsort(-self.a, axis=dim, kind="stable")[:, :count]
        return Tensor(np.take_along_axis(self.a, ids, dim)), Tensor(ids)

    def scatter(self, dim, ids, values):
        result = self.a.copy()
        np.put_along_axis(result, ids.a, values.a, axis=dim)
        return Tensor(result)


class Torch:
    """The module."""

    int32 = np.int32

    @staticmethod
    def softmax(x, dim):
        powers = np.exp(x.a - x.a.max(axis=dim, keepdims=True))
        return Tensor(powers / powers.sum(axis=dim, keepdims=True))

    @staticmethod
    def arange(count, device):
        return Tensor(np.arange(count))

    @staticmethod
    def searchsorted(values, at, right):
        return Tensor(np.searchsorted(values.a, at.a, side="right" if right else "left"))

    @staticmethod
    def empty_like(x):
        return Tensor(np.empty_like(x.a))

    @staticmethod
    def zeros_like(x):
        return Tensor(np.zeros_like(x.a))

    @staticmethod
    def cat(parts, dim):
        return Tensor(np.concatenate([part.a for part in parts], axis=dim))


def grouped_product(a, b, offs):
    """Of rows with each run's matrix, or of columns with rows into a matrix for each run."""
    ends = offs.a
    runs = list(zip([0, *ends[:-1]], ends, strict=True))
    if b.a.ndim == 3:
        return Tensor(np.concatenate([a.a[s:e] @ w for (s, e), w in zip(runs, b.a, strict=True)]))
    return Tensor(np.stack([a.a[:, s:e] @ b.a[s:e] for s, e in runs]))
