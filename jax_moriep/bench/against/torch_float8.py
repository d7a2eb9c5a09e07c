"""torch's grouped product of float8 rows and weights with a scale each, for ``bench kernels --quant``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from jax_moriep.bench.problem.shares import Share


def gate_up(share: Share) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """The product of gate_up's shape.

    Returns:
      By label, with how many times: a call that does it so often, to its end; {} where torch has no such one.
    """
    try:
        torch: Any = importlib.import_module("torch")
        product = torch._scaled_grouped_mm
    except (ImportError, AttributeError):
        return {}

    def repeated(fast: bool, times: int) -> Callable[[], Any]:
        device, code = "cuda", torch.float8_e4m3fn
        x = torch.randn(share.rows, share.hidden, device=device, dtype=torch.bfloat16).to(code)
        w = torch.randn(share.experts, 2 * share.inner, share.hidden, device=device, dtype=torch.bfloat16)
        w = w.to(code).transpose(1, 2)
        of_x, of_w = torch.ones(share.rows, device=device), torch.ones(w.shape[0], w.shape[2], device=device)
        count = share.rows // share.experts
        ends = torch.arange(1, share.experts + 1, device=device, dtype=torch.int32) * count

        def run() -> None:
            for _ in range(times):
                product(x, w, of_x, of_w, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=fast)
            torch.cuda.synchronize()

        return run

    return {
        "torch grouped float8 gate_up": lambda times: repeated(False, times),
        "torch grouped float8 gate_up, fast sums": lambda times: repeated(True, times),
    }
