"""What is measured: points by pattern, weights of every kind, updates of accumulated gradients, one transfer a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from nfnets.signal import SignalReport, collect, probe, profile


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * 2)


def by_probe(model: nn.Module, x: Tensor, **options: Any) -> SignalReport:
    with probe(model, warn=False, **options) as p:
        for _ in range(2):
            model(x)
    return SignalReport(p.report().select(step=1), p.report().notes)


both = pytest.mark.parametrize("measure", [profile, by_probe])
Measure = Callable[..., SignalReport]


@both
@pytest.mark.parametrize(
    ("options", "names", "missed"),
    [
        ({}, ["input", "a", "relu", "b"], []),
        ({"include": ["mul"]}, ["input", "a", "relu", "mul", "b"], []),
        ({"include": "mul"}, ["input", "a", "relu", "mul", "b"], []),
        ({"include": "m*", "exclude": ["[ab]"]}, ["input", "relu", "mul"], []),
        ({"exclude": "relu"}, ["input", "a", "b"], []),
        ({"include": "mull", "exclude": ["b", "bb"]}, ["input", "a", "relu"], ["mull", "bb"]),
        ({"include": "mul", "exclude": "mul"}, ["input", "a", "relu", "b"], []),
    ],
)
def test_points_are_chosen_by_pattern(
    options: dict[str, Any], names: list[str], missed: list[str], measure: Measure
) -> None:
    report = measure(Doubles(), torch.randn(40, 4), **options)
    assert [p.name for p in report.points] == names
    assert report.notes == [f"no point's name matches the pattern {each!r}" for each in missed]


def test_a_pattern_that_matches_in_one_of_two_models_is_noted_of_the_other() -> None:
    models = {"doubles": Doubles(), "plain": nn.Sequential(nn.Linear(4, 4))}
    (note,) = profile(models, torch.randn(40, 4), include="mul").notes
    assert note == "plain: no point's name matches the pattern 'mul'"


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = nn.LSTM(6, 5, batch_first=True), nn.GRUCell(5, 5)
        self.attention, self.out = nn.MultiheadAttention(5, 1, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lstm(x)[0]
        return self.out(self.cell(self.attention(y, y, y)[0][:, 0]))


def together(tensors: list[Tensor]) -> float:
    return torch.cat([t.detach().flatten() for t in tensors]).norm().item()


def test_layers_with_several_weights_have_norms_and_updates() -> None:
    torch.manual_seed(0)
    model = Recurrent()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(40, 7, 6)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with probe(model, updates=True, warn=False) as p:
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            if not p.calls > 1:
                after = {n: p.detach().clone() for n, p in model.named_parameters()}
    report = SignalReport(p.report().select(step=0))
    gradients = profile(model, x, loss=lambda out: out.square().mean())
    for name in ("lstm", "cell", "attention", "out"):
        held = [n for n in before if n.startswith(name) and "weight" in n]
        assert report[name].weight_norm == pytest.approx(together([before[n] for n in held]), rel=1e-5)
        moved = together([after[n] - before[n] for n in held]) / together([before[n] for n in held])
        assert report[name].update_ratio == pytest.approx(moved, rel=1e-3)
        assert (gradients[name].weight_grad_norm or 0.0) > 0


class DataSGD(torch.optim.SGD):
    """Writes past autograd's counters, as older optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for q in group["params"]:
                q.data.add_(q.grad, alpha=-group["lr"])


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, DataSGD])
@pytest.mark.parametrize("every", [2, 4, 5])
def test_the_update_of_accumulated_gradients_is_that_of_the_next_step(
    every: int, optimizer_class: type[torch.optim.SGD]
) -> None:
    """Every micro-batch is a call; the optimizer steps after each second one."""
    torch.manual_seed(0)
    model = Doubles()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    x = torch.randn(40, 4)
    expected: dict[int, float] = {}
    with probe(model, every=every, updates=True, warn=False) as p:
        for call in range(12):
            model(x).square().mean().backward()
            if call % 2:
                before = model.a.weight.detach().clone()
                optimizer.step()
                optimizer.zero_grad()
                ratio = ((model.a.weight - before).norm() / before.norm()).item()
                expected |= {call: ratio, call - 1: ratio}
    for point in p.report().points:
        if point.name == "a":
            assert point.update_ratio == pytest.approx(expected[point.step], rel=1e-3)


# -- transfers --------------------------------------------------------------------------------------------------


def transfers(
    monkeypatch: pytest.MonkeyPatch, device: str, around: Callable[..., Any], begin: Callable[[], None]
) -> list[int]:
    """How often statistics came to the host during each of seven training steps, every second one sampled.

    `around` runs every transfer; `begin` is called when the first step, which predicts, is over.
    """
    calls: list[int] = []
    seen: list[int] = []

    def fetch(*arguments: Any) -> Any:
        calls.append(len(seen))
        return around(original, *arguments)

    original = collect.fetch
    monkeypatch.setattr(collect, "fetch", fetch)
    model = timm.create_model("test_nfnet", num_classes=10).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 3, 64, 64, device=device)
    with probe(model, every=2, backward=True, updates=True, warn=False) as p:
        for _ in range(7):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(calls.count(len(seen)))
            if len(seen) == 1:
                begin()
    p.report()
    assert len(calls) == sum(seen) + 1
    return seen


def test_one_transfer_a_sampled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first is for the prediction; then a sampled step brings what the one before it measured.
    assert transfers(monkeypatch, "cpu", lambda f, *a: f(*a), lambda: None) == [1, 0, 1, 0, 1, 0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_else_is_synchronized_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def allowed(fetch: Callable[..., Any], *arguments: Any) -> Any:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return fetch(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    def begin() -> None:
        torch.cuda.set_sync_debug_mode("error")

    try:
        assert transfers(monkeypatch, "cuda", allowed, begin) == [1, 0, 1, 0, 1, 0, 1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
