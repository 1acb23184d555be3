"""A run that came to nothing says so: no weights, no verdict, an exit code of its own."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from nfnets import cli
from nfnets.train.compare import ExperimentConfig, cost, run_experiment, summary
from nfnets.train.compare.report import write_report
from nfnets.train.config import RunConfig
from nfnets.train.loop import engine, folder

FIELDS: dict[str, Any] = {
    "model": "train_nets:plain_net",
    "train_limit": 200,
    "epochs": 1,
    "batch_size": 36,
    "threads": 1,
    "device": "cpu",
}


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_diverged_run_leaves_no_weights(tmp_path: Path, ema: float | None) -> None:
    config = RunConfig.create(**FIELDS | {"lr": 1e12, "epochs": 50, "ema_decay": ema})
    result = engine.run(config, tmp_path)
    assert result["status"] == "diverged"
    assert not list(tmp_path.glob("*.safetensors"))
    assert folder.lost(tmp_path, config, result) == ""
    assert engine.run(config, tmp_path) == result


def test_weights_that_fail_on_the_test_split_go_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.create(**FIELDS)
    assert engine.run(config, tmp_path, test=False)["status"] == "done"
    assert (tmp_path / folder.MODEL).is_file()
    evaluate = engine.evaluate

    def infinite(*given: Any, **named: Any) -> Any:
        found = evaluate(*given, **named)
        object.__setattr__(found, "loss", math.inf)
        return found

    monkeypatch.setattr(engine, "evaluate", infinite)
    result = engine.run(config, tmp_path)
    assert (result["status"], result["diverged_at"], result["test_accuracy"]) == ("diverged", None, None)
    assert not (tmp_path / folder.MODEL).exists()


Status = Callable[[str, int], str]


def made_up(status: Status) -> Callable[..., dict[str, Any]]:
    """`engine.run` with statuses by arm and seed; accuracies are 0.8 plus a hundredth per seed, nf's half more."""

    def run(config: RunConfig, place: Path, **_: Any) -> dict[str, Any]:
        place.mkdir(parents=True)
        (place / "log.jsonl").write_text('{"step": 1, "epoch": 1.0, "loss": 2.3, "lr": 0.1}\n')
        accuracy = 0.8 + 0.01 * config.seed * (1.5 if config.method == "nf" else 1)
        found = status(config.method, config.seed)
        numbers = {
            "val_accuracy": accuracy,
            "val_loss": 1.0,
            "test_accuracy": accuracy,
            "test_loss": 1.0,
            "ece": 0.1,
        }
        return (numbers if found == "done" else dict.fromkeys(numbers)) | {
            "status": found,
            "diverged_at": None if found == "done" else 1,
            "steps": 1,
            "train_seconds": 1.0,
            "images_per_second": 10.0,
            "peak_memory_mb": 1.0,
        }

    return run


def results(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: Status,
    arms: tuple[str, ...] = ("bn", "nf"),
    **fields: Any,
) -> dict[str, Any]:
    monkeypatch.setattr(engine, "run", made_up(status))
    named = [{"name": arm, "method": arm} for arm in arms]
    config = {
        "run": {"data": "digits", "threads": 1},
        "arms": named,
        "seeds": [0, 1, 2],
        "lrs": [0.1],
        **fields,
    }
    return run_experiment(ExperimentConfig.create(**config), out)


