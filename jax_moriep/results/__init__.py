"""What a result that is kept has beside its numbers: where they were made (``machine``), and how the files of
such results are read and drawn (``figures``). The demo and the bench share it."""
