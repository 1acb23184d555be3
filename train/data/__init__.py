"""Data sets: read, checked and split; resident on the device, or streamed from their files.

`datasets` loads by name. `data` says what a data set is to the rest, `splits` which samples a split holds.
`imagefolder`, `cifar` and `idx` read what is then resident; `streamed_splits`, `stream` and `readers` are for data that
stay on disk.
"""

from nfnets.train.data.data import Data
from nfnets.train.data.datasets import load

__all__ = ["Data", "load"]
