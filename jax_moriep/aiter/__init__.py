"""AITER's kernels from the installed amd-aiter wheel: where they lie, what they are, and their layout."""
