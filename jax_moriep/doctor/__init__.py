"""What can run on this machine, and for everything else why not and the cure.

| file | |
|---|---|
| `mori.py` | what there is of MORI |
| `facts.py` | ``examine``: all that is found, as one dict |
| `text.py` | the same for people |
"""
