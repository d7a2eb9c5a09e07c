"""``jax-moriep bench`` and ``jax-moriep plot``: comparisons whose numbers were made and checked in one run.

``cases`` says what to run, ``patterns`` where tokens go and ``traffic`` how many bytes that is. ``exchange``,
``experts`` and ``layer`` are the three comparisons; ``oracle`` is what they are checked against and
``ragged`` the baseline of two of them. ``worker`` is what each process of a run does, on a ``world`` of
ranks, with ``timing`` by turns and a look at its ``memory``. ``runner`` starts the processes and joins what
they found, ``report`` writes it as tables and ``picture`` draws it.
"""
