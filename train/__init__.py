"""Training runs whose comparisons can be believed: keyed, resumable, bit-exact.

The story, in the order of imports: `config` says what a run is (`named_recipes` and `method_defaults` fill it in),
`data` reads and splits, `augment` draws, `loop` runs once, `compare` runs many and says what came out, `compare.page`
shows it.
"""

from nfnets.advice import clipping, conversion_options
from nfnets.train.config import RunConfig
from nfnets.train.data import Data, load
from nfnets.train.loop.engine import run

__all__ = ["Data", "RunConfig", "clipping", "conversion_options", "load", "run"]
