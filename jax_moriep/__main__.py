"""``python -m jax_moriep`` is ``jax-moriep``."""

import sys

from jax_moriep.cli import main

sys.exit(main())
