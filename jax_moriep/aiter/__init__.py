"""AITER's kernels from the installed amd-aiter wheel: where they lie, what they are, and their layout.

| file | |
|---|---|
| `wheel.py` | where the wheel's code objects are |
| `code_object.py` | what one says of its kernel's arguments |
| `kernels.py` | which kernel serves which weights and sizes |
| `layout.py` | how the kernels want codes to lie |
"""
