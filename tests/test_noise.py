"""Dropout, stochastic depth and the like: constants that are right for training, and the report that sees it."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import timm.layers
import torch
import torch.nn.functional as F
import torchvision.ops
from conversion_nets import average_channel_variance
from soak import thinned
from torch import Tensor, nn

import nfnets
from nfnets.convert import convert, plan
from nfnets.init import lsuv_
from nfnets.noise import keyed
from nfnets.signal import assert_signal, profile
from nfnets.trace import trace


class Functional(nn.Module):
    """What many forwards write instead of a module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Channels(nn.Module):
    """Masks that NumPy draws, from its global generator, as FractalNet's are in pytorchcv."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = np.random.binomial(1, 0.5, (*x.shape[:2], 1, 1))  # noqa: NPY002
        return x * torch.from_numpy(mask / 0.5).to(x)


class Own(nn.Module):
    """Masks from a generator that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (torch.rand(x.shape, generator=self.generator) < 0.5) / 0.5


NOISE: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "in place": lambda: nn.Dropout(0.5, inplace=True),
    "channels": lambda: nn.Dropout2d(0.5),
    "alpha": lambda: nn.AlphaDropout(0.5),
    "feature alpha": lambda: nn.FeatureAlphaDropout(0.5),
    "block, timm": lambda: timm.layers.DropBlock2d(0.4, 3),
    "block, torchvision": lambda: torchvision.ops.DropBlock2d(0.4, 3),
    "functional": Functional,
    "numpy": Channels,
    "own generator": Own,
}


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def chain(noise: Callable[[], nn.Module], layers: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    widths = (3, *[24] * layers)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ELU(), noise())
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.Conv2d(24, 5, 1))


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def in_training(
    model: nn.Module, x: Tensor, path: str, size: Callable[[Tensor], Tensor], passes: int = 12
) -> float:
    """A size of a layer's output, averaged over masks of training: by brute force."""
    seen: list[float] = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(float(size(out))))
    was = model.training
    model.train()
    for seed in range(passes):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        with torch.no_grad():
            model(x.clone())
    model.train(was)
    handle.remove()
    return sum(seen) / len(seen)


@pytest.mark.parametrize(("noise", "training"), thinned(NOISE, [True, False], 2))
def test_every_layer_has_unit_variance_in_training(noise: str, training: bool) -> None:
    """With dropout off the last of five layers would be at 2⁴ times the variance, and at a share in evaluation."""
    model = chain(NOISE[noise]).train(training)
    converted = convert(model, images())
    assert converted.training is training
    for path in ("1.1", "4.1"):
        # Without it: 2 and 16. Masks that all channels share are coarse, on 32 samples.
        assert in_training(converted, images(), path, average_channel_variance) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    ("method", "size", "options"),
    [
        ("nf", average_channel_variance, {"channelwise": False}),
        ("fixed_variance", mean_square, {}),
        ("fixed_variance", mean_square, {"measure": False}),
        ("lsuv", lambda out: out.var(), {}),
    ],
)
def test_every_method_that_measures(
    method: str, size: Callable[[Tensor], Tensor], options: dict[str, bool]
) -> None:
    converted = convert(chain(nn.Dropout), images(), method=method, **options)
    # Bookkeeping takes positions for independent, and knows nothing of these images.
    close = 0.5 if "measure" in options else 0.1
    assert in_training(converted, images(), "4.1", size) == pytest.approx(1, rel=close)


def test_eight_layers_start_as_batch_norm_does_and_evaluate_as_it_does() -> None:
    """The net of the report: 22.4 in training where BatchNorm has 0.93."""

    def features(net: nn.Sequential) -> float:
        with torch.no_grad():
            return float(net[:-1](x).std())

    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5)]
    model, x = nn.Sequential(*layers, nn.Linear(64, 10)), torch.randn(64, 64)
    converted = convert(model, x)
    assert 0.7 < features(converted) / features(model) < 1.5
    with torch.no_grad():
        for _ in range(200):  # running statistics
            model(x)
    model.eval(), converted.eval()
    assert 1 / 4 < features(converted) / features(model) < 3


