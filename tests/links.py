"""Asks every external link of the documentation: `python tests/links.py`, exit code 1 if one leads nowhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
GONE = (404, 410)  # any other answer, 403 and 429 among them, comes from a server that is there


def links(pages: Iterable[Path]) -> dict[str, str]:
    """Every http(s) address, with a page that it stands on."""
    found = {}
    for page in pages:
        for url in re.findall(r"https?://[^\s<>\"'`)\]]+", page.read_text(encoding="utf-8")):
            found.setdefault(url.rstrip(".,;:"), page.name)
    return found


def answer(url: str, timeout: float = 20) -> int | str:
    """The HTTP status; or why there is none."""
    found: int | str = ""
    for method in ("HEAD", "GET"):  # not every server knows the first
        try:
            request = Request(url, method=method, headers={"User-Agent": "Mozilla/5.0 (link check)"})
            with urlopen(request, timeout=timeout) as response:
                return response.status
        except HTTPError as error:
            found = error.code
        except OSError as error:
            found = f"no answer ({getattr(error, 'reason', error)})"
    return found


def main(pages: Iterable[Path] = PAGES) -> int:
    """A line for each dead link, and 1 if there is one; 0 with a reason where no server at all can be reached."""
    found = links(pages)
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(found, pool.map(answer, found), strict=True))
    reached = [url for url, each in answers.items() if isinstance(each, int)]
    if not reached:
        print(
            f"links: skipped, none of {len(found)} servers can be reached from here: {next(iter(answers.values()), '')}"
        )
        return 0
    dead = {url: each for url, each in answers.items() if url not in reached or each in GONE}
    for url, each in dead.items():
        print(f"links: {found[url]}: {url}: {each}")
    print(f"links: {len(found) - len(dead)} of {len(found)} lead somewhere")
    return int(bool(dead))


if __name__ == "__main__":
    sys.exit(main())
