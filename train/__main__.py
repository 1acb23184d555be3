"""`torchrun … -m nfnets.train` and `python -m nfnets.train`: the command `nfnets train`, options and all."""

from __future__ import annotations

import sys

from nfnets.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
