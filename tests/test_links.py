"""What `make links` finds, with servers of our own; and every paper that is named is one of the papers page."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from test_floors import MODULES

from tests import links

ANSWERS = {"/here": 200, "/robots": 403, "/gone": 404, "/no-head": 200}


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        head = self.command == "HEAD" and self.path == "/no-head"
        self.send_response(405 if head else ANSWERS[self.path])
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with HTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        (("here", "robots", "no-head"), 0, "3 of 3 lead somewhere"),
        (("here", "gone"), 1, "/gone: 404"),
        (("here", "nobody"), 1, "no answer"),
        (("nobody",), 0, "skipped, none of 1 servers"),
    ],
)
def test_dead_links_are_told(
    names: tuple[str, ...],
    code: int,
    words: str,
    server: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nobody = "http://127.0.0.1:9"  # the discard port, which nothing listens on
    page = tmp_path / "page.md"
    page.write_text(" ".join(f"[{name}]({nobody if name == 'nobody' else server}/{name})." for name in names))
    assert links.main([page]) == code
    assert words in capsys.readouterr().out


def test_there_are_links_to_ask() -> None:
    assert len(links.links(links.PAGES)) >= 15


def test_every_paper_that_is_named_is_on_the_papers_page() -> None:
    page = (links.ROOT / "docs" / "papers.md").read_text()
    listed = set(re.findall(r"\[([\d.]+)\]\(https://arxiv\.org/abs/\1\)", page))
    named: dict[str, set[str]] = {}
    for file in (*links.PAGES, *MODULES.values()):
        for line in file.read_text().splitlines():
            for number in re.findall(r"\b\d{4}\.\d+\b", line) if re.search("arxiv", line, re.I) else ():
                named.setdefault(number, set()).add(file.name)
    assert len(named) > 20
    for number, files in named.items():
        assert re.fullmatch(r"\d\d(0[1-9]|1[0-2])\.\d{4,5}", number), (
            f"{files}: {number} is no number of arXiv's"
        )
        assert len(number) == (9 if number < "1501" else 10), f"{files}: {number} is no number of arXiv's"
        assert number in listed, f"{files}: {number} is missing in docs/papers.md"
