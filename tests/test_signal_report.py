"""Reports as data, text and pictures, and the rules that judge them."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from rich.console import Console
from torch import nn

from nfnets.errors import UserError
from nfnets.layers import ScaledStdConv2d
from nfnets.signal import RULES, Point, Rule, SignalReport, assert_signal, profile
from nfnets.signal.moments import channel_moments
from nfnets.signal.report import COLUMNS

GAMMA = math.sqrt(2 / (1 - 1 / math.pi))


@pytest.fixture(scope="module")
def report() -> SignalReport:
    torch.manual_seed(0)
    a, b = torchvision.models.resnet18(), torchvision.models.resnet18()
    with torch.no_grad():
        b.layer3[0].conv1.weight[0] = float("nan")
    return profile({"good": a, "broken": b}, torch.randn(4, 3, 48, 48))


def same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


# -- data -------------------------------------------------------------------------------------------------------


def test_json_round_trip_is_exact_and_strict(report, tmp_path):
    path = report.to_json(tmp_path / "r.json")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(
        path.read_text(encoding="utf-8"), parse_constant=refuse
    )  # no NaN literal: any JSON reader can read it
    back = SignalReport.from_json(path)
    assert (back.notes, back.meta, back.models) == (report.notes, report.meta, report.models)
    assert any(p.nonfinite for p in report.points)
    for p, q in zip(report.points, back.points, strict=True):
        assert all(same(getattr(p, c), getattr(q, c)) for c in COLUMNS)


def test_csv_and_frame_hold_every_point(report, tmp_path):
    with report.to_csv(tmp_path / "r.csv").open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    frame = report.to_frame()
    assert list(frame.columns) == list(COLUMNS) == list(rows[0])
    assert len(rows) == len(frame) == len(report.points)
    for p, row, value in zip(report.points, rows, frame["var"], strict=True):
        assert row["name"] == p.name
        assert same(float(row["var"]), p.var)
        assert same(value, p.var)
    assert [r["residual_var"] != "" for r in rows] == [p.residual_var is not None for p in report.points]


def test_tensorboard_gets_what_was_measured(report):
    class Writer:
        def __init__(self) -> None:
            self.seen: dict[tuple[str, int], float] = {}

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen[tag, step] = value

    writer = Writer()
    report.to_tensorboard(writer)
    joins = report.select(model="good", role="join")
    assert all(writer.seen[f"good/{p.name}/residual_var", 0] == p.residual_var for p in joins)
    assert sum(tag.endswith("/residual_var") for tag, _ in writer.seen) == 2 * len(joins)


@pytest.mark.parametrize("method", ["to_json", "to_csv", "to_html", "plot"])
def test_an_unwritable_path_is_one_line(report, tmp_path, method):
    with pytest.raises(UserError, match="cannot be written"):
        getattr(report, method)(tmp_path / "missing" / "r.png")


@pytest.mark.parametrize("name", ["", "figure"])
def test_a_figure_without_a_suffix_is_written_nowhere(report, tmp_path, name):
    with pytest.raises(UserError, match="suffix"):
        report.plot(tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert not tmp_path.with_suffix(".png").exists()


def test_what_is_not_a_report_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("no json")
    for name in ("a.json", "b.json"):
        with pytest.raises(UserError, match="not a signal report"):
            SignalReport.from_json(tmp_path / name)
    with pytest.raises(UserError, match="cannot read"):
        SignalReport.from_json(tmp_path / "c.json")


def test_points_are_found_by_name_and_near_names_suggested(report):
    assert report["good/layer1.0"].model == "good"
    assert report["layer1.0"].model == "broken"
    with pytest.raises(UserError, match=r"did you mean .*layer1\.0"):
        report["layer1.O"]


# -- views ------------------------------------------------------------------------------------------------------


def test_the_terminal_table_shows_blocks_and_marks_broken_rows(report):
    text = str(report)
    assert all(word in text for word in ("layer1.0", "predicted", "residual", "finite", "maxpool", "fc"))
    assert "layer1.0.conv1" not in text
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(report)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("\x1b[31m" in s and "broken" in s and "layer3.0" in s for s in lines)
    assert not any("\x1b[31m" in s and "good" in s for s in lines)
    assert report.table(all_points=True).row_count == len(report.points)


def test_the_figure_is_the_papers(report, tmp_path):
    figure = report.plot(tmp_path / "f.png")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [
        "Average channel squared mean",
        "Average channel variance",
        "Residual average channel variance",
    ]
    assert all(ax.get_yscale() == "log" for ax in figure.axes)
    good = [p.var for p in report.select(model="good") if p.block is not None]
    drawn = figure.axes[1].lines[1]
    assert list(drawn.get_ydata()) == good
    assert drawn.get_linestyle() == "-"
    assert figure.axes[1].lines[0].get_linestyle() == "--"
    assert (tmp_path / "f.png").stat().st_size > 20_000
    assert report.plot(tmp_path / "f.svg") is not None
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_plain_network_draws_without_joins():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    report = profile(net, torch.randn(8, 3, 12, 12))
    figure = report.plot()
    conv = [p.var for p in report.points if p.kind == "conv"]
    assert list(figure.axes[1].lines[1].get_ydata()) == conv  # behind a norm layer it would be 1 everywhere
    assert figure.axes[2].get_title() == "Variance over that of the layer before"
    assert figure.axes[2].lines[1].get_ydata()[1] == pytest.approx(conv[1] / conv[0])
    assert "conv" in str(report)


def test_an_empty_report_says_so():
    empty = SignalReport([])
    for call in (empty.check, empty.plot):
        with pytest.raises(UserError, match="without points"):
            call()
    assert "Signal" in str(empty)
    assert "empty" in empty._repr_html_()


# -- rules ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, make, alpha: float, gain: float, project: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.alpha, self.gain = make(), make(), alpha, gain
        self.shortcut = make() if project else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(x) * self.gain
        y = self.last(torch.relu(self.first(a)) * self.gain)
        return (x if self.shortcut is None else self.shortcut(a)) + self.alpha * y


def sws() -> nn.Module:
    return ScaledStdConv2d(32, 32, 3, padding=1)


def he() -> nn.Module:
    layer = nn.Conv2d(32, 32, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return layer


def chain(make, alpha: float = 0.2, gain: float = GAMMA, blocks: int = 8, every: int = 0) -> nn.Module:
    body = [Block(make, alpha, gain, bool(every) and j % every == 0) for j in range(blocks)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *body)


def dead() -> nn.Module:
    net = chain(sws)
    with torch.no_grad():
        net[3].first.bias.fill_(-50.0)  # type: ignore[index, union-attr, operator]
    return net


def scaled(factor: float) -> nn.Module:
    net = chain(sws)
    with torch.no_grad():
        net[0].weight.mul_(factor)  # type: ignore[operator, union-attr]
    return net


def collapsed(depth: int = 80) -> nn.Module:
    """He-initialized ReLU layers bring all samples together: 1 − cos falls as 1/depth²."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 128))
    for _ in range(depth):
        layer = nn.Linear(128, 128)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        net.extend([nn.ReLU(), layer])
    return net


