"""The formats of results, by which a file says what wrote it; a change of what is read needs a new number."""

BENCH = "jax-moriep bench 1"
FLOOR = "jax-moriep bench floor 1"
HOST = "jax-moriep bench host 2"
KERNELS = "jax-moriep kernels 1"
LOAD = "jax-moriep bench load 1"
PLAN = "jax-moriep bench plan 1"
