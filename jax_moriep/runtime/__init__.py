"""Below the transports: groups of ranks, the key-value exchange, native libraries and custom-call targets.

| file | |
|---|---|
| `compat.py` | all that depends on the jax version |
| `settings.py` | the environment variables |
| `place.py` | where an exchange runs: what transports and experts are asked about |
| `mesh.py`, `nodes.py` | a mesh, the groups of ranks along its axis, and the nodes of a group |
| `hosts.py`, `store.py` | which machine each process is on; how they tell each other |
| `library.py`, `native_api.py` | the native libraries, and the C functions by which groups are opened |
| `group.py` | opens the memory that the ranks of a group share |
| `targets.py` | the custom calls |
| `order.py` | the order that links the exchanges of a program |
| `derivatives.py`, `unbatched.py` | which transformations of JAX an exchange refuses |
| `watchdog.py`, `memory.py` | the process: its end beside a failed exchange, and its freed buffers |
"""
