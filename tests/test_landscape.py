"""The loss around trained weights: directions filter by filter, the loss at each place by hand, what is kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conversion_nets import NETS
from torch import Tensor, nn

from nfnets.convert import convert
from nfnets.errors import UserError
from nfnets.signal.landscape import direction, landscape


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 5


def net() -> nn.Module:
    torch.manual_seed(0)
    return NETS["pre-activation"]()


def test_each_filter_has_the_norm_of_the_one_that_stands_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2),
        nn.BatchNorm2d(6),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
        nn.Linear(5, 3),
    )
    found = direction(model)
    assert set(found) == {"0.weight", "2.weight", "3.weight"}  # no bias, no γ, no β
    for i in range(6):
        torch.testing.assert_close(found["0.weight"][i].norm(), model[0].weight[i].norm())
    for group in range(2):
        for i in range(2):  # an output's filter: over the group's inputs
            rows = slice(3 * group, 3 * group + 3)
            a, b = found["2.weight"][rows, i], model[2].weight[rows, i]
            torch.testing.assert_close(a.norm(), b.norm())
    other = direction(model, number=1)
    cosine = F.cosine_similarity(found["3.weight"].flatten(), other["3.weight"].flatten(), dim=0)
    assert abs(float(cosine)) < 0.9
    torch.testing.assert_close(direction(model), found, rtol=0, atol=0)


def test_two_models_share_their_directions() -> None:
    model = net()
    converted = convert(model, data()[0], method="nf")
    mine, theirs = direction(model), direction(converted)
    assert {n for n in mine if "conv" in n} <= set(theirs)
    for name in mine:
        own, other = (way[name].flatten(1) for way in (mine, theirs))
        torch.testing.assert_close(F.cosine_similarity(own, other), torch.ones(len(own)))


@pytest.mark.parametrize("dimensions", [1, 2])
def test_losses_are_those_of_moved_copies(dimensions: int) -> None:
    model = net()
    before, mode = copy.deepcopy(model.state_dict()), model.training
    x, y = data()
    found = landscape(model, x, y, dimensions=dimensions, steps=3, extent=0.5, batch_size=5)
    assert found.offsets == [-0.5, 0.0, 0.5]
    (losses,) = found.losses.values()
    ways = [direction(model, number=n) for n in range(dimensions)]
    for i, a in enumerate(found.offsets):
        for j, b in enumerate(found.offsets if dimensions == 2 else [0.0]):
            twin = copy.deepcopy(model).eval()
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    for way, offset in zip(ways, (a, b), strict=False):
                        p += offset * way.get(name, torch.zeros(()))
                expected = float(F.cross_entropy(twin(x), y))
            assert (losses[i][j] if dimensions == 2 else losses[i]) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training == mode


@pytest.mark.parametrize("dimensions", [1, 2])
def test_it_goes_on_where_it_was_and_draws(dimensions: int, tmp_path: Path) -> None:
    x, y = data()
    model = net()
    models = {"bn": model, "nf <b>": convert(model, x, method="nf")}
    out, seen = tmp_path / "losses.json", []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 5:
            raise KeyboardInterrupt

    given = {"dimensions": dimensions, "steps": 4, "out": out}
    with pytest.raises(KeyboardInterrupt):
        landscape(models, x, y, watch=stop, **given)
    begun = len(json.loads(out.read_text())["losses"]["bn"])
    assert begun == 4
    again = []
    found = landscape(models, x, y, watch=lambda done, total: again.append(done), **given)
    total = 2 * 4**dimensions
    assert seen[0] == (1, total)
    assert again == [*range(begun + 1, total + 1)]
    assert found == landscape(models, x, y, dimensions=dimensions, steps=4)
    with pytest.raises(UserError, match="other models"):
        landscape(models, x, y, seed=1, **given)
    found.figure().savefig(tmp_path / "figure.png")
    page = found.to_html(tmp_path / "page.html").read_text()
    assert "Plotly.newPlot" in page
    assert "<b>" not in page
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize("wrong", [{"dimensions": 3}, {"steps": 1}, {"extent": 0.0}])
def test_what_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))}="):
        landscape(net(), *data(), **wrong)
