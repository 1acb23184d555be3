"""What an index and a reader of a release are told."""

from __future__ import annotations

import re
import tomllib

import nfnets
from tests.test_floors import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_stands_in_one_place_and_the_citation_repeats_it() -> None:
    assert PROJECT["dynamic"] == ["version"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.M)
    assert cited is not None
    assert cited[1] == nfnets.__version__


def test_the_citation_is_what_readers_of_it_expect() -> None:
    import yaml

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys(), "what the schema of 1.2.0 demands"
    assert cited["cff-version"] == "1.2.0"
    assert cited["license"] == PROJECT["license"]
    assert cited["abstract"] == PROJECT["description"]
    for paper in cited["references"]:
        assert {"type", "title", "authors"} <= paper.keys()


def test_the_sdist_holds_what_the_tests_read() -> None:
    grafted = set(re.findall(r"^graft (\S+)$", (ROOT / "MANIFEST.in").read_text(), flags=re.M))
    folders = {
        item.name
        for item in ROOT.iterdir()
        if item.is_dir() and any(item.glob("*")) and item.name not in {"build", "dist", "runs"}
    }
    assert {name for name in folders if not re.search(r"^\.(?!ci)|egg-info|^__pycache__$", name)} <= grafted
