"""What a result that is kept has beside its numbers: where they were made (``machine``), whether its file can
be written (``files``), and how such files are read and drawn (``figures``). The demo and the bench share it.
"""
