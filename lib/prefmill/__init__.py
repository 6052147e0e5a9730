"""prefmill: from judgements to preference-tuned models."""

import os

__version__ = "0.1.0"

# While one of torch's threads waits for the others it spins for milliseconds, and on a machine with other work keeps
# from them the core that they wait for (docs/decisions/0195). libgomp reads this when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
