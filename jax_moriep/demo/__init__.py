"""The demo: several processes train a small mixture-of-experts language model on one machine.

``run.run`` is the demo's first process, which ``jax-moriep demo`` calls; bench times a step of ``train``.

| file | |
|---|---|
| `settings.py` | what the user chose |
| `data.py`, `model.py` | the text, and what learns it |
| `checkpoint.py`, `train.py` | what each process runs |
| `report.py`, `picture.py`, `curves.py` | what is shown of a run, and of several beside each other |
| `run.py` | starts the processes and shows how they get on |
"""
