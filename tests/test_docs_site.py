"""The site: every public name has its place, every link and anchor leads somewhere, and it builds without a warning."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from test_floors import MODULES, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PUBLIC = (
    "nfnets",
    "nfnets.agc",
    "nfnets.before_step",
    "nfnets.centralization",
    "nfnets.callbacks",
    "nfnets.convert",
    "nfnets.errors",
    "nfnets.functional",
    "nfnets.gains",
    "nfnets.hub",
    "nfnets.init",
    "nfnets.layers",
    "nfnets.models",
    "nfnets.parameter_groups",
    "nfnets.privacy",
    "nfnets.signal",
    "nfnets.trace",
    "nfnets.train",
    "nfnets.train.compare",
    "nfnets.verify",
)


def identifiers() -> dict[str, str]:
    """What the API pages document: identifier → page."""
    found: dict[str, str] = {}
    for page in sorted((DOCS / "api").glob("*.md")):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M):
            assert name not in found, f"{name} stands on {found[name]} and on {page.name}"
            found[name] = page.name
    return found


def resolve(identifier: str) -> Any:
    module, _, name = identifier.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public_names(module: Any) -> list[str]:
    """Its `__all__`, or what it defines itself without an underscore."""
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    return list(getattr(module, "__all__", own))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_place_in_the_api(name: str) -> None:
    documented = [resolve(identifier) for identifier in identifiers()]
    module = importlib.import_module(name)

    def value(name: str) -> Any:
        found = getattr(module, name)
        return found.__call__ if inspect.ismodule(found) else found  # nfnets.convert is both

    missing = [n for n in public_names(module) if not any(value(n) is each for each in documented)]
    assert missing == [], "add them to a page of docs/api"


def test_every_method_has_a_place_in_the_api() -> None:
    from nfnets.convert import list_methods

    documented = {resolve(identifier) for identifier in identifiers() if ".methods." in identifier}
    shipped = {method for method in list_methods().values() if method.__module__.startswith("nfnets.")}
    assert documented == shipped


def test_every_package_with_public_names_is_looked_at() -> None:
    with_all = {name for name in MODULES if hasattr(importlib.import_module(name), "__all__")}
    # Re-exported by nfnets.train, nfnets.convert, nfnets.signal; timm's, which lists its entry points so.
    elsewhere = {"nfnets.train.data", "nfnets.convert.methods", "nfnets.signal.rules"}
    elsewhere |= {"nfnets.models.timm_registry"}
    assert with_all - set(PUBLIC) <= elsewhere, "add it to PUBLIC, and its names to a page of docs/api"


def test_no_identifier_is_a_module_by_mistake() -> None:
    """A function named like the module that it lives in is found as that module by a parser of sources."""
    assert [name for name in identifiers() if name in MODULES] == []


# -- links ------------------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor of a heading, as Python-Markdown's `toc` makes it."""
    text = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
    text = text.encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


@cache
def anchors(page: Path) -> frozenset[str]:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return frozenset(
        {slug(heading) for heading in headings} | set(re.findall(r"^::: (\S+)$", text, flags=re.M))
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_anchors(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        notebook = file.parent == DOCS / "notebooks"  # a page that docs/assets/notebook_pages.py makes
        made_of = ROOT / "notebooks" / f"{file.stem}.ipynb" if notebook else file
        assert made_of.exists(), f"{page.name} → {target}"
        if page.is_relative_to(DOCS):
            assert file.is_relative_to(DOCS), f"{page.name} → {target}: the site holds docs/ alone"
        if anchor:
            assert anchor in anchors(file), f"{page.name} → {target}"


def test_code_that_pages_name_exists() -> None:
    """`nfnets.some.name` in backquotes, and paths of the repository."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for name in re.findall(r"`(nfnets(?:\.\w+)+)(?:\(.*?\))?`", text):
            parts = name.split(".")
            found: Any = importlib.import_module("nfnets")
            for i, part in enumerate(parts[1:], 2):
                try:
                    found = getattr(found, part)
                except AttributeError:
                    found = importlib.import_module(".".join(parts[:i]))
        for path in re.findall(r"`((?:docs|examples|init|nfnets|tests|train|results)/[\w./-]+\.\w+)`", text):
            base = DOCS if path.startswith("results/") else ROOT
            assert (base / path).exists(), f"{page.name}: {path}"


def test_every_page_can_be_reached() -> None:
    """By the navigation, or by a link of a page that it names."""
    navigation = (ROOT / "mkdocs.yml").read_text()
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+[^)\s]*)\)", page.read_text())
    }
    for page in DOCS.rglob("*.md"):
        assert page.relative_to(DOCS).as_posix() in navigation or page in linked, (
            f"{page}: name it under nav in mkdocs.yml, or link it from another page"
        )


# -- the build --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site's tools are not installed: pip install 'nfnets[docs]'")
    source = tmp_path_factory.mktemp("site")  # a copy, so that two builds at a time do not meet
    for name in ("mkdocs.yml", "docs", "notebooks", "nfnets", "init", "train"):
        item = ROOT / name
        (shutil.copytree if item.is_dir() else shutil.copy)(item, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"],
        cwd=source,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "build" / "site"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_documents_every_name(site: Path) -> None:
    for identifier, page in identifiers().items():
        html = (site / "api" / page).with_suffix(".html").read_text()
        start = html.find(f'id="{identifier}"')
        assert start >= 0, identifier
        # A signature or a value, and prose: not an empty heading.
        assert re.search(r"doc-contents.*?<p>\w", html[start : start + 20_000], flags=re.S), identifier


@pytest.mark.slow
def test_the_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        html = re.sub(r"<link rel=\"canonical\"[^>]*>", "", page.read_text())
        fetched = re.findall(r"<(?:script|img|link|iframe)[^>]*?(?:src|href)=\"(https?:[^\"]+)\"", html)
        assert fetched == [], page.name


@pytest.mark.slow
def test_the_search_works_from_a_folder_and_finds_answers(site: Path) -> None:
    home = (site / "index.html").read_text()
    assert "assets/iframe-worker.js" in home, (
        "a worker, which pages opened from a folder may not start themselves"
    )
    assert 'data-md-component="source"' not in home, "it asks the repository's host for stars"
    index = json.loads((site / "search" / "search_index.js").read_text().removeprefix("var __index = "))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert "guides/groupnorm.html" in places
    assert not [place for place in places if place.endswith("verdict.html")], "tables of runs are no answers"
    boosts = {entry["location"]: entry.get("boost", 1.0) for entry in index["docs"]}
    assert boosts["guides/groupnorm.html"] > boosts["convert.html"] > boosts["experiments.html"]
    assert re.search(r"md-footer__link--next", home), "previous and next"
