"""Parameter groups: by what a parameter is, against timm's own split, and through real schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers.std_conv import ScaledStdConv2d as TimmScaledStdConv2d
from timm.optim import param_groups_weight_decay  # pyright: ignore
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from nfnets.errors import UserError
from nfnets.parameter_groups import no_weight_decay, param_groups


class Scalar(nn.Module):
    """As Fixup's scalars are declared: the class says the rate."""

    lr_scale = 0.1

    def __init__(self, ndim: int = 1) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones([1] * ndim))


def split(model: nn.Module) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        group["name"]: {names[id(p)] for p in group["params"]}
        for group in param_groups(model, lr=0.1, weight_decay=1e-4)
    }


@pytest.mark.parametrize(
    "name", ["resnet18", "test_efficientnet", "test_vit", "test_nfnet", "convnext_atto", "regnety_002"]
)
def test_against_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    own = getattr(model, "no_weight_decay", set)()
    theirs = param_groups_weight_decay(model, 1e-4, no_weight_decay_list=own)  # pyright: ignore
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in theirs[1]["params"]}
    # timm decays its standardized convolutions' gains because they are stored as (O, 1, 1, 1).
    gains = {f"{path}.gain" for path, m in model.named_modules() if isinstance(m, TimmScaledStdConv2d)}
    assert len(gains) == (25 if name == "test_nfnet" else 0)
    assert gains <= decayed
    ours = split(model)
    if name != "test_vit":
        assert ours["decayed"] == decayed - gains
    else:  # (1, 1, C) tokens: one vector, and named by the model too
        assert ours["decayed"] | {"cls_token"} == decayed | {"cls_token"}
    assert ours["decayed"] | ours["undecayed"] == set(names.values())


def test_timms_own_split_from_our_names() -> None:
    model = timm.create_model("test_nfnet")
    groups = param_groups_weight_decay(model, 1e-4, no_weight_decay_list=no_weight_decay(model))  # pyright: ignore
    by_name = {frozenset(map(id, group["params"])) for group in groups}
    ours = {frozenset(map(id, group["params"])) for group in param_groups(model, 0.1, 1e-4)}
    assert by_name == ours


def test_by_what_it_is() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias_conv = nn.Conv2d(3, 4, 3)  # a name that a substring would catch
            self.depthwise = nn.Conv2d(4, 4, 1, groups=4)  # its weight has one long dimension
            self.one = nn.Linear(1, 1)
            self.norm = nn.LayerNorm([4, 5, 5])  # its weight has three
            self.batch = nn.BatchNorm2d(4)
            self.slope = nn.PReLU(4)
            self.gain = nn.Parameter(torch.ones(4, 1, 1))
            self.skip = nn.Parameter(torch.zeros(()))
            self.token = nn.Parameter(torch.zeros(6, 7))
            self.fixup = Scalar()
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))

    found = split(Mixed())
    assert found["decayed"] == {
        "bias_conv.weight",
        "depthwise.weight",
        "one.weight",
        "token",
        "normed.parametrizations.weight.original1",
    }
    assert found["scalars"] == {"fixup.value"}
    everything = {name for name, _ in Mixed().named_parameters()}
    assert found["undecayed"] == everything - found["decayed"] - found["scalars"]
    assert no_weight_decay(Mixed()) == everything - found["decayed"]


def test_every_trainable_parameter_once() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(5, 5), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight  # pyright: ignore
    model[2].requires_grad_(False)
    listed = [p for group in param_groups(model, 0.1, 1e-4) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == 4
    assert {id(p) for p in listed} == {id(p) for p in model.parameters() if p.requires_grad}
    # Under all its names, for conventions that go by names.
    names = no_weight_decay(model)
    assert "0.weight" not in names
    assert "1.weight" not in names
    model[3].weight = model[1].bias  # pyright: ignore
    assert no_weight_decay(model) >= {"1.bias", "3.weight"}


def test_what_the_model_spares_is_spared() -> None:
    class Spares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 3))
            self.linear = nn.Linear(3, 3)

        def no_weight_decay(self) -> set[str]:
            return {"table"}

    assert split(Spares()) == {"decayed": {"linear.weight"}, "undecayed": {"table", "linear.bias"}}


def fixup_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), Scalar(), Scalar(0))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_tenth_of_the_rate_all_the_way_through_schedulers(optimizer: Any) -> None:
    torchs = optimizer(param_groups(fixup_net(), lr=0.5, weight_decay=1e-4), lr=9.0)
    timms = optimizer(param_groups(fixup_net(), lr=0.5, weight_decay=1e-4), lr=9.0)
    a = torch.optim.lr_scheduler.CosineAnnealingLR(torchs, T_max=10)
    b = CosineLRScheduler(timms, t_initial=10)
    for step in range(1, 10):
        torchs.step()
        a.step()
        b.step(step)
        for groups in (torchs.param_groups, timms.param_groups):
            rates = {group["name"]: group["lr"] for group in groups}
            assert rates["scalars"] == pytest.approx(0.1 * rates["decayed"])
            assert rates["undecayed"] == rates["decayed"]
        assert torchs.param_groups[0]["lr"] == pytest.approx(timms.param_groups[0]["lr"])
    assert {g["name"]: g["weight_decay"] for g in torchs.param_groups} == {
        "decayed": 1e-4,
        "undecayed": 0.0,
        "scalars": 0.0,
    }
    assert [len(g["params"]) for g in torchs.param_groups if g["name"] == "scalars"] == [2]


@pytest.mark.parametrize("kwargs", [{"lr": -0.1}, {"lr": float("nan")}, {"weight_decay": -1.0}])
def test_refused_numbers(kwargs: dict[str, float]) -> None:
    with pytest.raises(UserError, match="0 or more"):
        param_groups(nn.Linear(2, 2), **{"lr": 0.1, "weight_decay": 0.0} | kwargs)


def test_refused_models() -> None:
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(UserError, match="no trainable parameters"):
            param_groups(model, 0.1, 0.0)
    with pytest.raises(UserError, match=r"lazy parameter 0\.weight"):
        param_groups(nn.Sequential(nn.LazyLinear(3)), 0.1, 0.0)
