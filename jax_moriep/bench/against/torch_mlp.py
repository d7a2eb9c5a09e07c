"""The experts' MLP by torch's grouped matmul, on memory that jax made. For ``bench kernels`` alone."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp


class Mlp:
    """The gated MLP of rows without padding, and its gradients.

    What is between the products is one pass by ``torch.compile``, or several where that cannot run.
    """

    def __init__(self, *operands: jax.Array) -> None:
        """Takes d_out, rows, factors, group sizes, w1 [L, 2*I, H] and w2 [L, H, I].

        Raises:
          ImportError: torch is not installed, or has no grouped matmul.
        """
        self._torch: Any = importlib.import_module("torch")
        self._product = grouped_product(self._torch)
        d_out, rows, factors, sizes, w1, w2 = operands
        ends = jnp.cumsum(sizes).astype(jnp.int32)
        arrays = jax.block_until_ready((d_out, rows, factors[:, None], ends, w1, w2))
        # Kept, because torch reads their memory.
        self._arrays = arrays
        self._d_out, self._rows, self._factors, self._ends, self._w1, self._w2 = map(
            self._torch.from_dlpack, arrays
        )
        self._activate, self._activate_back = between_products(self._torch)
        self.settings = {"torch": self._torch.__version__, "between_products": "eager"}
        if self._rows.is_cuda:
            self._compile()

    def _compile(self) -> None:
        eager = (self._activate, self._activate_back)
        compiled = [self._torch.compile(fn, dynamic=False) for fn in eager]
        try:
            # Its compilers would be processes of their own, started beside jax's threads.
            settings: Any = importlib.import_module("torch._inductor.config")
            settings.compile_threads = 1
            pre = self._rows.new_zeros(self._rows.shape[0], self._w1.shape[1])
            compiled[0](pre, self._factors)
            compiled[1](pre, self._factors, pre[:, ::2].contiguous())
        except Exception as error:  # noqa: BLE001
            self.settings["between_products"] = f"eager, because {error!r}"[:300]
            return
        self._activate, self._activate_back = compiled
        self.settings["between_products"] = "torch.compile"

    def run(self, backward: bool) -> tuple[Any, ...]:
        """The result, and with ``backward`` d_rows, d_factors, dw1 and dw2: torch's tensors, ready."""
        results = self._run(backward)
        self._wait()
        return results

    def repeat(self, backward: bool, times: int) -> None:
        """The same many times, to the end of the last."""
        for _ in range(times):
            self._run(backward)
        self._wait()

    def _run(self, backward: bool) -> tuple[Any, ...]:
        product, ends = self._product, self._ends
        pre = product(self._rows, self._w1.transpose(1, 2), offs=ends)
        out = product(self._activate(pre, self._factors), self._w2.transpose(1, 2), offs=ends)
        if not backward:
            return (out,)
        d_act = product(self._d_out, self._w2, offs=ends)
        act, d_pre, d_factors = self._activate_back(pre, self._factors, d_act)
        d_rows = product(d_pre, self._w1, offs=ends)
        dw1 = product(d_pre.t(), self._rows, offs=ends)
        dw2 = product(self._d_out.t(), act, offs=ends)
        return out, d_rows, d_factors, dw1, dw2

    def _wait(self) -> None:
        if self._rows.is_cuda:
            self._torch.cuda.synchronize()


def as_jax(results: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """The same memory as jax arrays."""
    return tuple(jnp.from_dlpack(x.contiguous()) for x in results)


def release() -> None:
    """Gives the memory that torch keeps for later back to the GPU."""
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def grouped_product(torch: Any) -> Any:
    """torch's grouped matmul.

    Raises:
      ImportError: there is none.
    """
    functional = importlib.import_module("torch.nn.functional")
    product = getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if product is None:
        raise ImportError(f"torch {torch.__version__} has no grouped_mm")
    return product


def between_products(torch: Any) -> tuple[Any, Any]:
    """What follows the first product, and its way back; f32 inside."""

    def forward(pre: Any, factors: Any) -> Any:
        gate, up = pre.float().chunk(2, dim=1)
        return (gate * gate.sigmoid() * up * factors).to(pre.dtype)

    def backward(pre: Any, factors: Any, d_act: Any) -> tuple[Any, Any, Any]:
        gate, up = pre.float().chunk(2, dim=1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        d = d_act.float()
        d_factors = (d * silu * up).sum(dim=1)
        d = d * factors
        d_gate = d * up * (sigmoid + silu * (1 - sigmoid))
        d_pre = torch.cat([d_gate, d * silu], dim=1).to(pre.dtype)
        return (silu * up * factors).to(pre.dtype), d_pre, d_factors

    return forward, backward
