"""A probe warns while training runs, once for each cause, and fills the norms of the weights' gradients."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfnets.signal import SignalWarning, probe

X, Y = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def train(
    model: nn.Module, lr: float = 0.05, steps: int = 8, poison_at: int = 99, **how: object
) -> list[str]:
    """What was warned of."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    with (
        warnings.catch_warnings(record=True) as said,
        probe(model, every=2, backward=True, updates=True, **how),
    ):  # type: ignore[arg-type]
        warnings.simplefilter("always")
        for step in range(steps):
            loss = F.cross_entropy(model(X), Y) * (float("nan") if step == poison_at else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(w.category is SignalWarning for w in said)
    return [str(w.message) for w in said]


def test_a_healthy_training_says_nothing() -> None:
    assert train(mlp()) == []


def test_a_rate_too_high_is_said_once_and_first() -> None:
    first, *more = train(mlp(), lr=20.0)
    assert first.startswith("Sequential: starts at 0: a step rewrites the weights")
    assert "; lower the learning rate" in first
    assert not any("a step rewrites" in other for other in more)


def test_what_follows_from_a_cause_is_not_said() -> None:
    said = train(mlp(), poison_at=2)
    assert len(said) == 2  # the gradient at the sampled step, and what it made of the next
    assert said[0].startswith("Sequential: starts at 4 at step 2: NaN or inf in a gradient")
    assert "NaN or inf in the output" in said[1]


def test_a_rate_that_warms_up_is_not_slow_at_once() -> None:
    """Two sampled steps do not tell; the third says it."""
    assert train(mlp(), lr=1e-7, steps=5) == []
    (said,) = train(mlp(), lr=1e-7, steps=9)
    assert said.startswith("Sequential: starts at 0")
    assert "a step hardly moves the weights" in said


def test_it_can_be_off() -> None:
    assert train(mlp(), lr=20.0, warn=False) == []


def logged(model: nn.Module, **how: object) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    train(model, log=lambda values, step: rows.append(values), **how)  # type: ignore[arg-type]
    return rows


def test_what_is_warned_of_is_logged_once_in_numbers() -> None:
    """A tracker takes no text: the rule and the point are the name, what was measured is the value."""
    rows = logged(mlp(), lr=20.0)
    first = next(i for i, row in enumerate(rows) if row["signal/alarms"])
    alarms = [{n: v for n, v in row.items() if n.startswith("signal/alarm/")} for row in rows]
    assert not any(alarms[:first])
    ((name, value),) = alarms[first].items()
    assert name == "signal/alarm/fast-updates/0"
    assert value > 0.1
    assert sum(name in row for row in rows) == 1
    assert [row["signal/alarms"] for row in rows] == [float(sum(map(len, alarms[: i + 1]))) for i in range(4)]


def test_a_healthy_training_logs_that_there_is_no_alarm() -> None:
    assert [row["signal/alarms"] for row in logged(mlp())] == [0.0] * 4
    assert not any(n.startswith("signal/alarm") for row in logged(mlp(), warn=False) for n in row)


def test_an_alarm_is_not_lost_where_its_step_was_logged_before() -> None:
    """Opened for one batch at a time, a probe logs when it closes, and judges when the next step comes."""
    rows: list[dict[str, float]] = []
    model = mlp()
    p = probe(model, log=lambda values, step: rows.append(values))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(3):
            with torch.no_grad(), p:
                model(X * (float("nan") if step == 0 else 1.0))
    assert len(said) == 1
    assert [row["signal/alarms"] for row in rows] == [0.0, 1.0, 1.0]
    assert [n for n in rows[1] if n.startswith("signal/alarm/")] == ["signal/alarm/finite/input"]


def test_weight_gradients_are_those_of_the_sampled_step() -> None:
    model, twin = mlp(), mlp()
    F.cross_entropy(twin(X), Y).backward()
    with probe(model, every=2, backward=True) as p:
        for _ in range(2):
            model.zero_grad()
            F.cross_entropy(
                model(X * (1 + p.calls)), Y
            ).backward()  # the second, of other data, is not sampled
    report = p.report()
    for name in ("0", "2", "4"):
        norm = twin.get_submodule(name).weight.grad.norm().item()  # type: ignore[union-attr, operator]
        assert report[name].weight_grad_norm == pytest.approx(norm, rel=1e-5)
    assert not any(w._backward_hooks for w in model.parameters())
    assert copy.deepcopy(model) is not None


def test_without_a_backward_pass_there_is_none() -> None:
    model = mlp()
    with probe(model, backward=True) as p, torch.no_grad():
        model(X)
    assert p.report()["0"].weight_grad_norm is None
    assert not any(w._backward_hooks for w in model.parameters())