def _centred(converted: nn.Module) -> list[str]:
    """Layers that start with channels set one by one: their gains are not all 1 any more."""
    gains = [(n, p) for n, p in converted.named_parameters() if n.endswith("gain")]
    return [n.removesuffix(".gain") for n, p in gains if bool((p != 1).any())]


@pytest.mark.parametrize("noise", [lambda: nn.Dropout(0.5), lambda: nn.Dropout2d(0.1), Functional])
def test_channels_are_left_alone_behind_dropout(noise: Callable[[], nn.Module]) -> None:
    """Training takes away means that masks make noise of, and biases that cancel them would be wrong then."""

    def block(width: int) -> list[nn.Module]:
        return [nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]

    head = [nn.Flatten(), nn.Linear(8 * 64, 4, bias=False)]
    behind = nn.Sequential(*block(3), noise(), *block(8), *block(8), *head)
    assert _centred(convert(behind, images())) == ["0"]
    between = nn.Sequential(*block(3), *block(8), noise(), *head)  # a classifier's dropout
    assert _centred(convert(between, images())) == ["0", "3"]
    off = nn.Sequential(*block(3), nn.Dropout(0.0), *block(8), *head)
    assert _centred(convert(off, images())) == ["0", "4"]


def _masked(own: bool, noise: nn.Module) -> nn.Sequential:
    """Two layers behind noise, with biases of their own or without."""
    behind = [nn.Conv2d(8, 8, 3, padding=1, bias=own), nn.BatchNorm2d(8), nn.ELU()]
    again = [nn.Conv2d(8, 6, 1, bias=own), nn.BatchNorm2d(6)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ELU(), noise, *behind, *again)


def test_a_bias_gained_behind_dropout_starts_as_torch_draws_one() -> None:
    """U(±1/√N), the same every time and another in each layer: clipping holds zeros where they are."""
    found = convert(_masked(False, nn.Dropout(0.5)), images())
    layers = {"4": (found[4].bias, 72), "7": (found[7].bias, 8)}
    for bias, fan_in in layers.values():
        assert bias.abs().amax() <= fan_in**-0.5
        assert bias.std() > 0.3 * fan_in**-0.5
        assert bias.requires_grad
    assert not torch.allclose(found[4].bias[:6] * 72**0.5, found[7].bias * 8**0.5)
    torch.manual_seed(4)
    model = _masked(False, nn.Dropout2d(0.1))
    before = torch.get_rng_state()
    assert torch.equal(convert(model, images())[4].bias, found[4].bias)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("noise", [nn.Identity(), nn.Dropout(0.0)])
def test_biases_stay_zero_where_nothing_masks(noise: nn.Module) -> None:
    found = convert(_masked(False, noise), images(), channelwise=False)
    assert not found[4].bias.any()
    assert not found[7].bias.any()


def test_a_layers_own_bias_stays_behind_dropout() -> None:
    model = _masked(True, nn.Dropout(0.5))
    found = convert(model, images())
    assert torch.equal(found[4].bias, model[4].bias)
    assert torch.equal(found[7].bias, model[7].bias)


