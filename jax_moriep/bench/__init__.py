"""``jax-moriep bench``, ``tune`` and ``plot``: how a benchmark's number is made, in six rooms.

A number's life, which is also the order of the rooms; none imports from one that follows it.

- ``problem``: what is computed. ``names`` of what is compared; ``cases``, each of sizes; the ``world`` of a
  case's processes; ``patterns`` of routing and their ``traffic``. Data is a ``formula``'s, so that
  ``oracle``, ``layer_oracle``, ``router_oracle`` and ``decode_oracle`` make what they need again; ``checks``
  hold results against them. ``shares`` of models for kernels, and ``quantised_oracle``; a ``checkpoint`` to
  load; ``models``, ``routing`` and ``destinations`` for plans; ``published`` numbers of others; ``formats``
  of files.
- ``measure``: how a number is taken. A function becomes one of ``programs``, which ``repeat`` their work on
  the device; the ``pool`` compiles them; ``calls`` of them go by ``turns``, and ``seconds`` makes medians
  of spans. The ``memory`` of a process.
- ``against``: what it is held beside. ``floors``, of the fastest ``copies``; ``dense`` products, ``plain``
  layers and torch's in ``torch_layer``, ``ragged`` experts; ``grouped`` products of ``hopper`` (jax's),
  ``tokamax``, ``torch_mlp`` and ``torch_float8``, and ``baselines``, the table of them.
- ``kinds``: what there is to measure, with the faces of ``kind``. With cases, named in ``table``:
  ``exchange``, ``experts``, ``layer``, ``decode``, ``link``, ``route`` and ``train``. Without: ``load``; on
  one GPU ``kernels`` (``products``, ``kernels_result``), ``quantised`` (``quantised_work``) and ``tune``; on
  paper ``plan`` (``plan_bytes``).
- ``run``: who does it. ``runner`` starts ``processes`` in their ``environment``, each a ``worker``, and
  joins what they found; ``host`` does so for all ``devices``, by its ``host_plan``; ``floor`` for one GPU,
  by its ``floor_plan``; ``load`` with ``load_worker``.
- ``show``: for people. Tables: ``report``, ``host_report``, ``floor_report`` of ``floor_rows``,
  ``load_report``, ``plan_report``; the end of a run, ``kernels_report``. Pictures: ``picture``,
  ``host_picture``, ``floor_picture``, ``kernels_picture``.

Where numbers were made, and how files of them are read and drawn, is ``jax_moriep.results``; the options of
the command line are in ``jax_moriep.cli``, but for those that a kind of case adds itself (``kind.Kind``).
"""
