"""A module that raises, and whose caller catches that, hides nothing that runs after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import nfnets
from nfnets.init import lsuv_
from nfnets.signal import probe, profile
from nfnets.trace import trace


class Picky(nn.Module):
    """Transparent; raises before, between or after its layers."""

    def __init__(self, inner: nn.Module, after: bool = False) -> None:
        super().__init__()
        self.inner = inner
        self.after = after

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None and not self.after:
            raise TypeError("no lengths")
        y = self.inner(x)
        if lengths is not None:
            raise TypeError("no lengths")
        return y


class Tries(nn.Module):
    """Calls a layer with more than it takes, as SpeechBrain's containers do, and then as it is."""

    def __init__(self, probe: nn.Module, error: type[BaseException] = TypeError) -> None:
        super().__init__()
        self.probe = probe
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        try:
            y = self.probe(x, lengths=torch.ones(2))
        except self.error:
            y = self.probe(x)
        return self.body(y)


class Norms(nn.Module):
    """Atomic to the tracer, as it has running statistics; what it calls may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.picky = Picky(nn.Conv2d(3, 3, 1))
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.picky(x, lengths=x)
        except TypeError:
            return self.picky(x)


def hooked() -> nn.Module:
    def refuse(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs:
            raise TypeError("no lengths")

    layer = nn.Conv2d(3, 3, 1)
    layer.register_forward_pre_hook(refuse, with_kwargs=True)
    return layer


class Interrupts(Picky):
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            raise KeyboardInterrupt
        return self.inner(x)


CASES = {
    "a torch layer": lambda: Tries(nn.Conv2d(3, 3, 1)),
    "a transparent module": lambda: Tries(Picky(nn.Conv2d(3, 3, 1))),
    "two of them": lambda: Tries(Picky(Tries(Picky(nn.Conv2d(3, 3, 1))).probe)),
    "a sequence": lambda: Tries(Picky(nn.Sequential(Picky(nn.Conv2d(3, 3, 1)), nn.ReLU()), after=True)),
    "a hook": lambda: Tries(hooked()),
    "no exception that hooks are told of": lambda: nn.Sequential(
        Tries(Interrupts(nn.Conv2d(3, 3, 1)), KeyboardInterrupt).probe,
        Tries(nn.Conv2d(3, 3, 1)),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_runs_after_it_is_seen(case):
    graph = trace(CASES[case](), torch.randn(2, 3, 8, 8))
    modules = [node for node in graph.nodes if node.module is not None]
    kinds = [type(node.module).__name__ for node in modules if not isinstance(node.module, nn.Sequential)]
    assert kinds[-3:] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert [node.name for node in modules[-3:]] == [f"{p}body.{i}" for i in range(3) for p in _prefix(case)]
    norm = modules[-2]
    assert graph.nodes[norm.inputs[0]] is modules[-3]
    assert graph.outputs == (modules[-1].index,)


def _prefix(case: str) -> list[str]:
    return ["1." if case.startswith("no exception") else ""]


def test_layers_inside_an_atomic_module_that_raise_end_with_it():
    model = nn.Sequential(Norms(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert [node.name for node in trace(model, torch.randn(2, 3, 8, 8)).nodes] == ["input", "0", "1", "2"]


def test_a_function_that_runs_in_the_handler_belongs_to_who_caught():
    class Falls(Tries):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.probe(x, lengths=x)
            except TypeError:
                return torch.sin(x)

    graph = trace(nn.Sequential(Falls(nn.Conv2d(3, 3, 1))), torch.randn(2, 3, 8, 8))
    assert [(node.name, node.path) for node in graph.nodes] == [("input", ""), ("sin", "0")]


def test_a_call_that_was_given_up_is_none():
    """It ran up to its end, and nothing came of it: its layers were called once, and feed one norm layer each."""
    model = Tries(Picky(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), after=True))
    graph = trace(model, torch.randn(2, 3, 8, 8))
    assert len(graph.calls("probe.inner.0")) == len(graph.calls("probe.inner.1")) == 1
    assert [row.action for row in nfnets.plan(model, torch.randn(2, 3, 8, 8)).rows] == ["replace"] * 2
    assert len(graph.consumers(0)) == 1


def test_what_it_wrote_before_it_raised_stays_in_the_graph():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x.add_(self.conv(x))
            raise TypeError

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.writes = Writes()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.writes(x)
            except TypeError:
                return x.relu()

    graph = trace(Model(), torch.randn(2, 3, 8, 8))
    assert [node.name for node in graph.nodes] == ["input", "writes.conv", "add", "relu"]
    assert graph.depends(3, 1)


def test_every_entry_sees_the_rest():
    """The issue's example, by `convert`, `lsuv_`, `profile` and a probe."""
    x = torch.randn(16, 3, 8, 8)
    model = Tries(nn.Conv2d(3, 3, 1))
    converted = nfnets.convert(model, x)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert "body.0" in {point.name for point in profile(model, x).points}
    with probe(model) as p:
        model(x)
    assert "body.0" in {point.name for point in p.report().points}
    report = lsuv_(Tries(nn.Conv2d(3, 3, 1)), x)
    assert {row.path: row.action for row in report.rows}["body.0"] == "set"
