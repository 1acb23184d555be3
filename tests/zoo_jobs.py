"""Jobs for the zoo's pool that behave badly; imported by the spawned workers, so no torch here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Named:
    """As much of an entry as a pool looks at."""

    key: str


def job(entry: Any, methods: Sequence[str], report: Callable[[dict[str, Any]], None]) -> None:
    """Does what the methods' names say."""
    held = []
    for method in methods:
        report({"model": entry.key, "starts": method})
        if method == "spin":
            while True:
                pass
        if method == "die":
            os._exit(3)
        if method == "grow":
            held.append(bytearray(os.urandom(2**20)) * 400)
            time.sleep(30)
        report({"model": entry.key, "method": method, "outcome": "converted", "checks": {}, "seconds": 0.0})


def broken_from_the_start(
    entry: Any, methods: Sequence[str], report: Callable[[dict[str, Any]], None]
) -> None:
    """Cannot even build the model."""
    report({"model": entry.key, "starts": "bn"})
    os._exit(1)
