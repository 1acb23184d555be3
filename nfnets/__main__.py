"""`python -m nfnets`: the commands, where no script is on the path."""

from __future__ import annotations

from nfnets.cli import main

if __name__ == "__main__":
    main()
