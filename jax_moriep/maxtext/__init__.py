"""``ep_moe`` inside MaxText: two lines before the model is made, and its sparse mixture-of-experts run here.

MaxText is imported by ``install`` and by nothing else. See docs/maxtext.md for what is served.

| file | |
|---|---|
| `install.py` | what is put into MaxText |
| `options.py` | which of its options can be served |
| `routed.py` | what stands in the place of its layer |
"""

from jax_moriep.maxtext.install import install, uninstall

__all__ = ["install", "uninstall"]
