"""Reports of a distributed run: two gloo processes must report what one process does on the whole batch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.signal import Point, SignalReport, probe
from nfnets.signal.rows import RawPoint, merge_rows
from tests.ranks import WORLD, needs_gloo, on_ranks

pytestmark = needs_gloo

FORWARD = ("mean_sq", "var", "total_mean", "total_var", "dead", "min", "max", "residual_var", "weight_norm")
BACKWARD = ("grad_mean_sq", "grad_var", "grad_norm", "grad_min", "grad_max")


class Net(nn.Module):
    """No batch statistics, so that halves of a batch run as the whole does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last = (nn.Conv2d(c, 6, 3, padding=1) for c in (3, 6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = x + self.last(torch.relu(self.inner(torch.relu(x))))
        return self.head(x.mean((2, 3)))


def build() -> Net:
    torch.manual_seed(0)
    return Net()


def batch() -> Tensor:
    x = torch.randn(12, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    x[4:] += 2.0  # ranks whose means differ: averaging their variances would be wrong
    return x


def values(point: Point, names: tuple[str, ...]) -> dict[str, float]:
    return {name: value for name in names if (value := getattr(point, name)) is not None}


def run(model: nn.Module, parts: list[Tensor], **options: Any) -> SignalReport:
    with probe(model, every=2, backward=True, warn=False) as p:
        for _ in range(3):
            for part in parts:
                model(part).square().sum().backward()
            model.zero_grad()
    return p.report(**options)


def work(rank: int, folder: str) -> None:
    # Uneven parts: 4 samples and 8.
    part = batch().tensor_split([4])[rank]
    ddp = nn.parallel.DistributedDataParallel(build())
    run(ddp, [part]).to_json(f"{folder}/merged-{rank}.json")
    run(ddp, [part], merge=False).to_json(f"{folder}/own-{rank}.json")
    run(build(), [part], merge=True).to_json(f"{folder}/plain-{rank}.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    on_ranks(work, path)
    return path


@pytest.fixture(scope="module")
def alone() -> SignalReport:
    return run(build(), [batch()])


@pytest.mark.parametrize("kind", ["merged", "plain"])
def test_two_ranks_report_what_one_process_does(kind, folder, alone):
    reports = [SignalReport.from_json(folder / f"{kind}-{rank}.json") for rank in range(WORLD)]
    assert reports[0].to_dict() == reports[1].to_dict()
    assert reports[0].meta["ranks"] == WORLD
    assert reports[0].steps == alone.steps == (0, 2)
    for p, q in zip(reports[0].points, alone.points, strict=True):
        for name in ("name", "kind", "role", "feeds", "block", "step", "count", "nonfinite"):
            assert getattr(p, name) == getattr(q, name), (p.name, name)
        assert values(p, FORWARD) == pytest.approx(values(q, FORWARD), rel=1e-4, abs=1e-6), p.name
        assert values(p, BACKWARD) == pytest.approx(values(q, BACKWARD), rel=1e-3, abs=1e-6), p.name
    assert sum(p.residual_var is not None for p in reports[0].points) == 4
    assert sum(p.grad_var is not None for p in reports[0].points) >= 16


def test_without_merging_each_rank_reports_its_own_part(folder, alone):
    own = [SignalReport.from_json(folder / f"own-{rank}.json") for rank in range(WORLD)]
    assert [report["stem"].shape[0] for report in own] == [4, 8]
    counts = [report["stem"].count for report in own]
    assert sum(counts) == alone["stem"].count
    averaged = sum(c * report["input"].var for c, report in zip(counts, own, strict=True)) / sum(counts)  # type: ignore[operator]
    assert alone["input"].var > averaged + 0.5  # type: ignore[operator]


def test_merging_needs_a_process_group():
    model = build()
    with probe(model, warn=False) as p:
        model(batch())
    with pytest.raises(UserError, match="init_process_group"):
        p.report(merge=True)


def test_points_of_one_rank_only_are_kept():
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.mean() > 0 else self.b(self.a(x))

    def rows(x: Tensor) -> list[RawPoint]:
        model = Switch()
        with probe(model, warn=False) as p:
            model(x)
        assert p._pending is not None
        return p._gather(p._pending)

    x = torch.rand(8, 4)
    merged = merge_rows([rows(x), rows(-x)])
    assert [r.place.name for r in merged] == ["input", "a", "b"]
    assert [r.output.moments.count for r in merged] == [16, 16, 8]
    assert not any(math.isnan(r.output.low) for r in merged)
