"""Killed at any point, a run goes on to the same model, moving average, optimizer and log, to the last bit.

`NFNETS_KILLS` sets how many kills at random points and times there are besides the chosen ones (`make soak`: 200),
`NFNETS_KILLS_SEED` which ones. `pytest -s` lists them by kind.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train_kills
from PIL import Image

KILLS = int(os.environ.get("NFNETS_KILLS", "12"))
SEED = 1000 * int(os.environ.get("NFNETS_KILLS_SEED", "0"))
EPOCHS, PER_EPOCH = 3, 216 // 36
FIELDS: dict[str, Any] = {
    "model": "train_nets:dropout_net",
    "data": "digits",
    "train_limit": 240,
    "epochs": EPOCHS,
    "batch_size": 36,
    "checkpoint_every": 4,
    "ema_decay": 0.9,
    "warmup_epochs": 1,
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "threads": 1,
    "device": "cpu",
}
# Around step 1, the epochs' ends (6, 12), inside the writing of a checkpoint, between its renames, after a log line.
POINTS = [
    ("step", 1),
    ("logged", 1),
    ("half-saved", 1),
    ("step", 6),
    ("half-saved", 2),
    ("before-rename", 3),
    ("after-rename", 2),
    ("logged", 3),
    ("step", 7),
    ("after-rename", 4),
]
LAST = {"step": 18, "logged": 6, "half-saved": 5, "before-rename": 9, "after-rename": 9}


def draw_point(draw: random.Random) -> tuple[str, int]:
    point = draw.choice(sorted(LAST))
    return point, draw.randint(1, LAST[point])


def check(folder: Path, expected: dict[str, Any]) -> None:
    steps = len(train_kills.steps_logged(folder))
    assert train_kills.steps_logged(folder) == list(range(1, steps + 1))  # each once
    assert train_kills.outcome(folder) == expected


def soak(
    kills: int, tmp_path: Path, expected: dict[str, Any], attempt: Callable[[Path, bool], str | None]
) -> None:
    """Attempts, most of them killed, until there were so many kills; every run comes to its end and is compared.

    An attempt (which may be told not to die) gives the kind of its kill, or None where the run came to its end.
    """
    folder, kinds, compared = tmp_path / "0", Counter[str](), 0
    for number in range(1, 20 * kills):
        if (kind := attempt(folder, kinds.total() < kills)) is not None:
            kinds[kind] += 1
            continue
        check(folder, expected)
        compared += 1
        folder = tmp_path / str(number)
        if kinds.total() >= kills:
            print(f"\n{kinds.total()} kills, {compared} ends compared: {dict(sorted(kinds.items()))}")
            return
    raise AssertionError(f"only {kinds.total()} of {kills} kills came in time")


@pytest.fixture(scope="module", params=[1, 2], ids=["accumulation-1", "accumulation-2"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The uninterrupted run: its fields and its outcome."""
    fields = FIELDS | {"accumulation": request.param}
    folder = tmp_path_factory.mktemp("whole")
    assert train_kills.finish(train_kills.start(fields, folder)) == 0
    assert train_kills.steps_logged(folder) == list(range(1, EPOCHS * PER_EPOCH + 1))
    return fields, train_kills.outcome(folder)


def test_kills_at_chosen_points_change_nothing(whole: Any, tmp_path: Path):
    fields, expected = whole
    points = POINTS if fields["accumulation"] == 1 else POINTS[::3]
    kills = 0
    for point in points:
        code = train_kills.finish(train_kills.start(fields, tmp_path, point))
        assert code in (0, -signal.SIGKILL)
        if code == 0:  # this far into the run the point no longer occurred
            break
        kills += 1
        assert not (tmp_path / "result.json").exists()
    else:
        assert train_kills.finish(train_kills.start(fields, tmp_path)) == 0
    assert kills >= 3
    check(tmp_path, expected)


def test_kills_at_random_points_and_times_change_nothing(whole: Any, tmp_path: Path):
    fields, expected = whole
    draw = random.Random(SEED + fields["accumulation"])
    started = time.monotonic()
    assert train_kills.finish(train_kills.start(fields, tmp_path / "timed")) == 0
    span = time.monotonic() - started

    def attempt(folder: Path, dies: bool) -> str | None:
        if not dies or draw.random() < 0.5:
            point = draw_point(draw)
            code = train_kills.finish(train_kills.start(fields, folder, point if dies else None))
            assert code in (0, -signal.SIGKILL)
            return point[0] if code else None
        process = train_kills.start(fields, folder)
        process.join(draw.uniform(0.1, 0.9) * span)
        killed = process.is_alive()
        if killed:
            process.kill()
        assert train_kills.finish(process) in ((-signal.SIGKILL, 0) if killed else (0,))
        return "time" if killed and not (folder / "result.json").exists() else None

    soak(round(KILLS * 0.3), tmp_path, expected, attempt)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_kills_of_two_processes_change_nothing(tmp_path: Path, accumulation: int):
    fields = FIELDS | {"accumulation": accumulation}
    for rank in train_kills.start_ranks(fields, tmp_path / "whole", 2):
        assert train_kills.finish(rank) == 0
    expected = train_kills.outcome(tmp_path / "whole")
    draw = random.Random(SEED + accumulation)

    def attempt(folder: Path, dies: bool) -> str | None:
        # Both at once, or one, whose loss the other notices.
        victims = draw.choice([(0, 1), (0,), (1,)])
        point = draw_point(draw) if 0 in victims else ("step", draw.randint(1, LAST["step"]))
        children = train_kills.start_ranks(fields, folder, 2, point if dies else None, victims)
        codes = [train_kills.finish(child) for child in children]
        if codes == [0, 0]:
            return None
        assert -signal.SIGKILL in codes
        ranks = "both ranks" if len(victims) == 2 else f"rank {victims[0]}"
        return None if (folder / "result.json").exists() else f"{point[0]}, {ranks}"

    soak(max(1, round(KILLS * 0.1)), tmp_path, expected, attempt)


def test_kills_of_a_run_with_loader_workers_change_nothing(tmp_path: Path):
    """Streamed images: what was read ahead of the kill is read again, with other workers."""
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(50):
            pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{number}.png")
    (tmp_path / "images" / "dog" / "7.png").write_bytes(b"")
    streamed = {"data": "timm:folder", "data_dir": tmp_path / "images", "image_size": 16, "batch_size": 12}
    fields = FIELDS | streamed | {"train_limit": None, "unreadable_budget": 1, "workers": 0}
    assert train_kills.finish(train_kills.start(fields, tmp_path / "whole")) == 0
    expected = train_kills.outcome(tmp_path / "whole")
    assert expected["unreadable"]["count"] == 1
    draw = random.Random(SEED)

    def attempt(folder: Path, dies: bool) -> str | None:
        workers, point = draw.choice([0, 1, 2]), draw_point(draw)
        child = train_kills.start(fields | {"workers": workers}, folder, point if dies else None)
        code = train_kills.finish(child)
        assert code in (0, -signal.SIGKILL)
        killed = code != 0 and not (folder / "result.json").exists()
        return f"{point[0]}, {workers} workers" if killed else None

    soak(max(1, round(KILLS * 0.2)), tmp_path, expected, attempt)
