"""Jobs of several processes on one or more machines: a library that the command line, tests and bench use.

``launch.launch`` is the one call from outside. Each file imports of the others those above it only.

| file | |
|---|---|
| `child.py` | what each process runs: joins jax.distributed, then runs the script |
| `process.py` | one process: its output, its end, how it is ended; the events that are waited for |
| `wait.py` | when a job is over, and by which code it ends |
| `nodes.py` | of which machines a job is, and whether they can reach this one |
| `wire.py` | lines of JSON between the launchers of two nodes |
| `party.py` | launchers that have met, and what they tell each other |
| `meeting.py` | how they find each other |
| `launch.py` | ``launch``: all of it |
"""
