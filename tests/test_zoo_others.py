"""Nets of other libraries in small: a library is one function, and what it yields goes through the zoo's machinery."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo import catalog, others, store
from benchmarks.zoo.__main__ import OTHERS, main
from benchmarks.zoo.build import build
from benchmarks.zoo.others.net import Called, Net
from benchmarks.zoo.page import END, START, write_table
from benchmarks.zoo.run import BASE, run_model


class Mix(nn.Module):
    """Takes a keyword and returns more than a tensor."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(3, width, 3, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, *, series: Tensor) -> dict[str, Any]:
        if series.shape[-1] < 8:
            raise ValueError("too short")
        return {"logits": self.head(self.body(series).mean(-1)), "length": series.shape[-1]}


def by_keyword(net: nn.Module, series: Tensor) -> Tensor:
    return net(series=series)["logits"]


def mixes() -> Iterator[Net]:
    yield Net("mix", lambda: Called(Mix(), by_keyword), ((3, 4), (3, 16), (3, 32)), "series")
    yield Net("plain", lambda: nn.Linear(3, 2), ((3,),), "series")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(others.LIBRARIES, "fake", mixes)
    others.nets.cache_clear()
    return "fake"


def ended(entry: Any, methods: list[str]) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    run_model(entry, methods, records.append)
    return [r for r in records if "starts" not in r and r["method"] != BASE]


def test_a_library_is_enumerated_at_the_first_size_that_runs(
    library: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,) = catalog.enumerate_others(library, ["mix", "plain"])
    assert (entry.key, entry.shape, entry.kind, entry.norms) == ("fake/mix", (3, 16), "series", 1)
    assert entry.family == __name__.rpartition(".")[2]
    assert "fake/plain: no norm layer" in capsys.readouterr().err
    (first, (x,)), (second, (again,)) = build(entry), build(entry)
    assert x.shape == (4, 3, 16)
    assert torch.equal(x, again)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_its_nets_pass_every_check(library: str) -> None:
    (entry,) = catalog.enumerate_others(library, ["mix"])
    records = ended(entry, ["nf", "fold"])
    assert [(r["method"], r["outcome"]) for r in records] == [("nf", "converted"), ("fold", "converted")]
    assert [store.describe(r) for r in records if store.failed(r)] == []
    assert {"norm gone", "gradients", "independent", "signal", "copies"} <= set(records[0]["checks"])


def test_the_table_on_the_page(library: str, tmp_path: Path) -> None:
    (entry,) = catalog.enumerate_others(library, ["mix"])
    cell = {"model": entry.key, "checks": {}, "reason": "", "seconds": 0.0}
    records = [
        cell | {"method": "nf", "outcome": "converted"},
        cell | {"method": "fold", "outcome": "error", "reason": "it | broke"},
    ]
    report = store.summarize([entry], records, OTHERS.methods, OTHERS.title)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    for _ in range(2):  # writing again changes nothing
        write_table(report, page)
        lines = page.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        assert "old" not in lines
        assert "| fake |  | 1 | 1 | 0 | 0 | 0 | 0 | 1 |" in lines
        assert "| fake/mix | fold | it \\| broke |" in lines


def test_what_is_not_installed_is_left_out(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (entry,) = catalog.enumerate_others(library, ["mix"])
    listed = tmp_path / "others.json"
    listed.write_text(json.dumps([entry.to_json()]))
    monkeypatch.setattr("benchmarks.zoo.__main__.OTHERS", dataclasses.replace(OTHERS, catalog=listed))
    assert main(["--others", "--out", str(tmp_path)]) == 2
    assert "not installed, so left out: fake" in capsys.readouterr().out
    assert main(["--others", "--report", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "zoo_others.json").read_text())
    assert (report["title"], report["methods"]) == ("The zoo of other libraries", ["nf", "fold"])


def test_the_catalog_of_other_libraries() -> None:
    entries = catalog.load(catalog.OTHERS)
    assert len(entries) >= 250
    assert len({entry.key for entry in entries}) == len(entries)
    assert {entry.source for entry in entries} <= set(others.LIBRARIES)
    first = catalog.in_blocks(entries)[:20]
    assert len({entry.source for entry in first}) <= 3  # an import is dear, so libraries come in blocks


ONE_EACH = {
    "pytorchcv": "resnet20_cifar10",
    "torch_geometric": "GIN",
    "braindecode": "EEGNet",
    "monai": "UNet",
    "transformers": "ResNetForImageClassification",
    "tsai": "FCN",
}


def test_a_module_that_a_library_lacks_costs_one_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One path in the wrong case cost all of tsai's nets."""
    models = tmp_path / "tsai" / "models"
    models.mkdir(parents=True)
    (models / "__init__.py").touch()
    (models / "FCN.py").write_text("def FCN(c_in, c_out, seq_len):\n    return c_in, c_out, seq_len\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tsai"]:
        monkeypatch.delitem(sys.modules, name)
    found = {net.name: net for net in others.LIBRARIES["tsai"]()}
    assert {e.name for e in catalog.load(catalog.OTHERS) if e.source == "tsai"} <= set(found)
    assert found["FCN"].build() == (3, 4, 64)
    with pytest.raises(ImportError):
        found["TST"].build()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tsai"]:
        del sys.modules[name]


@pytest.mark.parametrize("source", ONE_EACH)
def test_a_net_of_a_library_that_is_installed(source: str) -> None:
    if not others.installed(source):
        pytest.skip(f"{source} is not installed (make zoo-others)")
    (entry,) = (e for e in catalog.load(catalog.OTHERS) if e.key == f"{source}/{ONE_EACH[source]}")
    records = ended(entry, ["nf", "fold"])
    assert [store.describe(r) for r in records if store.failed(r) or r["outcome"] != "converted"] == []
