"""What a result that is kept has beside its numbers. The demo and the bench share it.

| file | |
|---|---|
| `machine.py` | where numbers were made |
| `files.py` | whether a file can be written, asked before it is measured |
| `figures.py` | how files of results are read and drawn |
"""
