"""MkDocs hook: the repository's address from pyproject.toml, and which pages the search shows first."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# By the start of a page's path, the first that fits: guides before reference, lab notebooks last.
BOOSTS = {
    "guides/": 4.0,
    "quickstart": 4.0,
    "ideas": 4.0,
    "glossary": 2.0,
    "results/": 0.2,
    "zoo": 0.2,
    "experiments": 0.4,
}


def on_config(config: Any, **_: Any) -> Any:
    """Take `repo_url` from `[project.urls]`, so that it is written in one place."""
    file = ROOT / "pyproject.toml"
    urls = tomllib.loads(file.read_text()).get("project", {}).get("urls", {}) if file.exists() else {}
    config.repo_url = urls.get("Repository") or urls.get("Source") or None
    config.repo_name = "Repository" if config.repo_url else None
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """An experiment's raw tables are no answer to a search: results/README.md names each of them."""
    path = page.file.src_uri
    found = {"exclude": True} if path.endswith("verdict.md") else {}
    boost = next((value for start, value in BOOSTS.items() if path.startswith(start)), None)
    page.meta.setdefault("search", found if boost is None else {"boost": boost, **found})
    return markdown
