"""Training runs whose comparisons can be believed: keyed, resumable, bit-exact.

From the ground up: the files of this folder (configuration, keyed randomness, models by name, recipes), `data`,
`augment`, `loop` (one run) and `compare` (many, and what they say). Each imports what stands before it, never after.
"""

from nfnets.train.config import RunConfig
from nfnets.train.data import Data, load
from nfnets.train.loop.engine import run
from nfnets.train.recipes import clipping, conversion_options

__all__ = ["Data", "RunConfig", "clipping", "conversion_options", "load", "run"]
