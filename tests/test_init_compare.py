"""Starts side by side: what is measured, against plain torch; refusals; the command."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets import cli
from nfnets.errors import UserError
from nfnets.init import compare, initialize

Captured = pytest.CaptureFixture[str]


def plain(depth: int = 10, width: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 10))


X = torch.randn(48, 32, generator=torch.Generator().manual_seed(2))


def test_numbers_are_plain_torchs() -> None:
    model = plain()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = compare(model, X, methods=["he", "as is"], steps=5, lr=0.1, seed=3)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    twin = plain()
    torch.manual_seed(3)
    initialize(twin, method="he")
    labels = torch.randint(10, (48,), generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    hidden = twin[:19](X).detach()  # the last hidden layer's output
    first = twin[0](X).detach()
    row = next(r for r in found.rows() if r["start"] == "he")
    expected = float(hidden.square().mean() / first.square().mean())
    assert row["forward"] == pytest.approx(expected, rel=1e-3)
    for step, value in enumerate(found.losses["he"]):
        loss = F.cross_entropy(twin(X), labels)
        assert value == pytest.approx(float(loss.detach()), rel=1e-4), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layers = found.layers("he")
    assert [layer["layer"] for layer in layers] == [str(i) for i in range(0, 21, 2)]
    assert layers[0]["grad_var"] > 0
    assert len(found.losses["as is"]) == 6


def test_deep_plain_nets_hold_where_theory_says() -> None:
    """Depth 30: Glorot halves every layer, He holds, ReLUs merge the samples and TAT keeps them apart."""
    found = compare(plain(30, 64), torch.randn(64, 64), methods=["glorot", "he", "tat", "lsuv"], steps=0)
    rows = {row["start"]: row for row in found.rows()}
    assert rows["glorot"]["forward"] < 1e-6
    assert 0.02 < rows["he"]["forward"] < 50
    assert rows["lsuv"]["forward"] == pytest.approx(1, rel=0.05)
    assert "fading" in rows["glorot"]["broken"]
    last = {name: found.reports[name]["58"].cosine for name in ("he", "tat")}
    assert last["he"] > 0.95
    assert last["tat"] < 0.95
    assert rows["tat"]["promised"] < 2
    assert rows["he"]["first_loss"] is None


def test_the_same_seed_gives_the_same_numbers() -> None:
    model = plain(1)
    state = torch.get_rng_state()
    runs = [compare(plain(4), X, methods=["he", "orthogonal"], steps=2) for _ in range(2)]
    assert runs[0].losses == runs[1].losses
    torch.set_rng_state(state)  # `plain` seeds
    compare(model, X, methods=["he"], steps=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals_are_listed_and_shown(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))
    found = compare(model, X, methods=["he", "tat", "fixup"], steps=1)
    assert set(found.refused) == {"tat", "fixup"}
    assert "normalizes at 1" in found.refused["tat"]
    assert "tat was refused: the model normalizes" in str(found)
    page = found.to_html(tmp_path / "starts.html").read_text()
    assert "fixup was refused" in page
    assert "in 1 steps at lr 0.02" in page
    assert json.loads(found.to_json(tmp_path / "starts.json").read_text())["refused"].keys() == {
        "tat",
        "fixup",
    }
    with pytest.raises(UserError, match="every method refused the model; tat"):
        compare(model, X, methods=["tat"])


def test_divergence_own_loss_and_own_names() -> None:
    class Boom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"out": self.a(x) ** 5}

    found = compare(
        Boom(),
        X,
        methods={"big": {"method": "he", "gain": 30.0}, "small": {"method": "he"}},
        steps=6,
        lr=10.0,
    )
    assert found.losses["big"][-1] == math.inf
    assert found.to_dict()["losses"]["big"][-1] == "inf"
    own = compare(Boom(), X, methods=["he"], steps=1, loss=lambda out: out["out"].abs().mean())
    assert len(own.losses["he"]) == 2


def test_bad_input() -> None:
    model = plain(2)
    for call, match in (
        (lambda: compare(model, X, methods=[]), "methods=.*: expected names"),
        (lambda: compare(model, X, methods="he"), "methods='he'"),
        (lambda: compare(model, X, methods=["hee"]), "did you mean he"),
        (lambda: compare(model, X, methods={"a": {"method": "he", "gian": 1}}), "did you mean gain"),
        (lambda: compare(model, X, methods={"a": 3}), "expected the options of initialize"),
        (lambda: compare(model, X, steps=-1), "steps=-1"),
        (lambda: compare(model, X, lr=0), "lr=0"),
        (lambda: compare(model), "no input tensor"),
        (lambda: compare(model, torch.randn(4, 5)), "forward fails"),
    ):
        with pytest.raises(UserError, match=match):
            call()


def run(monkeypatch: pytest.MonkeyPatch, capsys: Captured, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["nfnets", *arguments])
    monkeypatch.setattr(cli.console, "width", 200)
    code: object = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return (code if isinstance(code, int) else int(code is not None)), captured.out, captured.err


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    model = ["init", "-m", "bn_resnet8_cifar"]
    code, out, _ = run(monkeypatch, capsys, *model, "--method", "he", "-o", "gain=2.0")
    assert code == 0
    assert "std 2 · √(2/27)" in out
    page, numbers = tmp_path / "a.html", tmp_path / "a.json"
    more = ["--compare", "--methods", "as is,zero_gamma,tat", "--html", str(page), "--json", str(numbers)]
    code, out, _ = run(monkeypatch, capsys, *model, *more)
    assert code == 0
    assert "tat was refused: the model normalizes" in " ".join(out.split())
    assert page.exists()
    assert [row["start"] for row in json.loads(numbers.read_text())["starts"]] == ["as is", "zero_gamma"]
    code, _, err = run(monkeypatch, capsys, *model, "--html", "x.html")
    assert code == 2
    assert "are for --compare" in err
    code, _, err = run(monkeypatch, capsys, *model, "--method", "hee")
    assert code == 2
    assert "did you mean he" in err