@pytest.mark.parametrize("kind", ["row", "batch", "timm", "wraps"])
def test_stochastic_depth_counts_in_what_reads_the_stream(kind: str) -> None:
    """E[(mask / (1 − p))²] = 1/(1 − p) of each branch: also where a whole batch is dropped at once."""
    p = 0.5

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            branch = nn.Sequential(nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1))
            if kind == "wraps":
                from timm.models.efficientvit_msra import ResidualDrop

                self.body: nn.Module = ResidualDrop(branch, drop=p)
                return
            drop = timm.layers.DropPath(p) if kind == "timm" else torchvision.ops.StochasticDepth(p, kind)
            self.body = nn.Sequential(branch, drop)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if kind == "wraps" else x + self.body(x)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), *(Block() for _ in range(4)), nn.BatchNorm2d(24), nn.Conv2d(24, 5, 1)
    )
    modes = [getattr(module, "mode", None) for module in model.modules()]
    converted = convert(model, images(64), alpha=1.0, channelwise=False)
    assert [getattr(module, "mode", None) for module in model.modules()] == modes
    assert [m.mode for m in converted.modules() if hasattr(m, "mode")] == [m for m in modes if m]
    passes = 100 if kind == "batch" else 24
    assert in_training(converted, images(64), "5", average_channel_variance, passes) == pytest.approx(
        1, rel=0.15
    )


def test_dropout_between_a_layer_and_its_norm_layer_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.Dropout(0.75), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)
    )
    x = torch.randn(512, 16)
    for method, size in (("nf", average_channel_variance), ("lsuv", lambda out: out.var())):
        converted = convert(model, x, method=method)
        assert in_training(converted, x, "2", size) == pytest.approx(1, rel=0.1), method


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_drawn_from_the_users_generators(training: bool) -> None:
    model = chain(lambda: nn.Sequential(nn.Dropout(0.1), Channels(), Own())).train(training)
    own = [m.generator.get_state() for m in model.modules() if isinstance(m, Own)]

    def converted(seed: int, call: Callable[..., object]) -> object:
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
        found = call(model, images())
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
        assert random.getstate() == before[2]
        return found

    first, second = (converted(seed, convert) for seed in (1, 2))
    assert isinstance(first, nn.Module)
    assert isinstance(second, nn.Module)
    for key, value in first.state_dict().items():  # and the masks are the same every time
        assert torch.equal(value, second.state_dict()[key]), key
    converted(3, plan), converted(4, lambda net, x: profile(net, x, training=True))
    now = [m.generator.get_state() for m in model.modules() if isinstance(m, Own)]
    assert all(map(torch.equal, own, now))


@pytest.mark.parametrize("method", ["nf", "fixed_variance", "lsuv"])
def test_dropout_that_is_off_changes_nothing(method: str) -> None:
    """At p = 0 the constants are those of a net without dropout, bit by bit, in both modes."""
    states = []
    for noise in (nn.Identity, lambda: nn.Dropout(0.0), lambda: nn.Dropout2d(0.0)):
        for training in (True, False):
            torch.manual_seed(0)
            states.append(convert(chain(noise).train(training), images(), method=method).state_dict())
    assert all(torch.equal(states[0][key], other[key]) for other in states for key in states[0])


def test_a_model_in_evaluation_mode_gets_the_constants_of_training() -> None:
    model = chain(nn.Dropout)
    trained, evaluated = convert(model, images()), convert(model.eval(), images())
    assert not any(module.training for module in evaluated.modules())
    for key, value in trained.state_dict().items():
        assert torch.equal(value, evaluated.state_dict()[key]), key


def test_a_forward_that_evaluates_only_is_measured_in_evaluation() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = chain(nn.Dropout)

        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            if self.training and targets is None:
                raise ValueError("targets are wanted in training")
            return self.body(x)

    converted = convert(Detector().eval(), images())
    converted = converted.body[:-1].eval()
    with torch.no_grad():
        assert float(average_channel_variance(converted[:4](images()))) > 0.3  # ELU leaves half
    report = profile(Detector().eval(), images())
    assert any("training_var was not measured" in note for note in report.notes)
    with pytest.raises(nfnets.errors.UserError, match="targets are wanted"):
        profile(Detector().eval(), images(), training=True)


