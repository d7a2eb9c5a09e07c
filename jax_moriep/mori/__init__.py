"""What this package knows of amd-mori's wheel: where it is, its kernels, its tables and its limits.

Nothing here imports mori: its Python modules need torch and libraries that many machines lack, and what we
use of the wheel are its C++ libraries, its headers and its tables.

| file | |
|---|---|
| `wheel.py` | where it is, and where its parts are |
| `compiler.py`, `kernels.py` | the HIP compiler, and the kernels that it makes |
| `tuning.py` | which kernels run and how they are launched, by the wheel's tables |
| `limits.py` | what MORI cannot do, refused before |
| `network.py` | the interfaces and the adapters |
| `world.py` | opens MORI in this process |
"""