CASES: dict[str, tuple[Status, str]] = {
    "both": (lambda arm, seed: "diverged", "every run of both arms diverged"),
    "arm": (lambda arm, seed: "diverged" if arm == "nf" else "done", "every run of this arm diverged"),
    "baseline": (lambda arm, seed: "diverged" if arm == "bn" else "done", "every run of bn diverged"),
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compared_with_substituted_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    status, why = CASES[case]
    found = results(tmp_path, monkeypatch, status)
    bn, nf = summary.rows(found)
    assert nf.difference is None
    assert nf.alone is None
    assert math.isnan(nf.p)
    for row, arm in ((bn, "bn"), (nf, "nf")):
        lost = status(arm, 0) == "diverged"
        assert row.diverged == 3 * lost
        assert (row.accuracies == ()) == lost == math.isnan(row.accuracy.mean)
        assert (summary.cells(row)[3] == "–") == lost
    (verdict,) = summary.summarize(found).verdicts
    assert (verdict.kind, why in verdict.text) == ("no comparison", True)
    assert summary.summarize(found).says_nothing
    page = write_report(tmp_path).read_text().split("<main>")[1].split("<script")[0]
    assert f'<li class="no-comparison">nf at batch size 64: no comparison with bn: {why}.' in page
    assert "10.00 %" not in page
    assert "+0.00" not in page


def test_a_pair_that_diverged_on_both_sides_is_no_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {("bn", 0), ("nf", 0), ("nf", 1)}
    found = results(
        tmp_path,
        monkeypatch,
        lambda arm, seed: "diverged" if (arm, seed) in lost else "done",
        seeds=[0, 1, 2, 3],
    )
    _, nf = summary.rows(found)
    # Seed 0 tells nothing; at seed 1 nf counts as chance, for leaving it out would reward divergence.
    theirs = stats.ttest_rel([0.1, 0.83, 0.845], [0.81, 0.82, 0.83])
    interval = theirs.confidence_interval()
    assert nf.difference is not None
    assert (nf.difference.low, nf.difference.high) == pytest.approx((interval.low, interval.high))
    assert nf.p == pytest.approx(theirs.pvalue)
    (verdict,) = summary.summarize(found).verdicts
    assert "2 of 4 runs diverged and count as chance" in verdict.text
    assert not summary.summarize(found).says_nothing


@pytest.mark.parametrize("lost", ["nf", "gn"])
def test_other_arms_are_compared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    found = results(
        tmp_path, monkeypatch, lambda arm, seed: "diverged" if arm == lost else "done", ("bn", "nf", "gn")
    )
    kinds = {verdict.arm: verdict.kind for verdict in summary.summarize(found).verdicts}
    assert kinds[lost] == "no comparison" != kinds[({"nf", "gn"} - {lost}).pop()]
    assert not summary.summarize(found).says_nothing
    # What is not tested is no part of what Holm corrects for.
    (row,) = [row for row in summary.rows(found) if row.difference is not None]
    assert row.difference == row.alone
    assert "Holm" not in summary.caption(summary.summarize(found))


def test_one_arm_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary.summarize(
        results(tmp_path / "a", monkeypatch, lambda *_: "diverged", ("bn",))
    ).says_nothing
    assert not summary.summarize(
        results(tmp_path / "b", monkeypatch, lambda *_: "done", ("bn",))
    ).says_nothing


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["nfnets", *line.split()])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return call


TINY = "--model train_nets:plain_net --train-limit 200 --epochs 1 --set threads=1 --set warmup_epochs=0"


def test_a_diverging_train_has_an_exit_code_and_no_weights(command: Any, tmp_path: Path) -> None:
    for _ in range(2):  # when it is read back, too
        code, out = command(f"train {TINY} --method bn --lr 1e12 --out r")
        assert code == 3
        assert re.search(r"diverged at step \d", out)
        assert "wrote r/result.json, log.jsonl" in out
    assert not list((tmp_path / "r").glob("*.safetensors"))


@pytest.mark.parametrize(("lrs", "expected"), [("1e12", 3), ("0.1", 0)])
def test_a_comparison_of_nothing_has_an_exit_code(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lrs: str, expected: int
) -> None:
    monkeypatch.setattr(cost, "measure_all", lambda config, out: [])  # clocks are not what is looked at here
    code, out = command(
        f"compare {TINY} --arms bn,bn:label_smoothing=0.1 --seeds 2 --lrs {lrs} --jobs 1 --out r"
    )
    assert code == expected
    assert ("no comparison" in out) == (expected == 3)
    assert json.loads((tmp_path / "r" / "results.json").read_text())["complete"]
