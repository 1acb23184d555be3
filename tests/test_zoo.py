"""The zoo in small: a model or two of each family, and the harness around it. `make zoo` runs all of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_jobs
from soak import ALL

from benchmarks.zoo import catalog, checks, store
from benchmarks.zoo.__main__ import main
from benchmarks.zoo.build import Entry, build, spilled
from benchmarks.zoo.checks import Verdict
from benchmarks.zoo.page import write_page
from benchmarks.zoo.pool import Limits, Pool
from benchmarks.zoo.run import BASE, CHECKS, COMPILED, METHODS, run_model
from nfnets.convert import convert

ENTRIES = {entry.key: entry for entry in catalog.load()}
ALL_METHODS = ("timm/test_resnet", "timm/test_efficientnet")
"""Run by every method here."""
FAMILIES = {
    "timm/cpubone_nano": "fixup",
    "timm/cs3darknet_focus_s": "lsuv",
    "timm/cspnext_tiny": "fold",
    "timm/dla46x_c": "skipinit",
    "timm/dpn48b": "lsuv",
    "timm/efficientformerv2_s0": "fixup",
    "timm/efficientvit_b0": "gn",
    "timm/efficientvit_m0": "skipinit",
    "timm/ese_vovnet19b_slim_dw": "fold",
    "timm/fasternet_t0": "skipinit",
    "timm/fastvit_t8": "fixed_variance",
    "timm/ghostnet_050": "fixup",
    "timm/hgnetv2_b0": "ws_gn",
    "timm/hrnet_w18_small": "skipinit",
    "timm/iformer_t": "fixup",
    "timm/inception_next_atto": "skipinit",
    "timm/lcnetv2_small": "lsuv",
    "timm/levit_128s": "skipinit",
    "timm/lowformer_b0": "fixup",
    "timm/mobilenetv3_small_050": "lsuv",
    "timm/mobilevit_xxs": "gn",
    "timm/regnetx_002": "lsuv",
    "timm/repghostnet_050": "skipinit",
    "timm/repvit_m1": "fixed_variance",
    "timm/resnet10t": "fold",
    "timm/rexnet_100": "fixed_variance",
    "timm/shvit_s1": "ws_gn",
    "timm/starnet_s050": "skipinit",
    "timm/swiftformer_xs": "fold",
    "timm/test_byobnet": "fixup",
    "timm/test_coatnet": "fold",
    "timm/visformer_tiny": "lsuv",
    "torchvision/efficientnet_b0": "gn",
    "torchvision/googlenet": "lsuv",
    "torchvision/lraspp_mobilenet_v3_large": "fixup",
    "torchvision/mnasnet0_5": "fixed_variance",
    "torchvision/mobilenet_v2": "ws_gn",
    "torchvision/mobilenet_v3_small": "skipinit",
    "torchvision/regnet_y_400mf": "fold",
    "torchvision/shufflenet_v2_x0_5": "fixed_variance",
}
"""Every third one is run, by `nf`, which sets channels in some, or this method, in turn; `make soak` runs all by both:
the cheapest of families that are not alike. Where the full zoo compiles too, which takes a minute, by `gn` instead of
`nf`."""
SMALLER = {
    "torchvision/r2plus1d_18": ((3, 4, 32, 32), "fixup"),
    "torchvision/r3d_18": ((3, 4, 32, 32), "lsuv"),
    "torchvision/fcos_resnet50_fpn": ((3, 128, 128), "skipinit"),
}
"""Run by `nf` and one more, the clips below those of the full zoo."""


def small(name: str) -> Entry:
    return Entry(name, "timm", name[0], "classification", 10 * len(name), 1, (3, 64, 64))


def record(model: str, method: str, outcome: str = "converted", **checks: bool) -> dict[str, Any]:
    found = {name.replace("_", " "): {"passed": ok, "detail": f"{name} it is"} for name, ok in checks.items()}
    return {
        "model": model,
        "method": method,
        "outcome": outcome,
        "reason": "so" if outcome == "refused" else "",
        "checks": found,
        "seconds": 1.5,
    }


# The models


def troubles(entry: Entry, methods: Sequence[str]) -> list[str]:
    records: list[dict[str, Any]] = []
    run_model(entry, methods, lambda message: records.append(message))
    ended = [r for r in records if "starts" not in r and r["method"] != BASE]
    assert [r["method"] for r in ended] == list(methods)
    assert {r["method"] for r in ended if r["outcome"] == "refused"} <= {"fixup", "skipinit"}
    return [store.describe(r) for r in ended if store.failed(r)]


@pytest.mark.parametrize("key", ALL_METHODS)
def test_every_method_passes_every_check(key: str) -> None:
    assert troubles(ENTRIES[key], METHODS) == []


@pytest.mark.parametrize("key", [*FAMILIES][:: 1 if ALL else 3])
def test_conversions_of_a_family_pass_every_check(key: str) -> None:
    at = list(FAMILIES).index(key)
    nf = ("nf", "nf_channelwise")[at // 6 % 2]
    methods = list(dict.fromkeys(("gn" if key in COMPILED else nf, FAMILIES[key])))
    methods = methods if ALL else methods[at // 3 % 2 :][:1] or methods[:1]
    assert troubles(ENTRIES[key], list(methods)) == []


@pytest.mark.parametrize("key", [*SMALLER][:: 1 if ALL else 2])
def test_video_nets_and_a_large_detector(key: str) -> None:
    shape, method = SMALLER[key]
    entry = ENTRIES[key]
    sizes = {name: shape[-1] for name in ("min_size", "max_size") if name in entry.kwargs}
    smaller = dataclasses.replace(entry, shape=shape, kwargs=entry.kwargs | sizes)
    methods = ("gn" if key in COMPILED else "nf", method)
    assert troubles(smaller, methods if ALL else methods[:1]) == []


@pytest.mark.soak
def test_a_video_net_that_needs_large_clips() -> None:
    model, (clips,) = build(ENTRIES["torchvision/s3d"])
    converted = convert(model, clips[:1], method="nf")
    assert checks.norm_gone(converted).passed
    assert checks.names_kept(model, converted).passed
    with torch.no_grad():
        ratio = converted(clips[:1]).std() / model(clips[:1]).std()
    assert 1 / checks.FACTOR < float(ratio) < checks.FACTOR


def test_the_catalog() -> None:
    assert len(ENTRIES) > 700
    assert {entry.kind for entry in ENTRIES.values()} == {
        "classification",
        "video",
        "segmentation",
        "detection",
        "flow",
    }
    assert len({entry.family for entry in ENTRIES.values()}) > 60
    assert all(entry.norms > 0 for entry in ENTRIES.values())
    order = catalog.broadly(list(ENTRIES.values()))
    families = {(e.source, e.family) for e in order}
    assert {(e.source, e.family) for e in order[: len(families)]} == families
    assert order[-1].parameters > 200_000_000


def test_a_giant_on_disk_is_the_same_model() -> None:
    entry = ENTRIES["timm/resnet10t"]
    model, inputs = build(entry)
    assert spilled(entry, model) is model  # too small for that
    before = checks.fingerprint(model)
    here = {tensor.data_ptr() for tensor in model.state_dict().values()}
    spilled(dataclasses.replace(entry, parameters=10**9), model)
    assert here.isdisjoint(tensor.data_ptr() for tensor in model.state_dict().values())
    assert checks.fingerprint(model) == before
    model.train()(*inputs).sum().backward()  # its buffers are written to
    assert model.conv1[0].weight.grad is not None
    assert checks.fingerprint(model) != before


def test_models_are_the_same_at_every_build() -> None:
    entry = ENTRIES["timm/test_resnet"]
    (first, images), (second, again) = build(entry), build(entry)
    assert (images[0] == again[0]).all()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert (a == b).all()


# Processes


def run_pool(job: Any, methods: list[list[str]], **limits: float) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    pool = Pool(job, 2, Limits(**limits), records.append)
    pool.map([(zoo_jobs.Named(f"m{n}"), listed) for n, listed in enumerate(methods)])  # type: ignore[misc]
    return sorted(records, key=lambda r: (r["model"], r["method"]))


def test_a_pool_survives_what_its_jobs_do() -> None:
    records = run_pool(
        zoo_jobs.job,
        [["a", "spin", "z"], ["a", "die", "z"], ["a", "grow", "z"], ["a", "z"]],
        seconds=0.5,
        memory=300 * 2**20,
    )
    seen = {(r["model"], r["method"]): (r["outcome"], r.get("reason", "")) for r in records}
    fine = {key for key, (outcome, _) in seen.items() if outcome == "converted"}
    assert fine == {(f"m{n}", method) for n in range(4) for method in "az"}
    assert seen["m0", "spin"] == ("killed", "more than 0 s of processor time")
    assert seen["m1", "die"] == ("killed", "the process died")
    assert seen["m2", "grow"] == ("killed", "more than 0.3 GiB of memory")
    assert len(records) == 11


def test_a_model_that_cannot_be_built_is_reported_for_every_method() -> None:
    records = run_pool(zoo_jobs.broken_from_the_start, [["nf", "fold"]])
    assert [(r["method"], r["outcome"]) for r in records] == [("fold", "killed"), ("nf", "killed")]
    assert {r["reason"] for r in records} == {"the BatchNorm model itself: the process died"}


def test_a_model_that_raises_is_reported_for_every_method() -> None:
    records: list[dict[str, Any]] = []
    run_model(small("no_such_net"), ["nf", "gn"], records.append)
    ended = [r for r in records if "starts" not in r]
    assert [(r["method"], r["outcome"]) for r in ended] == [("nf", "error"), ("gn", "error")]
    assert all(r["reason"].startswith("the BatchNorm model itself: ") for r in ended)


@pytest.mark.parametrize(("draws", "passed"), [("xoo", True), ("xox", False), ("xxo", False), ("xxx", False)])
def test_two_further_draws_decide_where_one_fails(
    draws: str, passed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(draws)

    def signal(*_: Any) -> Verdict:
        return Verdict(left.pop(0) == "o", f"draw {len(draws) - len(left)}", 2.0)

    monkeypatch.setattr(checks, "signal", signal)
    records: list[dict[str, Any]] = []
    run_model(ENTRIES["timm/resnet10t"], ["nf"], records.append)
    found = records[-1]["checks"]["signal"]
    assert (found["passed"], found["detail"]) == (
        passed,
        f"{draws.count('o')} of 3 draws of the weights; draw 1 / draw 2 / draw 3",
    )


def test_one_draw_is_enough_where_it_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [Verdict(True)]
    monkeypatch.setattr(checks, "signal", lambda *_: left.pop())
    run_model(ENTRIES["timm/resnet10t"], ["nf"], lambda _: None)
    assert not left


# Records and report


def test_records_are_read_back_and_later_ones_win(tmp_path: Path) -> None:
    log = tmp_path / "zoo.jsonl"
    first, second = record("a", "nf", finite=False), record("a", "nf", finite=True)
    log.write_text(store.line(first) + store.line(second) + store.line(first)[:40])
    assert store.latest(store.read(log)) == {("a", "nf"): second}
    assert store.failed(first)
    assert not store.failed(second)
    assert store.describe(first) == "a nf fail: finite: finite it is"
    assert not store.failed(record("a", "nf", "refused"))
    assert store.failed(record("a", "nf", "refused", original=False))
    assert store.failed(record("a", "nf", "killed"))
    assert store.read(tmp_path / "none") == []


def sample_report() -> dict[str, Any]:
    entries = [small("alpha"), small("beta"), small("bet</script>a")]
    records = [
        record("timm/alpha", "nf", finite=True, signal=True),
        record("timm/alpha", "fold", finite=True, signal=False),
        record("timm/alpha", "fixup", "refused", original=True),
        record("timm/beta", "nf", "error"),
        record("timm/beta", "nf", finite=True),
        record("timm/beta", BASE, "measured"),
    ]
    return store.summarize(entries, records)


def test_the_report_counts_everything() -> None:
    report = sample_report()
    assert (report["models"], report["measured"]) == (3, 2)
    assert report["counts"]["nf"] == {"pass": 2, "pending": 1}
    assert report["counts"]["fold"] == {"fail": 1, "pending": 2}
    assert report["counts"]["fixup"] == {"refused": 1, "pending": 2}
    assert report["by_check"]["finite"]["nf"] == [2, 2]
    assert report["by_check"]["signal"]["fold"] == [0, 1]
    assert report["refusals"] == [{"method": "fixup", "reason": "so", "models": 1}]
    assert [row["name"] for row in report["rows"]] == ["alpha", "beta", "bet</script>a"]
    assert report["rows"][0]["methods"]["fold"]["failed"] == {"signal": "signal it is"}
    assert store.headline(report).startswith("2 of 3 models measured; passed: nf 2/2, nf_channelwise 0/2")


def test_the_json_is_the_report(tmp_path: Path) -> None:
    report = sample_report()
    store.write_json(report, tmp_path / "zoo.json")
    assert json.loads((tmp_path / "zoo.json").read_text()) == json.loads(json.dumps(report))


def test_a_run_goes_on_from_the_published_report(tmp_path: Path) -> None:
    report = sample_report()
    store.write_json(report, tmp_path / "zoo.json")
    entries = [small("alpha"), small("beta"), small("bet</script>a")]
    records = store.published(tmp_path / "zoo.json", entries)
    assert store.summarize(entries, records) == report
    mended = [*records, record("timm/alpha", "fold", finite=True, signal=True)]
    assert store.summarize(entries, mended)["counts"]["fold"] == {"pass": 1, "pending": 2}
    assert store.published(tmp_path / "none.json", entries) == []


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed (Debian: chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    pytest.importorskip("playwright.sync_api", reason="no playwright installed")
    from playwright.sync_api import sync_playwright

    path = tmp_path / "zoo.html"
    write_page(sample_report(), path)
    troubles: list[str] = []
    with sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = running.new_page()
        page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: troubles.append(str(e)))
        page.on("request", lambda r: troubles.append(r.url) if not r.url.startswith("file:") else None)
        page.goto(path.as_uri())
        names = lambda: page.locator("#zoo td.name").all_inner_texts()  # noqa: E731
        assert names() == ["alpha", "beta", "bet</script>a"]
        assert page.locator("#zoo .family").all_inner_texts() == ["timm · a", "timm · b"]
        assert page.locator("#zoo .fail").count() == 1
        page.select_option("#status", "bad")
        assert names() == ["alpha"]
        page.select_option("#status", "")
        page.fill("#search", "bet")
        assert names() == ["beta", "bet</script>a"]
        page.fill("#search", "")
        page.click("#tabs button:text-is('fold')")
        assert page.locator("#zoo thead th").all_inner_texts()[3:] == list(CHECKS)
        page.click("#zoo td.name button >> nth=0")
        assert "signal: signal it is" in page.locator("#zoo .detail").inner_text()
        assert "1 / 1" in page.locator("#matrix").inner_text()
        running.close()
    assert troubles == []


def test_the_command_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.zoo.__main__._PUBLISHED", tmp_path / "docs")
    chosen = ["--model", "test_resnet", "--method", "gn", "--workers", "1", "--out", str(tmp_path)]
    assert main(chosen) == 0
    assert "1 of " in capsys.readouterr().out
    log = (tmp_path / "zoo.jsonl").read_text()
    assert [json.loads(line)["method"] for line in log.splitlines()] == [BASE, "gn"]
    assert main(chosen) == 0
    assert (tmp_path / "zoo.jsonl").read_text() == log
    assert (tmp_path / "zoo.html").read_text().startswith("<!doctype html>")
    assert main(["--family", "none_such", "--out", str(tmp_path)]) == 2
    assert "no model matches" in capsys.readouterr().err
