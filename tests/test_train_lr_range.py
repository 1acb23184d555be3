from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.loop.engine import run
from nfnets.train.loop.lr_range import lr_range, save, suggestion

FIELDS: dict[str, Any] = {
    "model": "train_nets:plain_net",
    "train_limit": 200,
    "epochs": 1,
    "batch_size": 30,
    "threads": 1,
    "device": "cpu",
}


def test_the_ramp_is_exponential_and_ends_at_the_explosion():
    seen: list[tuple[int, float, float]] = []
    found = lr_range(
        RunConfig.create(**FIELDS), start=1e-4, stop=1e4, steps=81, on_step=lambda *row: seen.append(row)
    )
    assert found.stopped
    assert len(found.rates) == len(found.losses) == len(found.smoothed) == len(seen) < 81
    assert np.allclose(np.diff(np.log10(found.rates)), 0.1)
    assert found.rates[0] == pytest.approx(1e-4)
    assert found.losses[0] == pytest.approx(math.log(10), rel=0.2)
    assert found.losses == tuple(loss for _, _, loss in seen)
    assert max(found.smoothed[:-1]) <= 4 * min(found.smoothed)
    assert 1e-3 < found.suggested < found.lowest < 10


def test_a_range_that_is_too_low_is_run_to_its_end():
    found = lr_range(RunConfig.create(**FIELDS, sam_rho=0.05), start=1e-6, stop=1e-4, steps=12)
    assert not found.stopped
    assert found.rates[-1] == pytest.approx(1e-4)


def test_the_steepest_place_of_a_known_curve():
    rates = np.logspace(-5, 1, 121)
    noise = 0.05 * np.random.default_rng(0).standard_normal(121)
    fall = 2.3 - 1.5 / (1 + np.exp(-3 * (np.log10(rates) + 1.5)))
    losses = fall + noise + (rates / 3) ** 4
    suggested, lowest = suggestion(rates.tolist(), losses.tolist(), fall.tolist())
    assert -2.1 < math.log10(suggested) < -0.9  # the logistic fall's middle is at −1.5
    assert lowest == pytest.approx(rates[-1])


def test_a_second_fall_after_an_explosion_is_not_suggested():
    rates = np.logspace(-5, 1, 121)
    fall = 2.3 - 1.0 / (1 + np.exp(-6 * (np.log10(rates) + 2)))
    fall[80:90] += 0.5  # shaken at 0.1, and lower than ever after 0.3
    fall[90:] = np.linspace(1.8, 0.9, 31)
    suggested, lowest = suggestion(rates.tolist(), fall.tolist(), fall.tolist())
    assert -2.5 < math.log10(suggested) < -1.5
    assert lowest == pytest.approx(rates[79])


def test_impossible_ranges_and_an_explosion_from_the_start():
    config = RunConfig.create(**FIELDS)
    for kwargs in ({"start": 1.0, "stop": 0.1}, {"start": 0.0}, {"steps": 9}, {"stop": math.inf}):
        with pytest.raises(UserError, match="expected 0 < start < stop and 10 steps or more"):
            lr_range(config, **kwargs)
    with pytest.raises(UserError, match=r"exploded after \d steps"):
        lr_range(config, start=1e8, stop=1e12, steps=10)


def test_files_beside_a_run_that_stays_as_it_is(tmp_path: Path):
    config = RunConfig.create(**FIELDS)
    run(config, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = lr_range(config, steps=20)
    text, image = save(found, tmp_path)
    assert json.loads(text.read_text()) == json.loads(json.dumps(asdict(found)))
    with Image.open(image) as opened:
        assert opened.size == (960, 600)
        assert len(set(opened.convert("L").resize((96, 60)).tobytes())) > 10  # something is drawn
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() - before.keys() == {"lr-range.json", "lr-range.png"}
    assert before.items() <= after.items()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save(found, tmp_path / "file")
