"""The commands that look at a signal: which gradients they measure, which models they compare."""

from __future__ import annotations

import sys

import pytest

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


def test_profile_refuses_models_that_were_made_for_other_images(
    monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    models = ["-m", "bn_resnet8_cifar", "-m", "timm:test_resnet"]
    code, _, err = run(monkeypatch, capsys, "profile", *models)
    assert code == 2
    assert "timm:test_resnet was made for 3x160x160, bn_resnet8_cifar for 3x32x32: pass one --input" in err
    assert run(monkeypatch, capsys, "profile", *models, "--input", "3x32x32")[0] == 0
