"""The README's and the guides' Python runs as it stands, in order, in an empty folder; their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_floors import ROOT

PAGES = {"README.md": ROOT / "README.md"} | {
    file.relative_to(ROOT).as_posix(): file
    for folder in ("docs", "docs/guides")
    for file in sorted((ROOT / folder).glob("*.md"))
}
# A comment before a block says why it is not run: <!-- not run: trains for minutes -->
BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n)?```python\n(?P<code>.*?)```", flags=re.S)
INTERFACES = {"docs/design.md"}  # its blocks are signatures, not programs
BLOCKS = {
    name: list(BLOCK.finditer(file.read_text())) for name, file in PAGES.items() if name not in INTERFACES
}


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS["README.md"]) >= 2
    assert sum(len(blocks) for blocks in BLOCKS.values()) >= 20


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_python_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nfnets.convert.methods import base

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "example"}
    skipped = []
    for block in BLOCKS[name]:
        if block["why"]:
            skipped.append(block["why"])
            continue
        line = PAGES[name].read_text()[: block.start("code")].count("\n")
        exec(compile("\n" * line + block["code"], name, "exec"), names)
    assert name != "README.md" or (tmp_path / "signal.html").exists()
    for page in tmp_path.glob("*.html"):
        assert page.stat().st_size > 10_000
    if skipped and len(skipped) == len(BLOCKS[name]):
        pytest.skip("; ".join(skipped))


@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_option_exists(name: str) -> None:
    import typer

    from nfnets.cli import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = PAGES[name].read_text().replace("\\\n", " ")
    lines = re.findall(r"^    nfnets (\S+)(.*)$", text, flags=re.M)
    lines += re.findall(r"`nfnets (\w+)([^`]*)`", text)
    assert lines or name != "README.md"
    for command, rest in lines:
        if command == "COMMAND":
            continue
        known = {option for parameter in commands[command].params for option in parameter.opts} | {"--help"}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"nfnets {command}{rest}"


def test_every_command_is_in_the_readme_or_a_guide() -> None:
    import typer

    from nfnets.cli import app

    text = "".join(file.read_text() for file in PAGES.values())
    for command in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"nfnets {command}" in text, command


# What fits at 1280 pixels (docs/assets/site.css). Lab notebook and design hold commands and signatures as they are.
COLUMNS = 96
WIDE = {"README.md", "docs/experiments.md", "docs/design.md"}


@pytest.mark.parametrize("name", sorted(set(PAGES) - WIDE))
def test_no_code_block_is_cut_off(name: str) -> None:
    text = PAGES[name].read_text()
    fenced = re.compile(r"^```\w+\n(.*?)^```", flags=re.M | re.S)
    lines = [line for block in fenced.findall(text) for line in block.splitlines()]
    lines += re.findall(r"^    (.*)$", fenced.sub("", text), flags=re.M)
    assert [line for line in lines if len(line) > COLUMNS] == []


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].read_text().splitlines()) <= 150


def test_the_overview_says_what_the_results_say() -> None:
    """The figure's numbers, computed from the runs, stand in the first table of docs/results."""
    from experiments import overview

    found = overview.rows()
    page = (ROOT / "docs" / "results" / "README.md").read_text()
    for folder, _, batch, d in found:
        interval = f"{100 * d.mean:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]".replace("-", "−")
        row = next(line for line in page.splitlines() if line.startswith(f"| `{folder}` |"))
        assert interval in row
        assert f"| {batch} |" in row
    readme = PAGES["README.md"].read_text()
    apart = sum(d.low > 0 for _, _, _, d in found)
    assert f"All {sum(d.mean > 0 for _, _, _, d in found)} means are above zero, and {apart} bars" in readme
    assert len(found) == sum(d.mean > 0 for _, _, _, d in found)
