"""`attach_agc`: which parameters, which optimizers, with gradient scalers, accumulation and closures."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.optim.lookahead import Lookahead
from torch import Tensor, nn

from nfnets.agc import attach_agc, clip_grad_agc_
from nfnets.errors import UserError
from nfnets.head import head_layers


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def data(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % 4


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def by_hand(model: nn.Module, lr: float, steps: int, clipping: float = 0.01) -> nn.Module:
    """SGD with everything but the last weight clipped, written out."""
    model = copy.deepcopy(model)
    for _ in range(steps):
        model.zero_grad()
        loss_of(model, *data()).backward()
        clip_grad_agc_([p for name, p in model.named_parameters() if name != "4.weight"], clipping)
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad  # pyright: ignore
    return model


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 1e-5) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-7)


def names_of(model: nn.Module, layers: list[nn.Module]) -> list[str]:
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(layer)] for layer in layers]


class TestHead:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", ["fc"]),
            ("test_efficientnet", ["classifier"]),
            ("test_nfnet", ["head.fc"]),
            ("test_vit", ["head"]),
            ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ],
    )
    def test_timm(self, name: str, expected: list[str]) -> None:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
            assert names_of(model, head_layers(model)) == expected
            # The peers' defect: by registration order, `num_classes=0` would exempt a layer of the body.
            assert head_layers(timm.create_model(name, num_classes=0)) == []

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", ["fc"]),
            ("vgg11_bn", ["classifier.6"]),
            ("mobilenet_v3_small", ["classifier.3"]),
            ("squeezenet1_1", ["classifier.1"]),
            ("densenet121", ["classifier"]),
            ("googlenet", ["fc", "aux1.fc2", "aux2.fc2"]),
            ("vit_b_16", ["heads.head"]),
            ("fcn_resnet50", ["classifier.4", "aux_classifier.4"]),
        ],
    )
    def test_torchvision(self, name: str, expected: list[str]) -> None:
        kwargs: dict[str, Any] = {"aux_loss": True, "weights_backbone": None} if "fcn" in name else {}
        kwargs |= {"init_weights": False} if name == "googlenet" else {}
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None, **kwargs)
        assert names_of(model, head_layers(model)) == expected

    def test_removed_wrapped_several_and_none(self) -> None:
        model = torchvision.models.resnet18()
        assert head_layers(nn.DataParallel(model)) == [model.fc]
        assert head_layers(torch.compile(model)) == [model.fc]  # pyright: ignore
        model.fc = nn.Identity()  # pyright: ignore
        assert head_layers(model) == []

        class TwoHeads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.heads = nn.ModuleDict(
                    {"a": nn.Linear(2, 3), "b": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))}
                )
                self.body = nn.Linear(2, 2)

        two = TwoHeads()
        assert names_of(two, head_layers(two)) == ["heads.a", "heads.b.1"]
        assert head_layers(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1))) == []

    def test_the_weight_is_excluded_and_the_bias_is_not(self) -> None:
        model = net()
        handle = attach_agc(torch.optim.SGD(model.parameters(), lr=0.1), model)
        assert handle.excluded == ("4.weight",)

    def test_a_tied_weight_is_excluded_under_every_name(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embedding = nn.Embedding(5, 3)
                self.head = nn.Linear(3, 5)
                self.head.weight = self.embedding.weight

        model = Tied()
        handle = attach_agc(torch.optim.SGD(model.parameters(), lr=0.1), model)
        assert handle.excluded == ("embedding.weight",)

    def test_a_parametrized_head(self) -> None:
        model = net()
        torch.nn.utils.parametrizations.weight_norm(model[4])
        handle = attach_agc(torch.optim.SGD(model.parameters(), lr=0.1), model)
        prefix = "4.parametrizations.weight."
        assert handle.excluded == (prefix + "original0", prefix + "original1")


class TestExclude:
    @pytest.mark.parametrize(
        ("exclude", "expected"),
        [
            (None, ()),
            ("0.*", ("0.weight", "0.bias")),
            (["head", "*.bias"], ("0.bias", "4.weight", "4.bias")),
            (lambda model: model[0], ("0.weight", "0.bias")),
            (lambda model: [model[0], "head"], ("0.weight", "0.bias", "4.weight")),
        ],
    )
    def test_ways(self, exclude: Any, expected: tuple[str, ...]) -> None:
        model = net()
        exclude = exclude(model) if callable(exclude) else exclude
        handle = attach_agc(torch.optim.SGD(model.parameters(), lr=0.1), model, exclude=exclude)
        assert handle.excluded == expected

    @pytest.mark.parametrize("exclude", ["head", None, ["head", "0.bias"]])
    def test_the_head_at_a_limit_of_its_own(self, exclude: Any) -> None:
        model, twin = net(), net()
        optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
        handle = attach_agc(optimizer, model, clipping=1e-3, exclude=exclude, head=4)
        left = ("0.bias",) if isinstance(exclude, list) else ()
        assert handle.excluded == left
        for step in range(2):
            for m, o in ((model, optimizer), (twin, plain)):
                o.zero_grad()
                loss_of(m, *data()).backward()
                if m is twin:
                    clip_grad_agc_([p for n, p in m.named_parameters() if n not in ("4.weight", *left)], 1e-3)
                    clipped = clip_grad_agc_(m.get_parameter("4.weight"), (4e-3, 7e-3)[step])
                    assert clipped > 0
                o.step()
            handle.head = 7
        assert_same(model, twin, rtol=0)
        assert handle.stats.steps == 2
        assert set(handle.stats.per_parameter()) == {n for n, _ in model.named_parameters()} - set(left)

    @pytest.mark.parametrize("head", [0, -1.0, math.inf, True])
    def test_a_limit_that_is_none(self, head: Any) -> None:
        model = net()
        with pytest.raises(UserError, match=r"head=.*: expected a finite number above 0; pass head=20"):
            attach_agc(torch.optim.SGD(model.parameters(), lr=0.1), model, head=head)

    @pytest.mark.parametrize(
        ("exclude", "message"),
        [("0.wieght", "0.weight"), (nn.Linear(2, 2), "module of the model"), ([3], "pattern")],
    )
    def test_refused(self, exclude: Any, message: str) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UserError, match=message):
            attach_agc(optimizer, model, exclude=exclude)
        assert not optimizer._optimizer_step_pre_hooks


class TestOptimizers:
    @pytest.mark.parametrize("groups", [1, 2])
    def test_steps_are_the_formula(self, groups: int) -> None:
        model = net()
        expected = by_hand(model, lr=0.5, steps=3)
        params = list(model.parameters())
        split = [{"params": params}] if groups == 1 else [{"params": params[:1]}, {"params": params[1:]}]
        optimizer = torch.optim.SGD(split, lr=0.5)
        handle = attach_agc(optimizer, model)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, *data()).backward()
            optimizer.step()
        assert_same(model, expected)
        assert handle.stats.steps == 3

    @pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Adagrad", "NAdam", "Adafactor", "ASGD", "Rprop"])
    def test_any_torch_optimizer(self, name: str) -> None:
        model, twin = net(), net()
        optimizer, plain = (getattr(torch.optim, name)(m.parameters(), lr=0.01) for m in (model, twin))
        attach_agc(optimizer, model)
        for _ in range(2):
            for m, o in ((model, optimizer), (twin, plain)):
                o.zero_grad()
                loss_of(m, *data()).backward()
                if m is twin:
                    clip_grad_agc_([p for n, p in m.named_parameters() if n != "4.weight"])
                o.step()
        assert_same(model, twin, rtol=0)

    def test_weight_decay_and_momentum_come_after(self) -> None:
        model = net()
        before = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.5)
        attach_agc(optimizer, model, clipping=1e-9, exclude=None)
        loss_of(model, *data()).backward()
        optimizer.step()
        for p, q in zip(model.parameters(), before.parameters(), strict=True):
            torch.testing.assert_close(p, 0.5 * q, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("by_keyword", [True, False])
    def test_every_call_of_a_closure_is_clipped(self, by_keyword: bool) -> None:
        model = net()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, history_size=2)
        handle = attach_agc(optimizer, model, clipping=1e-3, exclude=None)
        ratios: list[float] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, *data())
            loss.backward()
            return loss

        gather = optimizer._gather_flat_grad

        def spy() -> Tensor:  # what the optimizer uses
            ratios.extend((p.grad.norm() / p.norm()).item() for p in model.parameters() if p.ndim > 1)  # pyright: ignore
            return gather()

        optimizer._gather_flat_grad = spy  # pyright: ignore
        optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
        assert len(ratios) >= 4
        assert max(ratios) < 1.001e-3
        assert handle.stats.steps == len(ratios) // 2

    def test_parameters_added_and_unfrozen_later(self) -> None:
        model = net()
        model[0].requires_grad_(False)
        optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
        handle = attach_agc(optimizer, model)
        loss_of(model, *data()).backward()
        optimizer.step()
        assert set(handle.stats.per_parameter()) == {"4.bias"}
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": list(model[0].parameters())})
        loss_of(model, *data()).backward()
        optimizer.step()
        assert set(handle.stats.per_parameter()) == {"0.weight", "0.bias", "4.bias"}

    def test_a_model_cast_on_the_way(self) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        handle = attach_agc(optimizer, model, exclude=None)
        fractions = []
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model.to(dtype)
            loss_of(model, data()[0].to(dtype), data()[1]).backward()
            optimizer.step()
            fractions.append(float(handle.stats.last))  # pyright: ignore
            optimizer.zero_grad()
        assert fractions[0] > 0
        assert fractions == pytest.approx([fractions[0]] * 3)

    def test_only_the_models_parameters(self) -> None:
        model, other = net(), parameter_with_gradient()
        optimizer = torch.optim.SGD([*model.parameters(), other], lr=1.0)
        attach_agc(optimizer, model)
        optimizer.step()
        assert other.tolist() == [-4.0]

    def test_refused(self) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(UserError, match="none of the model's parameters"):
            attach_agc(optimizer, net())
        with pytest.raises(UserError, match="the optimizer that it wraps"):
            attach_agc(Lookahead(optimizer), model)  # its own step hooks are never run
        with pytest.raises(UserError, match=r"expected a torch.optim.Optimizer"):
            attach_agc(model, model)  # pyright: ignore
        assert not optimizer._optimizer_step_pre_hooks

    def test_remove(self) -> None:
        model, twin = net(), net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        attach_agc(optimizer, model).remove()
        loss_of(model, *data()).backward()
        optimizer.step()
        loss_of(twin, *data()).backward()
        torch.optim.SGD(twin.parameters(), lr=0.5).step()
        assert_same(model, twin, rtol=0)


def parameter_with_gradient() -> nn.Parameter:
    p = nn.Parameter(torch.tensor([1.0]))
    p.grad = torch.tensor([5.0])
    return p


def test_accumulation_clips_the_sum_once() -> None:
    model = net()
    expected = by_hand(model, lr=0.5, steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_agc(optimizer, model)
    for _ in range(2):
        optimizer.zero_grad()
        for x, y in zip(*(part.split(2) for part in data()), strict=True):
            (loss_of(model, x, y) / 4).backward()
        optimizer.step()
    assert_same(model, expected)
    assert handle.stats.steps == 2


class TestScaler:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("unscale", [False, True])
    def test_the_scale_does_not_matter(self, fused: bool, unscale: bool) -> None:
        model = net()
        expected = by_hand(model, lr=0.5, steps=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # pyright: ignore
        handle = attach_agc(optimizer, model)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, *data())).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert_same(model, expected)
        assert handle.stats.steps == 3
        assert 0 < handle.stats.fraction <= 1

    @pytest.mark.parametrize("fused", [False, True])
    def test_an_overflow_is_still_skipped(self, fused: bool) -> None:
        model = net()
        before = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)  # pyright: ignore
        attach_agc(optimizer, model)
        scaler.scale(loss_of(model, *data())).backward()
        model[0].weight.grad[0, 0, 0, 0] = torch.inf  # pyright: ignore
        scaler.step(optimizer)
        scaler.update()
        assert_same(model, before, rtol=0)
        assert scaler.get_scale() == 2.0**11


class TestStats:
    def test_counts(self) -> None:
        model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2))
        nn.init.ones_(model[0].weight)  # pyright: ignore
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        handle = attach_agc(optimizer, model)
        stats = handle.stats
        assert stats.last is None
        assert stats.fraction == 0
        for grad in ([[1.0, 1], [0, 0], [torch.inf, 0]], [[0.0, 0], [0, 0], [0, 0]]):
            model[0].weight.grad = torch.tensor(grad)
            model[1].bias.grad = torch.zeros(2)
            optimizer.step()
        assert stats.steps == 2
        assert stats.per_parameter() == {"0.weight": pytest.approx(1 / 6), "1.bias": 0.0}
        assert stats.nonfinite_per_parameter() == {"0.weight": 1, "1.bias": 0}
        assert stats.nonfinite == 1
        assert stats.fraction == pytest.approx(1 / 8)
        assert stats.last == 0
        stats.reset()
        assert (stats.steps, stats.per_parameter()) == (0, {})

    def test_clipping_can_be_changed_on_the_way(self) -> None:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = attach_agc(optimizer, model, exclude=None)
        loss_of(model, *data()).backward()
        handle.clipping = 1e6
        optimizer.step()
        assert handle.stats.last == 0
        handle.clipping = 1e-6
        optimizer.step()
        assert handle.stats.last == 1


def test_the_wrapped_model_is_the_model() -> None:
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.5)  # pyright: ignore
    handle = attach_agc(optimizer, compiled)  # pyright: ignore
    assert handle.excluded == ("4.weight",)


def test_a_model_that_changes_its_type_between_steps() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_agc(optimizer, model, clipping=1e-6, exclude=None)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        model(torch.ones(3, 4, dtype=dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert handle.stats.steps == 4
    assert float(handle.stats.fraction) > 0.5
    assert handle.stats.last is not None


def test_where_nothing_clips_no_gradient_is_written() -> None:
    model = nn.Linear(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_agc(optimizer, model, clipping=1e6, exclude=None)
    model(torch.ones(3, 4)).sum().backward()
    assert model.weight.grad is not None
    version = model.weight.grad._version
    optimizer.step()
    assert model.weight.grad._version == version
    assert handle.stats.per_parameter() == {"weight": 0.0, "bias": 0.0}
    model.weight.grad[0, 0] = float("inf")
    optimizer.step()
    assert handle.stats.nonfinite_per_parameter() == {"weight": 1, "bias": 0}
