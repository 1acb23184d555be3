"""Property-based tests draw the same examples every time, so that a commit is judged by what it changed.

`NFNETS_GRAPHS=1000` (`make soak`) draws that many random networks instead of 100, and new ones every time.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.register_profile(
    "graphs",
    max_examples=int(os.environ.get("NFNETS_GRAPHS", "100")),
    derandomize="NFNETS_GRAPHS" not in os.environ,
    deadline=None,
    print_blob=True,
    suppress_health_check=slow,
)
settings.load_profile("tests")
