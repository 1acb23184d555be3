"""The README's Python runs as it stands, in order, in an empty folder; its commands exist."""

import re
from pathlib import Path

import pytest
from test_floors import ROOT

README = (ROOT / "README.md").read_text()


def test_python_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "signal.html").stat().st_size > 10_000


def test_every_command_and_option_exists() -> None:
    import typer

    from nfnets.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = re.findall(r"^    nfnets (\S+)(.*)$", README, flags=re.M)
    assert lines
    for name, rest in lines:
        if name == "COMMAND":
            continue
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
