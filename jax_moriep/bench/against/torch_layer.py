"""The whole layer by torch under ``torch.compile``, on memory that jax made, beside ``bench layer``'s."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moriep.bench.against.torch_mlp import between_products, grouped_product
from jax_moriep.config import MoEParams


class Layer:
    """Router, top-k, sort, grouped products, activation and combine; its gradients are written out.

    Rows are gathered both ways, so that nothing is added by atomics: the best form for torch that we know.
    """

    def __init__(self, top_k: int, x: jax.Array, weights: MoEParams, d_y: jax.Array) -> None:
        """Takes x [T, H], the weights and the gradient of the result [T, H].

        Raises:
          ImportError: torch is not installed, or has no grouped matmul.
        """
        self._torch: Any = importlib.import_module("torch")
        arrays = jax.block_until_ready((x, weights.router, weights.w1, weights.w2, d_y))
        # Kept, because torch reads their memory.
        self._arrays = arrays
        self._tensors = tuple(map(self._torch.from_dlpack, arrays))
        self._on_gpu = self._tensors[0].is_cuda
        forward, both = _written_out(self._torch, grouped_product(self._torch), top_k)
        self._fns: dict[bool, Any] = {False: forward, True: both}
        self.how = f"torch {self._torch.__version__}, eager"
        if self._on_gpu:
            self._compile()

    def _compile(self) -> None:
        settings: Any = importlib.import_module("torch._inductor.config")
        # Its compilers would be processes of their own, started beside jax's threads.
        settings.compile_threads = 1
        compiled = {b: self._torch.compile(fn, dynamic=False) for b, fn in self._fns.items()}
        try:
            compiled[False](*self._tensors[:4])
            compiled[True](*self._tensors)
        except Exception as error:  # noqa: BLE001 - recorded, and measured as it can run
            self.how += f", because {error!r}"[:300]
            return
        self._fns = compiled
        self.how = f"torch {self._torch.__version__}, torch.compile"

    def once(self, backward: bool) -> Any:
        """y, or with ``backward`` (y, (d_x, gradients of the weights)), of jax's arrays."""
        made = tuple(jnp.from_dlpack(x.contiguous()) for x in self._run(backward))
        self._wait()
        return (
            (made[0], (made[1], MoEParams(router=made[2], w1=made[3], w2=made[4]))) if backward else made[0]
        )

    def repeat(self, backward: bool, times: int) -> None:
        """Does it many times, to the end of the last."""
        for _ in range(times):
            self._run(backward)
        self._wait()

    def memory(self, backward: bool) -> int:
        """The most bytes that one run has beside its operands and results; 0 without a GPU."""
        if not self._on_gpu:
            return 0
        cuda = self._torch.cuda
        self._wait()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        results = self._run(backward)
        self._wait()
        kept = sum(x.numel() * x.element_size() for x in results)
        return cuda.max_memory_allocated() - before - kept

    def _run(self, backward: bool) -> tuple[Any, ...]:
        return self._fns[backward](*(self._tensors if backward else self._tensors[:4]))

    def _wait(self) -> None:
        if self._on_gpu:
            self._torch.cuda.synchronize()


def _written_out(torch: Any, product: Any, top_k: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """fn(x, router, w1, w2) -> (y,), and fn(x, router, w1, w2, d_y) -> y and all gradients."""
    activate, activate_back = between_products(torch)

    def through(x: Any, router: Any, w1: Any, w2: Any) -> tuple[Any, ...]:
        logits = (x @ router).float()
        chosen, ids = logits.topk(top_k, dim=1)
        shares = torch.softmax(chosen, dim=1)
        by_expert, order = ids.reshape(-1).sort(stable=True)
        experts = torch.arange(w1.shape[0], device=x.device)
        ends = torch.searchsorted(by_expert, experts, right=True).to(torch.int32)
        # Where each route's row is.
        row = torch.empty_like(order)
        row[order] = torch.arange(order.shape[0], device=x.device)
        rows, factors = x[order // top_k], shares.reshape(-1)[order][:, None]
        pre = product(rows, w1.transpose(1, 2), offs=ends)
        out = product(activate(pre, factors), w2.transpose(1, 2), offs=ends)
        return added(out, row, x), (logits, ids, shares, order, row, ends, rows, factors, pre)

    def added(rows: Any, row: Any, x: Any) -> Any:
        return rows[row].view(x.shape[0], top_k, -1).float().sum(dim=1).to(x.dtype)

    def forward(x: Any, router: Any, w1: Any, w2: Any) -> tuple[Any, ...]:
        return (through(x, router, w1, w2)[0],)

    def both(x: Any, router: Any, w1: Any, w2: Any, d_y: Any) -> tuple[Any, ...]:
        y, saved = through(x, router, w1, w2)
        logits, ids, shares, order, row, ends, rows, factors, pre = saved
        d_out = d_y[order // top_k]
        act, d_pre, d_factors = activate_back(pre, factors, product(d_out, w2, offs=ends))
        d_w1, d_w2 = product(d_pre.t(), rows, offs=ends), product(d_out.t(), act, offs=ends)
        d_shares = d_factors[row].view(shares.shape)
        d_chosen = shares * (d_shares - (d_shares * shares).sum(dim=1, keepdim=True))
        d_logits = torch.zeros_like(logits).scatter(1, ids, d_chosen).to(x.dtype)
        d_x = added(product(d_pre, w1, offs=ends), row, x) + d_logits @ router.t()
        return y, d_x, x.t() @ d_logits, d_w1, d_w2

    return forward, both
