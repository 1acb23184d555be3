"""Data sets: read, checked and split; resident on the device, or streamed from their files.

`datasets` loads by name, `splits` says what a data set is to the rest; `streams`, `stream` and `readers` are for data
that stay on disk.
"""

from nfnets.train.data.datasets import load
from nfnets.train.data.splits import Data

__all__ = ["Data", "load"]