def test_lsuv_counts_what_dropout_leaves() -> None:
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 64), nn.Dropout(0.5))
    x = torch.randn(256, 32)
    lsuv_(model, x)
    assert in_training(model, x, "3", lambda out: out.std()) == pytest.approx(1, rel=0.05)
    lsuv_(model.eval(), x)  # its mode is the caller's choice
    with torch.no_grad():
        assert float(model[:4](x).std()) == pytest.approx(1, rel=1e-3)


def too_small(noise: Callable[..., nn.Module] = nn.Dropout) -> nn.Module:
    """Constants measured without dropout, which then comes on."""
    model = convert(chain(lambda: noise(0.0), layers=6), images())
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.5
    return model


def test_the_report_sees_growth_that_evaluation_hides() -> None:
    sick, bn, well = too_small(), chain(nn.Dropout, 6), convert(chain(nn.Dropout, 6), images())
    report = profile({"sick": sick, "bn": bn, "well": well}, images())
    verdict = report.check()
    assert verdict.broken == ("noise",)
    assert {finding.model for finding in verdict.findings} == {"sick"}
    assert "5.0" in [finding.name for finding in verdict.findings]
    measured = in_training(sick, images(), "5.0", average_channel_variance)
    found = report.select(model="sick")
    assert next(p.training_var for p in found if p.name == "5.0") == pytest.approx(measured, rel=0.15)
    with pytest.raises(AssertionError, match="noise: the variance grows in training"):
        assert_signal(sick, images())
    assert "in training" in str(report)


def test_the_report_is_otherwise_the_one_without_dropout() -> None:
    model = too_small()
    with_it, without = profile(model, images()), profile(model, images(), training=False)
    assert all(p.training_var is None for p in without.points)
    for p, q in zip(with_it.points, without.points, strict=True):
        assert p.training_var is not None
        assert (p.var, p.cosine) == (q.var, q.cosine)
    assert without.check()


def test_functional_dropout_is_seen_when_asked_for() -> None:
    model = convert(chain(nn.Identity, 6), images())
    for block in list(model)[:-1]:
        block[3] = Functional()
    assert profile(model, images()).check()
    assert profile(model, images(), training=True).check().broken == ("noise",)
    assert profile(model.eval(), images(), training=True).check().broken == ("noise",)
    assert not any(module.training for module in model.modules())


def test_a_probe_predicts_what_dropout_adds() -> None:
    """E[(x·mask)²] = E[x²] / (1 − p): the theory of a net in training knows it."""
    model = nn.Sequential(nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 64, 1, bias=False))
    x = torch.randn(64, 8, 8, 8)
    with nfnets.probe(model) as probe:
        model(x)
    found = probe.report()["2"]
    assert found.predicted_var == pytest.approx(found.var, rel=0.05)


def test_keyed_draws_are_the_same_and_leave_no_trace() -> None:
    model = nn.Sequential(Own(), torchvision.ops.StochasticDepth(0.5, "batch")).train()
    before = copy.deepcopy(model[0].generator.get_state()), torch.get_rng_state()
    draws = []
    for _ in range(2):
        with keyed(model) as drawn:
            assert (drawn(), model[1].mode) == (False, "row")
            draws.append(model(torch.ones(64, 3)))
            assert drawn()
    assert torch.equal(*draws)
    assert model[1].mode == "batch"
    assert torch.equal(before[0], model[0].generator.get_state())
    assert torch.equal(before[1], torch.get_rng_state())
    with contextlib.suppress(KeyError), keyed(model):
        torch.rand(1)
        raise KeyError
    assert torch.equal(before[1], torch.get_rng_state())


def test_a_graph_is_traced_with_noise_as_ever() -> None:
    """The tracer changes nothing of what a pass does; keys are for what is measured."""
    model = chain(nn.Dropout)
    torch.manual_seed(3)
    expected = model(images())
    torch.manual_seed(3)
    seen: list[Tensor] = []
    trace(model, images(), visit=lambda node, out: seen.append(out))
    assert torch.equal(seen[-1], expected)
