"""AGC and the layers that make the outputs: what a handle says, and what holds a net at its first loss."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from nfnets import attach_agc, attach_centralization


class Matting(nn.Module):
    """Its last layer has no name by which it is known to make the outputs, one small filter, and no bias at first."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.decoder = nn.ModuleDict({"matting": nn.Conv2d(8, 1, 1)})
        last = self.decoder["matting"]
        nn.init.normal_(last.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder["matting"](self.backbone(x)).sigmoid()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


@pytest.mark.parametrize("attach", [attach_agc, attach_centralization])
@pytest.mark.parametrize("exclude", ["head", ["head", "backbone.*"]])
def test_a_head_that_is_not_found_is_told(attach: Any, exclude: Any) -> None:
    model = Matting()
    with pytest.warns(UserWarning, match=r"no layer of Matting is known.*exclude=model") as caught:
        attach(sgd(model), model, exclude=exclude)
    assert caught[0].filename == __file__


def test_a_head_that_is_not_found_has_no_limit_of_its_own_either() -> None:
    model = Matting()
    with pytest.warns(UserWarning, match="no layer of Matting"):
        attach_agc(sgd(model), model, exclude=None, head=20)


@pytest.mark.parametrize("attach", [attach_agc, attach_centralization])
def test_nothing_is_told_where_nothing_is_amiss(attach: Any) -> None:
    model, known = Matting(), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(sgd(model), model, exclude=None)
        attach(sgd(model), model, exclude=model.decoder)
        attach(sgd(known), known)


def test_a_handle_says_what_it_clips_and_what_not() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    assert repr(attach_agc(sgd(model), model, exclude=["head", "0.bias"])) == (
        "AGCHandle(clipping=0.01, eps=0.001, head=None, 2 parameters, excluded: 0.bias, 1.weight)"
    )
    assert "head=20, 4 parameters, excluded: none" in repr(attach_agc(sgd(model), model, head=20))
    assert "3 parameters, excluded: 1.weight" in repr(attach_centralization(sgd(model), model))


def losses(exclude: Any) -> tuple[float, float]:
    """Of segmenting a bright square, before and after 40 steps."""
    torch.manual_seed(0)
    x, target = torch.randn(8, 3, 12, 12), torch.zeros(8, 1, 12, 12)
    target[:, :, 4:8, 4:8] = 1
    x = x + 3 * target
    model = Matting()
    optimizer = sgd(model)
    attach_agc(optimizer, model, clipping=0.05, exclude=exclude(model))
    found = []
    for _ in range(41):
        loss = nn.functional.mse_loss(model(x), target)
        found.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found[0], found[-1]


def test_the_last_layer_decides_whether_such_a_net_trains() -> None:
    """The paper's ε holds biases, too; what holds the net is that its small last filter is clipped by its own size."""
    first, held = losses(lambda model: None)
    assert held > 0.5 * first
    assert losses(lambda model: "decoder.matting.weight")[1] < 0.5 * held
