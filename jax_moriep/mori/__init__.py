"""What this package knows of amd-mori's wheel: where it is, its kernels, its tables and its limits.

Nothing here imports mori: its Python modules need torch and libraries that many machines lack, and what we
use of the wheel are its C++ libraries, its headers and its tables.
"""
