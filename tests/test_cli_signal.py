"""The commands that look at a signal: which gradients they measure, which models they compare."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from nfnets import cli

Captured = pytest.CaptureFixture[str]


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


def test_check_measures_gradients_where_a_rule_judges_them(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    _, out, _ = run(monkeypatch, capsys, "check", "-m", "bn_resnet8_cifar")
    assert "gradient (pass backward=True)" in out
    for more in (["--rule", "gradient"], ["--backward"]):
        code, out, _ = run(monkeypatch, capsys, "check", "-m", "bn_resnet8_cifar", *more)
        assert code == 0
        assert "backward=True" not in out


def net() -> nn.Sequential:
    convolutions = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def frozen() -> nn.Module:
    model = net()
    model[3].requires_grad_(False)
    return model


def zero_head() -> nn.Module:
    model = net()
    nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    return model


def dropout() -> nn.Module:
    return net().insert(5, nn.Dropout(0.9))


DOUBTS = {"frozen": "frozen", "zero-head": "zero_head", "dropout": "dropout", "few-samples": "net"}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_is_a_note_fails_a_check_of_gradients_unless_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured, doubt: str
) -> None:
    given = ["check", "-m", f"test_cli_signal:{DOUBTS[doubt]}", "--input", "3x16x16"]
    given += ["--batch", "2" if doubt == "few-samples" else "16"]
    assert run(monkeypatch, capsys, *given)[0] == 0
    code, out, _ = run(monkeypatch, capsys, *given, "--backward")
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("not passed: ")]
    assert line.endswith(f"; if meant so, pass --allow {doubt}")
    code, out, _ = run(monkeypatch, capsys, *given, "--backward", "--allow", doubt)
    assert code == 0
    assert "allowed: " in out
    code, _, err = run(monkeypatch, capsys, *given, "--backward", "--allow", doubt[:-1])
    assert code == 2
    assert f"did you mean {doubt}?" in err


def test_a_rule_that_was_named_and_had_nothing_to_judge_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    given = ["-m", "test_cli_signal:zero_head", "--input", "3x16x16", "--rule", "gradient"]
    code, out, _ = run(monkeypatch, capsys, "check", *given)
    assert code == 1
    assert "nothing judged" in out
    assert "all gradients are 0" in out


def test_profile_refuses_models_that_were_made_for_other_images(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    models = ["-m", "bn_resnet8_cifar", "-m", "timm:test_resnet"]
    code, _, err = run(monkeypatch, capsys, "profile", *models)
    assert code == 2
    assert "timm:test_resnet was made for 3x160x160, bn_resnet8_cifar for 3x32x32: pass one --input" in err
    assert run(monkeypatch, capsys, "profile", *models, "--input", "3x32x32")[0] == 0
