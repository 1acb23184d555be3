"""The comparison page in a browser: it draws, requests nothing, and reads without JavaScript."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nfnets.train.compare import ExperimentConfig, run_experiment
from nfnets.train.compare.page.figures import draw_accuracy
from nfnets.train.compare.report import write_report
from nfnets.train.compare.summary import summarize
from nfnets.train.config import RunConfig
from nfnets.train.loop import engine

ARMS = [
    {"name": "bn", "method": "bn"},
    {"name": "nf", "method": "nf"},
    {"name": "nf<no AGC>".replace(" ", "_"), "method": "nf", "clipping": None},
]


COSTS = [
    {
        "arm": arm["name"],
        "batch_size": size,
        "first_step_seconds": 1.5,
        "step_seconds": [0.01, 0.02, 0.03, 0.04, 0.05],
        "images_per_second": 7654.0 + size,
        "peak_memory_mb": 4321.0,
    }
    for arm in ARMS
    for size in (4, 64)
]


def made_up(config: RunConfig, folder: Path, **_: Any) -> dict[str, Any]:
    """A run's files and result without the training: the page is about showing numbers."""
    folder.mkdir(parents=True)
    diverges = config.method == "nf" and config.clipping is None and config.lr > 0.1
    level = (
        0.9 + 0.01 * config.seed - 0.05 * abs(math.log10(config.lr / 0.1)) - 0.01 * (config.method == "nf")
    )
    steps, epochs = 40, config.epochs
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = None if diverges and step == 7 else 2.3 * math.exp(-step / 12) + 0.05 * math.sin(step)
        rows.append({"step": step, "epoch": step * epochs / steps, "loss": loss, "lr": config.lr})
        if loss is None:
            break
        if step % 10 == 0:
            accuracy = level * (1 - math.exp(-step / 15))
            rows.append(
                {"step": step, "epoch": step / 10, "split": "val", "loss": loss, "accuracy": accuracy}
            )
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nothing = dict.fromkeys(("val_accuracy", "val_loss", "test_accuracy", "test_loss", "ece"))
    done = {
        "val_accuracy": level,
        "val_loss": 0.3,
        "test_accuracy": level - 0.02,
        "test_loss": 0.3,
        "ece": 0.04,
    }
    right = round(359 * done["test_accuracy"])
    bins = [[0, 0.0, 0.0]] * 13 + [
        [59, 0.9, (right - 250) / 59 if 250 <= right <= 309 else 1.0],
        [300, 0.97, 250 / 300],
    ]
    return {
        "status": "diverged" if diverges else "done",
        "reliability": None if diverges else bins,
        **(nothing if diverges else done),
        "diverged_at": 7 if diverges else None,
        "steps": rows[-1]["step"],
        "train_seconds": 12.3,
        "images_per_second": 1234.5,
        "peak_memory_mb": 321.0,
        "unreadable": {"budget": 5, "count": 3 if config.seed == 1 else 0, "by_split": {}, "first": []},
        "versions": {"torch": "2.15", "nfnets": "0.1.0"},
        "hardware": {"device": "cpu", "name": "An & Co <CPU>", "cores": 2},
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    config = ExperimentConfig.create(
        run={"data": "digits", "epochs": 4},
        arms=ARMS,
        lrs=[0.05, 0.1, 0.2],
        batch_sizes=[4, 64],
        seeds=[0, 1, 2],
    )
    plans = {
        "nf": [
            {"path": "bn1", "role": "stem", "action": "replace", "replaced": "Identity", "reason": "a < b"}
        ]
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "run", made_up)
        run_experiment(
            config, out, command="nfnets compare --arms 'a <b>'", about={"plans": plans, "costs": COSTS}
        )
    return write_report(out)


def test_everything_is_escaped_and_there(page: Path) -> None:
    text = page.read_text()
    assert "nf&lt;no_AGC&gt; at batch size 4" in text
    assert "An &amp; Co &lt;CPU&gt;" in text
    assert "a &lt; b" in text
    assert "nfnets compare --arms &#39;a &lt;b&gt;&#39;" in text
    assert "<no_AGC>" not in text.split("<main>")[1].split("<script")[0]
    assert "diverged" in text
    # Seed 1 of every arm and batch size, one of them diverged or not.
    assert text.count(", 3 unreadable images left out</td>") == 2 * 3
    assert text.count("not read: search only") == 2 * 3 * 2 - 0, (
        "two rates per arm and batch size were not chosen"
    )


def test_what_is_measured_apart_is_what_the_table_shows(page: Path) -> None:
    text = page.read_text()
    result, cost = (
        text.split(f'<section id="{name}"')[1].split("</section>")[0] for name in ("result", "cost")
    )
    assert result.count(">7,658</td>") == cost.count(">7,658</td>") == 3
    assert "1,234" not in result
    assert "4,321 MB" in result
    assert cost.count(">20 – 40</td>") == 6


def test_runs_that_never_reach_the_target_are_counted(page: Path) -> None:
    table = page.read_text().split('<section id="times"')[1].split("</table>")[0]
    lines = [re.findall("<td[^>]*>(.*?)</td>", line) for line in table.split("<tr>")[2:]]
    assert len(lines) == 6
    # Validation at epoch e is level · (1 − exp(−10 e / 15)); the baseline's target is what it said at the end.
    ends = [0.9 + 0.01 * seed for seed in range(3)]
    target = sum(ends) / 3 - 0.01
    assert {line[2] for line in lines} == {f"{100 * target:.2f} %"}
    logged = [[level * (1 - math.exp(-step / 15)) for step in (10, 20, 30, 40)] for level in ends]
    reached = sum(any(accuracy >= target for accuracy in course) for course in logged)
    assert lines[0][3] == f"{reached} of 3"
    assert lines[0][4] == ("over 4" if reached < 2 else "4")


def test_in_a_browser_nothing_is_requested_and_nothing_fails(page: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        for scheme in ("light", "dark"):
            context = browser.new_context(color_scheme=scheme, viewport={"width": 1300, "height": 900})
            tab = context.new_page()
            requests: list[str] = []
            trouble: list[str] = []
            tab.on("request", lambda request, to=requests: to.append(request.url))
            tab.on(
                "console",
                lambda message, to=trouble: to.append(message.text) if message.type == "error" else None,
            )
            tab.on("pageerror", lambda error, to=trouble: to.append(str(error)))
            tab.goto(page.as_uri())
            tab.wait_for_selector("#curves .scatterlayer .trace")
            in_sight = tab.evaluate(
                "[...document.querySelectorAll('.verdicts, #result table, #curves .subplot.xy')]"
                ".every((each) => each.getBoundingClientRect().top < innerHeight - 100)"
            )
            assert in_sight, "verdict, table and curves are on the first screen"
            folds = tab.locator("details.fold")
            assert folds.count() >= 7
            assert tab.locator("details.fold[open]").count() == 0
            for index in range(folds.count()):
                folds.nth(index).locator("summary").first.click()
            for figure in ("curves", "accuracy", "search", "reliability"):
                tab.wait_for_selector(f"#{figure} .scatterlayer .trace")
            assert tab.locator("#reliability .errorbars .yerror").count() >= 6
            assert tab.locator("#curves .scatterlayer .trace").count() >= 3 * 3 * 4
            assert trouble == []
            assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
            ink = tab.evaluate(
                "getComputedStyle(document.querySelector('#curves .xtick text, #curves .xaxislayer-above text')).fill"
            )
            body = tab.evaluate("getComputedStyle(document.body).color")
            assert ink == body, "plots are painted in the page's ink, in the dark too"
            for width in (1300, 400):
                tab.set_viewport_size({"width": width, "height": 900})
                # Nothing is cut off, once the figures have followed.
                tab.wait_for_function("document.documentElement.scrollWidth <= innerWidth")
            context.close()
        context = browser.new_context(java_script_enabled=False)
        tab = context.new_page()
        tab.goto(page.as_uri())
        assert tab.locator("noscript img, img.static").first.is_visible()
        assert tab.get_by_role("row").count() == 1 + 6, "the result alone"
        for fold in tab.locator("details.fold > summary").all():
            fold.click()
        assert tab.get_by_role("row").count() > 20
        context.close()
        browser.close()


def test_three_batch_sizes_make_the_papers_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "run", made_up)
    config = ExperimentConfig.create(
        run={"data": "digits", "epochs": 4},
        arms=ARMS[:2],
        lrs=[0.1],
        batch_sizes=[64, 4, 16],
        seeds=[0, 1, 2],
    )
    results = run_experiment(config, tmp_path)
    (axis,) = draw_accuracy(summarize(results)).axes
    assert axis.get_xscale() == "log"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["4", "16", "64"]
    lines = {line.get_label(): line for line in axis.lines if line.get_label() in ("bn", "nf")}
    assert [float(y) for y in lines["bn"].get_ydata()] == pytest.approx([0.89] * 3)
    draw_accuracy(summarize(results)).savefig(tmp_path / "accuracy.png", dpi=150)


@pytest.mark.parametrize("name", ["demo", "fashion-b64"])
def test_results_of_before_still_make_a_page(name: str, tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "docs" / "results" / name / "results.json"
    shutil.copy(source, tmp_path)
    results = json.loads(source.read_text())
    text = write_report(tmp_path).read_text()
    for run in results["runs"]:
        if run["final"] and run["status"] == "done":
            assert f"<td>{100 * run['test_accuracy']:.2f}</td>" in text
