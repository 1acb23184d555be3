"""The protocol: equal budgets, validation decides, test only reports, nothing is run twice."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from nfnets.advice import clipping
from nfnets.errors import UserError
from nfnets.train.compare import (
    Arm,
    Event,
    ExperimentConfig,
    Trial,
    choose,
    experiment,
    run_experiment,
    summary,
)
from nfnets.train.compare.cost import Cost, plain
from nfnets.train.compare.estimate import dry_run
from nfnets.train.compare.page.figures import curves, searched
from nfnets.train.compare.report import write_report
from nfnets.train.config import RunConfig
from nfnets.train.data import load
from nfnets.train.loop import engine
from nfnets.train.loop.log import steps_and_evaluations

RUN = {"model": "train_nets:residual_net", "data": "digits", "epochs": 1, "train_limit": 200, "threads": 1}
BN, SMOOTH = {"name": "bn", "method": "bn"}, {"name": "smooth", "method": "bn", "label_smoothing": 0.1}


def make(**fields: Any) -> ExperimentConfig:
    return ExperimentConfig.create(
        **{"run": RUN, "arms": [BN, SMOOTH], "seeds": [0, 1, 2], "lrs": [0.1], **fields}
    )


class FakeEngine:
    """`engine.run` with made-up results, to see what the sweep does with them."""

    def __init__(self, **results: Any) -> None:
        self.calls: list[tuple[str, int, float, int]] = []
        self.results = results

    def run(self, config: RunConfig, folder: Path, **_: Any) -> dict[str, Any]:
        self.calls.append((folder.name, config.batch_size, config.lr, config.seed))
        result = {
            "status": "done",
            "val_accuracy": 0.5,
            "val_loss": 1.0,
            "test_accuracy": 0.5,
            "test_loss": 1.0,
            "ece": 0.1,
            "steps": 2,
            "train_seconds": 1.0,
            "images_per_second": 128.0,
            "peak_memory_mb": 100.0,
            "diverged_at": None,
        }
        return result | self.results["by"](config)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    def install(by) -> FakeEngine:
        engine_ = FakeEngine(by=by)
        monkeypatch.setattr(engine, "run", engine_.run)
        return engine_

    return install


def test_validation_chooses_even_where_the_test_split_says_otherwise(fake, tmp_path: Path) -> None:
    def by(config: RunConfig) -> dict[str, Any]:
        # The higher the rate, the worse on validation and the better on test: a sweep that peeks takes 0.4.
        return {"val_accuracy": 0.9 - config.lr, "test_accuracy": 0.5 + config.lr}

    calls = fake(by).calls
    results = run_experiment(make(lrs=[0.1, 0.2, 0.4]), tmp_path)
    assert {c["lr"] for c in results["chosen"]} == {0.1}
    finals = [run for run in results["runs"] if run["final"]]
    assert {run["test_accuracy"] for run in finals} == {0.6}
    assert len(finals) == 2 * 3
    # Test numbers of the search are not even kept.
    assert all("test_accuracy" not in run for run in results["runs"] if not run["final"])
    # Equal budgets: as many candidates and as many seeds for both arms, and no run twice.
    for arm in ("bn", "smooth"):
        mine = [c for c in calls if c[0].startswith(f"{arm}-")]
        assert sorted(lr for _, _, lr, seed in mine if seed == 0) == [0.1, 0.2, 0.4]
        assert sorted(seed for _, _, lr, seed in mine if lr == 0.1) == [0, 1, 2]
        assert len(mine) == 5
    assert len(calls) == len(set(calls)) == len(make(lrs=[0.1, 0.2, 0.4]).planned())


def test_every_arm_and_batch_size_gets_its_own_rate(fake, tmp_path: Path) -> None:
    best = {(64, 0.0): 0.1, (64, 0.1): 0.2, (16, 0.0): 0.05, (16, 0.1): 0.1}

    def by(config: RunConfig) -> dict[str, Any]:
        return {"val_accuracy": float(config.lr == best[config.batch_size, config.label_smoothing])}

    fake(by)
    config = make(lrs=[0.05, 0.1, 0.2], batch_sizes=[64, 16])
    chosen = {(c["batch_size"], c["arm"]): c["lr"] for c in run_experiment(config, tmp_path)["chosen"]}
    assert chosen == {(64, "bn"): 0.1, (64, "smooth"): 0.2, (16, "bn"): 0.05, (16, "smooth"): 0.1}


def test_a_tuning_seed_of_its_own_is_searched_but_not_reported(fake, tmp_path: Path) -> None:
    fake(lambda config: {"val_accuracy": config.lr})
    results = run_experiment(make(lrs=[0.1, 0.2], tuning_seeds=[9]), tmp_path)
    assert {run["seed"] for run in results["runs"] if not run["final"]} == {9}
    assert {run["seed"] for run in results["runs"] if run["final"]} == {0, 1, 2}
    assert len(results["runs"]) == len(make(lrs=[0.1, 0.2], tuning_seeds=[9]).planned()) == 2 * (2 + 3)
    # A sweep from when there was one goes on.
    assert make(tuning_seed=9) == make(tuning_seeds=[9])
    assert make(tuning_seed=None) == make()


def test_the_mean_over_tuning_seeds_decides(fake, tmp_path: Path) -> None:
    # Each seed alone but 8 prefers 0.1; what 8 loses there outweighs that.
    seen = {0.1: {0: 0.80, 8: 0.50, 9: 0.80}, 0.2: {0: 0.75, 8: 0.75, 9: 0.75}}

    fake(lambda config: {"val_accuracy": seen[config.lr].get(config.seed, 0.8)})
    config = make(lrs=[0.1, 0.2], tuning_seeds=[0, 8, 9])
    results = run_experiment(config, tmp_path)
    assert {c["lr"] for c in results["chosen"]} == {0.2}
    # Seed 0 is searched and reported, and not run twice.
    assert len(results["runs"]) == len(config.planned()) == 2 * (2 * 3 + 2)
    assert {run["seed"] for run in results["runs"] if run["final"]} == {0, 1, 2}
    assert results["complete"]
    for search in searched(results):
        assert [entry["accuracies"] for entry in search["tried"]] == [list(s.values()) for s in seen.values()]
        assert [entry["val_accuracy"] for entry in search["tried"]] == pytest.approx([0.7, 0.75])
    assert "with the mean over seeds 0, 8, 9" in summary.caption(summary.summarize(results))


def test_seeds_of_the_search_stand_once() -> None:
    with pytest.raises(UserError, match=r"tuning_seeds \[8, 8\]: expected each one once"):
        make(lrs=[0.1, 0.2], tuning_seeds=[8, 8])


def test_choose_never_takes_a_diverged_rate_while_another_is_left() -> None:
    diverged = {"status": "diverged", "val_accuracy": None, "val_loss": None}
    done = {"status": "done", "val_accuracy": 0.1, "val_loss": 2.3}
    assert choose([(0.4, diverged), (0.1, done)]) == 0.1
    assert choose([(0.4, diverged), (0.2, diverged)]) == 0.2
    assert choose([(0.1, done), (0.2, done | {"val_loss": 2.2})]) == 0.2
    assert choose([(0.2, done), (0.1, done)]) == 0.1
    # Over several seeds: where fewer diverge, then by the mean of those that did not.
    better = done | {"val_accuracy": 0.9}
    assert choose([(0.4, better), (0.4, diverged), (0.1, done), (0.1, done)]) == 0.1
    assert choose([(0.4, better), (0.4, diverged), (0.1, done), (0.1, diverged)]) == 0.4


def test_a_diverged_run_stays_in_the_table_at_chance(fake, tmp_path: Path) -> None:
    def by(config: RunConfig) -> dict[str, Any]:
        if config.label_smoothing and config.seed == 1:
            nothing = dict.fromkeys(("val_accuracy", "val_loss", "test_accuracy", "test_loss", "ece"))
            return nothing | {"status": "diverged", "diverged_at": 7}
        return {"test_accuracy": 0.9 + 0.01 * config.seed}

    fake(by)
    results = run_experiment(make(), tmp_path)
    bn, smooth = summary.rows(results)
    assert smooth.accuracies == (0.9, 0.1, 0.92)
    assert (bn.diverged, smooth.diverged) == (0, 1)
    theirs = stats.ttest_rel(smooth.accuracies, bn.accuracies).confidence_interval()
    assert smooth.difference is not None
    assert (smooth.difference.low, smooth.difference.high) == pytest.approx((theirs.low, theirs.high))
    (verdict,) = summary.summarize(results).verdicts
    assert verdict.kind == "inconclusive"
    assert "1 of 3 runs diverged" in verdict.text


@pytest.mark.parametrize(
    ("shift", "kind"),
    [
        ((0.010, 0.012, 0.011), "above"),
        ((-0.030, -0.031, -0.032), "below"),
        ((0.001, -0.001, 0.002), "not below"),
        ((0.05, -0.05, 0.02), "inconclusive"),
    ],
)
def test_verdicts_say_what_the_interval_says(
    fake, tmp_path: Path, shift: tuple[float, ...], kind: str
) -> None:
    def by(config: RunConfig) -> dict[str, Any]:
        return {
            "test_accuracy": 0.8 + 0.01 * config.seed + (shift[config.seed] if config.label_smoothing else 0)
        }

    fake(by)
    results = run_experiment(make(), tmp_path)
    (verdict,) = summary.summarize(results).verdicts
    theirs = stats.ttest_1samp(shift, 0).confidence_interval()
    expected = (
        "above"
        if theirs.low > 0
        else "below"
        if theirs.high < 0
        else "not below"
        if theirs.low >= -0.01
        else "inconclusive"
    )
    assert verdict.kind == kind == expected
    assert kind in verdict.text
    assert summary.points(theirs.low) in verdict.text


def test_one_seed_is_inconclusive(fake, tmp_path: Path) -> None:
    fake(lambda config: {"test_accuracy": 0.9 if config.label_smoothing else 0.8})
    results = run_experiment(make(seeds=[0]), tmp_path)
    (verdict,) = summary.summarize(results).verdicts
    assert verdict.kind == "inconclusive"
    assert math.isnan(summary.rows(results)[1].p)


def test_holm_counts_every_comparison_of_the_table(fake, tmp_path: Path) -> None:
    fake(lambda c: {"test_accuracy": 0.5 + c.label_smoothing * (1 + 0.1 * c.seed) + 0.001 * c.batch_size})
    arms = [BN, SMOOTH, {"name": "more", "method": "bn", "label_smoothing": 0.2}]
    table = summary.rows(run_experiment(make(arms=arms, batch_sizes=[16, 64]), tmp_path))
    compared = [row for row in table if row.difference is not None]
    assert len(compared) == 4
    assert all(row.difference is not None and row.p > row.difference.p for row in compared[:1])
    assert math.isnan(table[0].p)


def test_holm_decides_the_verdict(fake, tmp_path: Path) -> None:
    clear, noisy = (0.03, 0.015, 0.02), (0.03, -0.03, 0.01)

    def by(config: RunConfig) -> dict[str, Any]:
        shifts = {0.0: (0.0, 0.0, 0.0), 0.1: clear, 0.2: noisy}[config.label_smoothing]
        return {"test_accuracy": 0.8 + shifts[config.seed]}

    fake(by)
    more = {"name": "more", "method": "bn", "label_smoothing": 0.2}
    (alone,) = summary.summarize(run_experiment(make(), tmp_path / "two")).verdicts
    together, _ = summary.summarize(
        run_experiment(make(arms=[BN, SMOOTH, more]), tmp_path / "three")
    ).verdicts
    p = float(stats.ttest_1samp(clear, 0).pvalue)
    assert p < 0.05 < 2 * p, "Holm: the smaller of two p-values counts twice"
    assert (alone.kind, together.kind) == ("above", "not below")
    wide = stats.ttest_1samp(clear, 0).confidence_interval(1 - 0.05 / 2)
    single = stats.ttest_1samp(clear, 0).confidence_interval(0.95)
    assert f"[{summary.points(wide.low)}, {summary.points(wide.high)}]" in together.text
    assert (
        f"by itself, without Holm's correction over all comparisons, it would be [{summary.points(single.low)}"
        in (together.text)
    )


def test_the_sweep_can_grow_but_not_change(fake, tmp_path: Path) -> None:
    calls = fake(lambda config: {}).calls
    run_experiment(make(), tmp_path)
    run_experiment(
        make(seeds=[0, 1, 2, 3], arms=[BN, SMOOTH, {"name": "x", "method": "bn", "mixup": 0.2}]), tmp_path
    )
    assert len(set(calls)) == 12
    before = (tmp_path / "experiment.json").read_text()
    with pytest.raises(UserError, match="epochs was 1, now 2"):
        run_experiment(make(run=RUN | {"epochs": 2}), tmp_path)
    with pytest.raises(UserError, match=r"arm smooth: label_smoothing was 0\.1, now 0\.2"):
        run_experiment(make(arms=[BN, SMOOTH | {"label_smoothing": 0.2}]), tmp_path)
    assert (tmp_path / "experiment.json").read_text() == before
    kept = experiment.read_experiment(tmp_path / "experiment.json", trusted=RUN["model"])
    assert kept.seeds == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seeds": []}, "seeds="),
        ({"seeds": [0, 0]}, "each one once"),
        ({"arms": []}, "arms="),
        ({"arms": [BN, BN]}, "each one once"),
        ({"lrs": [0.0]}, "greater than 0"),
        ({"lrs": [math.nan]}, "lrs.0=nan"),
        ({"arms": [BN, SMOOTH | {"lrs": [0.1, 0.2]}]}, "budget is equal"),
        ({"arms": [BN | {"lr": 0.3}]}, "the protocol sets it"),
        ({"arms": [BN | {"epochs": 3}]}, "same for all arms"),
        ({"arms": [BN | {"labelsmoothing": 3}]}, "did you mean label_smoothing"),
        ({"run": RUN | {"epoch": 3}}, "did you mean epochs"),
        ({"run": RUN | {"epochs": 0}}, "epochs=0"),
        ({"arms": [BN | {"clipping": -1}]}, "clipping=-1"),
        ({"margin": 1.5}, "margin=1.5"),
        ({"lr_scaling": "cubic"}, "lr_scaling='cubic'"),
        ({"nonsense": 1}, "nonsense=1"),
    ],
)
def test_bad_configurations_are_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        make(**fields)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_rates_scale_with_the_batch_size() -> None:
    arm = Arm.parse("bn")
    config = make(arms=[arm], lrs=[0.1, 0.2], batch_sizes=[64, 16], lr_scaling="linear")
    assert config.candidates(arm, 64) == (0.1, 0.2)
    assert config.candidates(arm, 16) == (0.025, 0.05)
    assert make(arms=[arm], lrs=[0.1], batch_sizes=[64, 16], lr_scaling="sqrt").candidates(arm, 16) == (0.05,)


def test_clipping_is_the_recipes_unless_someone_sets_it() -> None:
    arms = [BN, {"name": "nf", "method": "nf"}, {"name": "off", "method": "nf", "clipping": None}]
    config = make(arms=arms, batch_sizes=[64, 4])
    found = {
        (a, b): config.run_config(Trial(a, b, 0.1, 0)).clipping for a in ("bn", "nf", "off") for b in (64, 4)
    }
    assert found["bn", 64] is found["bn", 4] is found["off", 64] is None
    assert found["nf", 64] == clipping("nf", 64) is not None


def test_a_real_sweep_resumes_where_it_was_interrupted(tmp_path: Path) -> None:
    config = make(seeds=[0, 1], run=RUN | {"epochs": 2, "checkpoint_every": 1}, batch_sizes=[32])
    whole = run_experiment(config, tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if event.trial == Trial("smooth", 32, 0.1, 0) and event.kind == "step" and event.row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, tmp_path / "cut", watch=interrupt)
    partial = summary.read_results(tmp_path / "cut")
    assert not partial["complete"]
    assert len(partial["runs"]) == 1
    steps: list[tuple[Trial, int]] = []

    def watch(event: Event) -> None:
        if event.kind == "step" and "split" not in event.row:
            steps.append((event.trial, event.row["step"]))

    resumed = run_experiment(config, tmp_path / "cut", watch=watch)
    first = [step for trial, step in steps if trial == Trial("smooth", 32, 0.1, 0)]
    assert first[0] > 1, "the open run starts at its checkpoint"
    assert Trial("bn", 32, 0.1, 0) not in {trial for trial, _ in steps}, "a finished run is not run again"
    timing = ("train_seconds", "images_per_second", "peak_memory_mb")
    strip = [
        [{key: value for key, value in run.items() if key not in timing} for run in results["runs"]]
        for results in (whole, resumed)
    ]
    assert strip[0] == strip[1]
    log = steps_and_evaluations(tmp_path / "cut" / "runs" / "smooth-b32-lr0.1-s0" / "log.jsonl")[0]
    assert [row["step"] for row in log] == list(range(1, whole["runs"][0]["total_steps"] + 1))
    # The report is a function of what lies in the directory, and repeats itself.
    page = write_report(tmp_path / "cut").read_bytes()
    assert write_report(tmp_path / "cut").read_bytes() == page
    assert all((tmp_path / "cut" / name).stat().st_size > 5000 for name in ("curves.png", "accuracy.png"))


def test_curves_average_over_seeds(tmp_path: Path) -> None:
    config = make(seeds=[0, 1], arms=[BN], run=RUN | {"epochs": 2})
    results = run_experiment(config, tmp_path)
    found = {curve.measure: curve for curve in curves(results, tmp_path)}
    logs = [steps_and_evaluations(tmp_path / run["folder"] / "log.jsonl")[1] for run in results["runs"]]
    last = [log[-1]["accuracy"] for log in logs]
    assert found["accuracy"].epochs.tolist() == [1.0, 2.0]
    assert found["accuracy"].mean[-1] == pytest.approx(sum(last) / 2)
    assert (found["accuracy"].low[-1], found["accuracy"].high[-1]) == (min(last), max(last))


def test_a_dry_run_lists_every_run_and_writes_nothing(tmp_path: Path) -> None:
    config = make(lrs=[0.1, 0.2], seeds=[0, 1])
    data = load(config.first_run())
    planned = dry_run(config, data, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert len(planned) == 2 * (2 + 1)
    assert all(run.seconds > 0 and run.steps == len(data.train) // 64 for run in planned)
    engine.run(config.run_config(Trial("bn", 64, 0.1, 0)), tmp_path / "new" / "runs" / "bn-b64-lr0.1-s0")
    again = dry_run(config, data, tmp_path / "new")
    assert [run.finished for run in again].count(True) == 1
    # What a sweep has measured is believed.
    measured = Cost("smooth", 64, 9.0, (1.0, 50.0, 60.0), 64 / 50, 1.0)
    (tmp_path / "new" / "cost").mkdir()
    experiment.write_json(tmp_path / "new" / "cost" / "smooth-b64.json", plain(measured))
    known = dry_run(config, data, tmp_path / "new")
    assert {run.seconds for run in known if run.arm == "smooth"} == {50.0 * (len(data.train) // 64)}


def test_results_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        summary.read_results(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        summary.read_results(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(UserError, match="format"):
        summary.read_results(tmp_path)


def test_processes_of_their_own_give_the_same_numbers(tmp_path: Path) -> None:
    config = make(seeds=[0, 1], batch_sizes=[32])
    rows: list[Event] = []
    apart = run_experiment(config, tmp_path / "apart", watch=rows.append, jobs=2)
    here = run_experiment(config, tmp_path / "here")
    keys = ("arm", "seed", "status", "val_accuracy", "val_loss", "test_accuracy", "test_loss", "ece", "steps")

    def numbers(results: dict[str, Any]) -> list[tuple[Any, ...]]:
        return sorted(tuple(run[key] for key in keys) for run in results["runs"])

    assert numbers(apart) == numbers(here)
    for trial in config.finals({("bn", 32): 0.1, ("smooth", 32): 0.1}):
        steps = [
            e.row["step"] for e in rows if e.trial == trial and e.kind == "step" and "split" not in e.row
        ]
        assert steps == list(range(1, here["runs"][0]["total_steps"] + 1))


def test_a_worker_that_dies_or_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown model 'bn_resnet9_cifar'"):
        run_experiment(make(run=RUN | {"model": "bn_resnet9_cifar"}), tmp_path / "a", jobs=1)

    def kill(event: Event) -> None:
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)

    config = make(run=RUN | {"epochs": 50}, arms=[BN])
    with pytest.raises(UserError, match="killed by signal 9"):
        run_experiment(config, tmp_path / "b", watch=kill, jobs=1)


def test_the_test_split_is_read_for_reported_runs_alone_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(make().first_run())
    read: list[int] = []
    evaluate = engine.evaluate

    def counted(model: Any, split: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(len(split))
        return evaluate(model, split, *args, **kwargs)

    monkeypatch.setattr(engine, "evaluate", counted)
    config = make(lrs=[0.05, 0.1], arms=[BN], seeds=[0, 1])
    results = run_experiment(config, tmp_path)
    assert results["complete"]
    assert read.count(len(data.test)) == 2  # the seeds, not the two candidates
    # The winner of the search was tested after it: nothing else of its result differs from a run that did both.
    winner = next(run for run in results["runs"] if run["final"] and run["seed"] == 0)
    trial = Trial("bn", 64, winner["lr"], 0)
    both = engine.run(config.run_config(trial), tmp_path / "both")
    apart = json.loads((tmp_path / "runs" / trial.folder / "result.json").read_text())
    measured = {"train_seconds", "compile_seconds", "images_per_second", "peak_memory_mb"}
    assert {k: v for k, v in apart.items() if k not in measured} == {
        k: v for k, v in both.items() if k not in measured
    }
    loser = next(run for run in results["runs"] if not run["final"])
    left = json.loads((tmp_path / "runs" / loser["folder"].removeprefix("runs/") / "result.json").read_text())
    assert left["test_accuracy"] is None
    assert left["val_accuracy"] is not None


def test_a_test_split_that_breaks_the_winner_does_not_choose_another(fake, tmp_path: Path) -> None:
    def by(config: RunConfig) -> dict[str, Any]:
        good = {"val_accuracy": 1.0 - config.lr}
        return good | ({"status": "diverged", "test_accuracy": None} if config.lr == 0.1 else {})

    fake(by)
    results = run_experiment(make(lrs=[0.1, 0.2]), tmp_path)
    assert {c["lr"] for c in results["chosen"]} == {0.1}
