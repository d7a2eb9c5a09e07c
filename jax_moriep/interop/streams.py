"""Makes XLA's stream the current one of the array libraries that this process uses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def current(device: int, stream: int) -> Iterator[None]:
    """Within it torch and CuPy, if they are imported already, run on XLA's stream.

    Args:
      device: the number of the GPU in this process.
      stream: the address of XLA's stream.
    """
    with contextlib.ExitStack() as stack:
        torch = sys.modules.get("torch")
        # False too while another thread is still importing torch.
        if torch is not None and hasattr(torch, "cuda") and torch.cuda.is_available():
            stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(stream, device=device)))
        cupy = sys.modules.get("cupy")
        if cupy is not None and hasattr(cupy, "cuda") and cupy.cuda.is_available():
            stack.enter_context(cupy.cuda.Device(device))
            stack.enter_context(cupy.cuda.ExternalStream(stream, device))
        yield