HEALTHY = {
    "BN ResNet-18": lambda: torchvision.models.resnet18(),
    "BN ResNet-50": lambda: torchvision.models.resnet50(),
    "BN MobileNet": lambda: torchvision.models.mobilenet_v2(),
    "NF-ResNet": lambda: timm.create_model("nf_resnet26"),
    "NFNet": lambda: timm.create_model("test_nfnet"),
    "ECA-NFNet": lambda: timm.create_model("eca_nfnet_l0"),
    "NF chain": lambda: chain(sws),
}
SICK = {
    "growth": lambda: chain(sws, alpha=1.0, blocks=10),
    "vanishing": lambda: chain(sws, gain=0.1, every=2),
    "dead-units": dead,
    "fp16-overflow": lambda: scaled(1e5),
    "cosine": collapsed,
    "finite": lambda: scaled(float("inf")),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_networks_pass_every_rule(name):
    torch.manual_seed(0)
    verdict = profile(HEALTHY[name](), torch.randn(8, 3, 64, 64), backward=True).check()
    assert verdict, str(verdict)
    assert "healthy" in str(verdict)


@pytest.mark.parametrize("rule", SICK)
def test_sick_networks_fail_their_rule_with_layer_and_remedy(rule):
    torch.manual_seed(0)
    verdict = profile(SICK[rule](), torch.randn(8, 3, 16, 16)).check()
    assert rule in verdict.broken, str(verdict)
    finding = next(f for f in verdict.findings if f.rule == rule)
    assert finding.name in str(verdict)
    assert finding.remedy == RULES[rule].remedy
    assert not verdict.passed


def test_exploding_gradients_are_found():
    torch.manual_seed(0)
    verdict = profile(chain(sws, alpha=1.0, blocks=12), torch.randn(8, 3, 16, 16), backward=True).check(
        ["gradient"]
    )
    points = [Point("n", f"b{i}", "join", "join", var=1.0, grad_var=10.0 ** (-i)) for i in range(8)]
    assert SignalReport(points).check().broken == ("gradient",)
    assert verdict.rules == (RULES["gradient"],)


def test_a_bn_network_without_its_norms_fails():
    torch.manual_seed(0)
    model = torchvision.models.resnet50()

    def strip(module: nn.Module) -> None:
        for name, child in module.named_children():
            setattr(module, name, nn.Identity()) if isinstance(child, nn.BatchNorm2d) else strip(child)

    strip(model)
    assert {"growth", "mean-shift"} <= set(profile(model, torch.randn(8, 3, 64, 64)).check().broken)


def test_rules_are_chosen_by_name_or_brought_along(report):
    assert set(report.check(["finite"]).broken) == {"finite"}
    assert report.check(["dead-units"])
    mine = Rule("wide", "too wide", "narrow it", lambda ps: [(p, 1.0, 0.0) for p in ps if p.name == "fc"])
    assert [f.name for f in report.check([mine]).findings] == ["fc", "fc"]
    with pytest.raises(UserError, match=r"unknown rule 'growht': did you mean growth"):
        report.check(["growht"])


def test_rules_without_their_measurements_are_not_counted(report):
    verdict = report.check()
    unmeasured = {r.name for r in verdict.unmeasured}
    assert unmeasured >= {"finite-gradient", "no-gradient", "gradient", "noise", "slow-updates", "attention"}
    assert not unmeasured & {"finite", "input", "growth", "dead-units", "odd-layer", "cosine"}
    assert {r.name for r in verdict.rules} == RULES.keys() - unmeasured
    healthy = SignalReport(report.select(model="good")).check()
    said = f"{len(RULES) - len(unmeasured)} rules; not judged: "
    assert str(healthy).startswith(f"signal: healthy (good; {said}")
    assert "gradient (pass backward=True)" in str(healthy)
    page = SignalReport(report.select(model="good"))._repr_html_()
    assert f"Healthy by {len(RULES) - len(unmeasured)} rules." in page
    assert "<li><b>gradient</b>: pass backward=True</li>" in page
    assert verdict.scope in str(verdict)
    with pytest.raises(UserError, match="gradient judges by grad_var, which was not measured: pass backward"):
        report.check(["finite", "gradient"])


def test_a_named_rule_of_gradients_has_them_measured():
    net = chain(sws, alpha=0.01, blocks=2)
    assert_signal(net, torch.randn(8, 3, 16, 16), rules=["gradient"])
    with pytest.raises(UserError, match="gradient judges by"):
        assert_signal(net, torch.randn(8, 3, 16, 16), rules=["gradient"], backward=False)


def test_a_layer_is_said_once_with_its_worst_step():
    points = [
        Point("n", name, "conv", step=step, headroom_fp16=bits)
        for step, bits in ((10, 0.5), (20, -2.0), (30, 0.9), (40, 5.0))
        for name in ("a", "b")
    ]
    text = str(SignalReport(points).check(["fp16-overflow"]))
    assert text.count("n: a:") == text.count("n: b:") == 1
    assert "n: a: 3 steps, 10 to 30, worst at 20: -2 (limit 1)" in text
    once = SignalReport([replace(points[0], max=1.0)]).check(["fp16-overflow"])
    assert "n: a: step 10: 0.5 (limit 1)" in str(once)


def test_each_step_is_judged():
    base = Point("n", "fc", "linear", var=1.0)
    sick = replace(base, step=7, nonfinite=True, max=math.nan)
    verdict = SignalReport([base, sick]).check()
    assert [(f.rule, f.step) for f in verdict.findings] == [("finite", 7)]


def test_channel_moments_are_what_points_hold(report):
    x = torch.randn(4, 3, 48, 48)
    assert report.points[0].count == channel_moments(x).count == 4 * 48 * 48
