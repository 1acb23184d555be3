"""Every notebook runs from top to bottom, and what is committed was printed by the code beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from test_floors import ROOT

nbformat: Any = pytest.importorskip("nbformat", reason="notebooks need nbformat: pip install 'nfnets[dev]'")
nbclient: Any = pytest.importorskip("nbclient", reason="notebooks need nbclient: pip install 'nfnets[dev]'")
jupyter_client: Any = pytest.importorskip(
    "jupyter_client", reason="notebooks need it: pip install 'nfnets[dev]'"
)
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)


def code(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def printed(book: Any) -> str:
    return "\n".join(printed_by(cell) for cell in code(book))


def printed_by(cell: Any) -> str:
    return "".join(
        str(output.get("text") or output.get("data", {}).get("text/plain", "")) for output in cell.outputs
    )


def shape(text: str) -> str:
    """What was printed, without its numbers."""
    return re.sub(r"[-+−]?\d[\d.,e%+-]*", "#", text)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all: starting it and importing torch takes longer than most notebooks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NFNETS_FAST", "1")
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        manager = jupyter_client.KernelManager()
        manager.start_kernel(cwd=str(tmp_path_factory.mktemp("books")))
        yield manager
        manager.shutdown_kernel(now=True)


def test_there_are_notebooks() -> None:
    assert len(BOOKS) == 3


@each
@pytest.mark.filterwarnings("ignore")
def test_it_runs(path: Path, kernel: Any) -> None:
    committed, book = nbformat.read(path, 4), nbformat.read(path, 4)
    for cell in code(book):
        cell.outputs = []
    forgets = nbformat.v4.new_code_cell("%reset -f")
    book.cells.insert(0, forgets)
    client = nbclient.NotebookClient(book, timeout=600, startup_timeout=300, km=kernel)
    client.execute()
    client.kc.stop_channels()
    book.cells.remove(forgets)
    for now, then in zip(code(book), code(committed), strict=True):
        # What a cell prints may come in one piece or in several.
        kinds = [[kind for kind, _ in groupby(o.output_type for o in cell.outputs)] for cell in (now, then)]
        assert kinds[0] == kinds[1], now.source
        if path.stem != "batch_size_and_batchnorm":  # shorter here than as committed
            assert shape(printed_by(now)) == shape(printed_by(then)), now.source
    assert not list(ROOT.glob("notebooks/*.html")), "nothing is written beside them"


@each
def test_it_is_committed_whole(path: Path) -> None:
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    assert path.stat().st_size < 500_000
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1)), (
        "run in order"
    )
    outputs = [output for cell in code(book) for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "no warnings"
    assert not re.search(r"/(home|work|root|tmp|Users)/", printed(book)), "no path of a machine"


@each
def test_it_is_on_the_site(path: Path) -> None:
    assert f"notebooks/{path.stem}.md" in (ROOT / "mkdocs.yml").read_text()


def test_the_comparison_was_not_run_in_fast_mode() -> None:
    book = nbformat.read(ROOT / "notebooks" / "batch_size_and_batchnorm.ipynb", 4)
    assert {"bn at 2:", "nf at 2:"} <= set(re.findall(r"(?:bn|nf) at \d+:", printed(book)))
    assert any("image/png" in output.get("data", {}) for cell in code(book) for output in cell.outputs)
