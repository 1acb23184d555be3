"""The HTML report in a real browser: no error, no request, hover, sorting, keyboard, dark and light."""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nfnets.signal import Point, SignalReport, probe, profile
from nfnets.signal.page import page
from nfnets.signal.panels import figures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed (Debian: chromium)")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Block(nn.Module):
    def __init__(self, norm: nn.Module, scale: float) -> None:
        super().__init__()
        self.conv, self.norm, self.scale = nn.Conv2d(8, 8, 3, padding=1), norm, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * self.conv(torch.relu(self.norm(x)))


def net(norm: bool = True, scale: float = 1.0) -> nn.Module:
    blocks = [Block(nn.BatchNorm2d(8) if norm else nn.Identity(), scale) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.fixture(scope="module")
def report() -> SignalReport:
    torch.manual_seed(0)
    models = {"bn": net(), "<b>wild</b>": net(norm=False, scale=40.0)}
    return profile(models, torch.randn(8, 3, 8, 8), backward=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="no playwright installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        running = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def opened(browser, report, tmp_path_factory) -> Iterator[Any]:
    """The page, with everything it asked for or complained about; tests leave it as they found it."""
    path = report.to_html(tmp_path_factory.mktemp("page") / "signal.html")
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.troubles = []
    page.on("console", lambda m: page.troubles.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: page.troubles.append(str(e)))
    page.on(
        "request", lambda r: page.troubles.append(r.url) if not r.url.startswith(("file:", "data:")) else None
    )
    page.goto(path.as_uri())
    page.wait_for_selector(".plot .scatterlayer")
    yield page
    assert page.troubles == []
    page.close()


@needs_browser
def test_renders_without_an_error_or_a_request(opened):
    opened.wait_for_timeout(300)
    assert opened.troubles == []
    assert opened.locator(".plot").count() == 2
    titles = opened.locator(".plot .annotation-text").all_text_contents()
    assert titles[:3] == [
        "Average channel squared mean",
        "Average channel variance",
        "Residual average channel variance",
    ]
    assert (
        opened.locator(".plot").first.evaluate("p => p.data.filter(t => t.line.dash === 'dash').length") >= 4
    )
    assert opened.locator(".plot").first.evaluate("p => p.layout.yaxis.type") == "log"


@needs_browser
def test_hover_shows_the_layer(opened):
    series = "p => p.data.findIndex(t => t.meta && t.meta.measured && t.yaxis === 'y2')"
    where = opened.locator(".plot").first.evaluate(
        f"""p => {{ const i = ({series})(p), t = p.data[i], box = p.getBoundingClientRect(), l = p._fullLayout;
        return {{x: box.x + l._size.l + l.xaxis.d2p(t.x[2]), y: box.y + l.yaxis2._offset + l.yaxis2.d2p(t.y[2]),
        name: t.text[2].match(/<b>(.*?)<.b>/)[1]}} }}"""
    )
    opened.mouse.move(where["x"] - 2, where["y"])
    opened.mouse.move(where["x"], where["y"])
    opened.wait_for_selector(".hovertext")
    text = opened.locator(".hovertext").first.text_content()
    assert where["name"] in text
    assert "variance" in text


@needs_browser
def test_arrow_keys_walk_along_the_layers(opened):
    opened.mouse.move(0, 0)  # a pointer left on a plot takes the hover back
    texts = []
    for _ in range(20):
        opened.locator(".plot").first.focus()
        opened.keyboard.press("ArrowRight")
        opened.wait_for_timeout(300)
        shown = opened.locator(".hovertext")
        if shown.count():
            texts.append(shown.first.text_content())
        if len(set(texts)) > 1:
            break
    assert len(set(texts)) > 1, texts


@needs_browser
def test_switching_a_model_off_hides_its_lines(opened):
    shown = "p => p.data.filter(t => t.legendgroup === 'bn' && t.visible).length"
    first = opened.locator(".plot").first
    assert first.evaluate(shown) > 0
    opened.locator("input[value=bn]").focus()
    opened.keyboard.press("Space")
    assert first.evaluate(shown) == 0
    assert first.evaluate("p => p.data.filter(t => t.legendgroup !== 'bn' && t.visible).length") > 0
    opened.keyboard.press("Space")
    assert first.evaluate(shown) > 0


@needs_browser
def test_the_table_sorts_by_value_and_back(opened):
    def column() -> list[str]:
        return opened.locator("table.points tbody tr").evaluate_all(
            """rows => { const i = [...document.querySelectorAll('.points thead th')]
            .findIndex(h => h.textContent === 'Variance'); return rows.map(r => r.cells[i].dataset.v ?? '') }"""
        )

    original = column()
    head = opened.locator(".points thead button", has_text=re.compile("^Variance$"))
    head.click()
    ascending = [float(v) for v in column() if v]
    assert ascending == sorted(ascending)
    assert ascending != [float(v) for v in original if v]
    head.focus()
    opened.keyboard.press("Enter")
    assert [float(v) for v in column() if v] == sorted(ascending, reverse=True)
    assert opened.locator("th[aria-sort=descending]").count() == 1
    head.click()
    assert column() == original


@needs_browser
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_reads_in_dark_and_light(opened, scheme):
    opened.emulate_media(color_scheme=scheme)
    opened.wait_for_timeout(200)
    luminance = """e => { const c = getComputedStyle(e); const l = (s) => { const v = s.match(/[\\d.]+/g).slice(0, 3)
        .map(x => x / 255).map(x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
        return .2126 * v[0] + .7152 * v[1] + .0722 * v[2] };
        return [l(c.color), l(getComputedStyle(document.body).backgroundColor)] }"""
    for selector in ("body", "h2", ".points td", ".verdict p", ".controls label", ".controls span"):
        a, b = sorted(opened.locator(selector).first.evaluate(luminance))
        assert (b + 0.05) / (a + 0.05) > 4.5, selector
    tick = opened.locator(".plot [class*=tick] text").first.evaluate("e => getComputedStyle(e).fill")
    assert (sum(map(int, re.findall(r"\d+", tick)[:3])) > 384) == (scheme == "dark")


@needs_browser
def test_the_timeline_moves_through_the_steps(browser, tmp_path):
    torch.manual_seed(0)
    model = net()
    with probe(model) as p:
        for _ in range(3):
            model(torch.randn(8, 3, 8, 8))
            with torch.no_grad():
                model[0].weight.mul_(10)  # type: ignore[index]
    page = browser.new_page()
    page.goto(p.report().to_html(tmp_path / "t.html").as_uri())
    page.wait_for_selector(".plot .scatterlayer")
    stem = "p => p.data.find(t => t.meta.measured && t.yaxis === 'y2').y[0]"
    last = page.locator(".plot").first.evaluate(stem)
    page.locator("input[type=range]").focus()
    page.keyboard.press("Home")
    assert page.locator("output").text_content() == "0"
    assert page.locator(".plot").first.evaluate(stem) < last / 1000
    page.close()


@needs_browser
def test_two_fragments_share_one_plotly(browser, report, tmp_path):
    path = tmp_path / "two.html"
    body = report.panels_html(include_plotlyjs=True) + report.panels_html()
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{body}", encoding="utf-8")
    assert body.count("DecompressionStream") == 1
    page = browser.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda e: troubles.append(str(e)))
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .scatterlayer').length >= 4")
    assert troubles == []
    page.close()


@needs_browser
def test_a_thousand_points_stay_small_and_open_fast(browser, tmp_path):
    value, floats = random.Random(0).random, [f.name for f in fields(Point) if "float" in str(f.type)]
    points = [
        Point("net", f"stage{i // 50}.block{i}.conv", "join", "join", "activation", depth=i, block=i + 1,
              shape=(16, 1024, 14, 14), dtype="float32", count=3136, **{name: value() for name in floats})
        for i in range(1000)
    ]  # fmt: skip
    assert len(floats) > 20
    path = SignalReport(points).to_html(tmp_path / "large.html")
    assert path.stat().st_size < 8e6
    assert len(SignalReport(points).panels_html()) < 1e6  # without plotly, and each hover text once
    page = browser.new_page()
    page.goto(path.as_uri())
    page.wait_for_selector(".plot .scatterlayer")
    took = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart")
    assert took < 60_000  # 3 s on an idle machine; the suite shares its cores, perhaps with others
    page.close()


# -- without a browser ------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th") or (self.inside and tag in ("button", "em"))
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_the_table_is_complete_without_javascript(report, tmp_path):
    text = Path(report.to_html(tmp_path / "a.html")).read_text(encoding="utf-8")
    cells = Cells()
    cells.feed(re.sub(r"<script.*?</script>", "", text, flags=re.S))
    head, *rows = cells.rows
    assert len(rows) == len(report.points)
    column = head.index("Variance")
    assert [float(r[column]) for r in rows] == [float(f"{p.var:.3g}") for p in report.points]
    assert rows[-1][0] == "<b>wild</b>"
    assert "<b>wild</b>" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


def test_the_page_names_broken_layers_and_the_remedy(report, tmp_path):
    text = Path(report.to_html(tmp_path / "a.html")).read_text(encoding="utf-8")
    verdict = report.check()
    assert verdict.of("<b>wild</b>")
    assert not verdict.of("bn")
    finding = verdict.of("<b>wild</b>")[0]
    assert finding.rule in text
    assert "Remedy: " in text
    assert "http" not in re.sub(r"<script.*?</script>", "", text, flags=re.S)


def test_a_notebook_shows_an_image_and_the_table(report):
    text = report._repr_html_()
    assert 'src="data:image/png;base64,' in text
    assert "<table" in text
    assert "<script" not in text


@pytest.fixture(scope="module")
def sick() -> SignalReport:
    """Four blocks; in the third a channel of a convolution is NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(nn.BatchNorm2d(8), 1.0) for _ in range(4)))
    with torch.no_grad():
        model[2].conv.weight[0] = float("nan")  # type: ignore[union-attr, index]
    return profile(model, torch.randn(8, 8, 8, 8), backward=True)


def test_a_sick_page_opens_with_the_cause(sick, tmp_path):
    text = Path(sick.to_html(tmp_path / "a.html")).read_text(encoding="utf-8")
    cause = text.index("starts at <code>2.conv</code>")
    assert cause < text.index("Over depth")
    assert text.index("NaN or inf from here on") > cause
    assert "had nothing to judge" in text
    assert (tmp_path / "a.html").stat().st_size < 1e6


def test_the_cause_is_marked_in_every_panel_and_values_that_end(sick):
    (cause,) = sick.check().causes
    for figure in figures(sick, causes=[cause]):
        panels = sum(key.startswith("yaxis") for key in figure["layout"])
        lines = figure["layout"]["shapes"]
        assert {line["yref"].removesuffix(" domain") for line in lines} == {
            f"y{n or ''}" for n in (0, *range(2, panels + 1))
        }
        assert len({line["x0"] for line in lines}) == 1
        ends = [t for t in figure["data"] if t.get("meta") == {"what": "end"}]
        assert ends
        assert all(t["x"][0] >= lines[0]["x0"] for t in ends)
    blocks = figures(sick, causes=[cause])[0]
    assert blocks["layout"]["shapes"][0]["x0"] == 2.5  # between the second block's join and the third's
    assert not any("shapes" in f["layout"] and f["layout"]["shapes"] for f in figures(sick))


def test_a_name_with_a_number_is_explained():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    report = profile(encoder, torch.randn(8, 12, 16))
    assert any("#2" in p.name for p in report.points)
    assert "<code>#2</code> behind a name" in page(report, "")
    assert "<code>#2</code>" not in page(profile(nn.Linear(4, 4), torch.randn(8, 4)), "")


def test_without_branches_panels_show_the_layers():
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ]
    report = profile(nn.Sequential(*layers), torch.randn(8, 3, 12, 12))
    first = figures(report)[0]
    titles = [a["text"] for a in first["layout"]["annotations"]]
    assert titles[2] == "<b>Variance over that of the layer before</b>"
    assert first["layout"]["xaxis3"]["ticktext"] == ["0", "3"]
    factors = [t for t in first["data"] if t.get("meta") == {"measured": True}][2]["y"]
    assert factors == [None, pytest.approx(report["3"].var / report["0"].var)]
