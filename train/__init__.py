"""Training runs whose comparisons can be believed: keyed, resumable, bit-exact."""

from nfnets.train.config import RunConfig
from nfnets.train.data import Data, load
from nfnets.train.engine import run

__all__ = ["Data", "RunConfig", "load", "run"]
