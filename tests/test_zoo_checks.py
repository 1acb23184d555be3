"""The zoo's checks: each must fail on a conversion that is broken in its way, and pass on one that is not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conversion_nets import NETS, PreActivation
from torch import Tensor, nn

from benchmarks.zoo import checks, folding
from benchmarks.zoo.build import Entry
from benchmarks.zoo.measure import heads_of, joins_of, measure
from benchmarks.zoo.run import COMPILED, reference, run_method
from nfnets.convert import convert

ENTRY = Entry("pre", "timm", "none", "classification", 1, 7, (3, 16, 16))
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class Net(nn.Module):
    """Small, with one of everything that a check looks at."""

    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.BatchNorm2d(8)) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm()
        self.blocks = nn.Sequential(Block(norm()), Block(norm()))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Net()
    reference(model, (X,))
    return model, convert(model, X, method="nf")


def wrap(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Change what a module puts out."""
    module.register_forward_hook(lambda m, a, out: change(out))


def signals(model: nn.Module, converted: nn.Module, method: str = "nf") -> checks.Verdict:
    return checks.signal(measure(model, (X,)), measure(converted, (X,)), converted, method)


def test_a_good_conversion_passes_everything() -> None:
    torch.manual_seed(0)
    model = Net()
    before = reference(model, (X,))
    for method in ("nf", "fold"):
        outcome, reason, found = run_method(ENTRY, model, (X,), method, before)
        assert (outcome, reason) == ("converted", "")
        assert [f"{name}: {v.detail}" for name, v in found.items() if not v.passed] == []
        same = {"same function 32", "same function 64"} if method == "fold" else set()
        names = {"norm gone", "finite", "gradients", "independent", "signal", "names", "copies"}
        assert set(found) == names | same


def test_points_are_those_of_the_graph() -> None:
    seen = measure(Net(), (X,))
    assert list(joins_of(seen.graph)) == ["blocks.0#0", "blocks.1#0"]
    assert list(heads_of(seen.graph)) == ["fc"]
    assert set(seen.gradients) == {name for name, _ in Net().named_parameters()}
    assert seen.finite


def test_the_reference_keeps_the_statistics_that_it_normalized_by() -> None:
    model = Net()
    seen = reference(model, (X,))
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X)[0], seen.sample.outputs[0])


def test_measured_signal_is_the_mean_square() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    seen = measure(model, (X,))
    (node,) = seen.graph.calls("0")
    assert seen.powers[node.index] == pytest.approx(float(model[0](X).detach().square().mean()), rel=1e-5)


# Each check fails


def test_a_norm_layer_that_stayed(pair: tuple[nn.Module, nn.Module]) -> None:
    model, converted = pair
    assert checks.norm_gone(converted).passed
    converted.blocks[1].norm = nn.SyncBatchNorm(8)  # type: ignore[index,union-attr]
    assert checks.norm_gone(converted).detail == "left: blocks.1.norm (1 in all)"
    assert not checks.norm_gone(model).passed


@pytest.mark.parametrize(
    "touch",
    [
        lambda m: m.norm.running_var.mul_(1 + 1e-7),
        lambda m: m.stem.weight.data.view(-1)[0].add_(1e-7),
        lambda m: m.blocks.eval(),
        lambda m: m.fc.requires_grad_(False),
        lambda m: setattr(m, "norm", nn.Identity()),
        lambda m: m.fc.double(),
    ],
)
def test_an_original_that_was_touched(touch: Callable[[nn.Module], object]) -> None:
    model = Net()
    before = checks.fingerprint(model)
    assert checks.original_unchanged(before, model).passed
    touch(model)
    assert not checks.original_unchanged(before, model).passed


class Other(Net):
    pass


def _renamed(m: nn.Module) -> None:
    m.head = m.fc
    del m.fc


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, "lost modules: fc"),
        (lambda m: m.add_module("extra", nn.ReLU()), "new modules: extra"),
        (lambda m: setattr(m, "__class__", Other), "class Other, was Net"),
        (
            lambda m: setattr(m.stem, "weight", m.stem._parameters.pop("weight").data),
            "lost state_dict keys: stem.weight",
        ),
    ],
)
def test_names_that_changed(
    pair: tuple[nn.Module, nn.Module], change: Callable[[nn.Module], None], message: str
) -> None:
    model, converted = pair
    assert checks.names_kept(model, converted).passed
    change(converted)
    verdict = checks.names_kept(model, converted)
    assert not verdict.passed
    assert verdict.detail.startswith(message)


def test_what_is_not_finite(pair: tuple[nn.Module, nn.Module]) -> None:
    _, converted = pair
    assert checks.finite(measure(converted, (X,))).passed
    wrap(converted.stem, lambda out: out * float("inf"))  # type: ignore[arg-type]
    assert not checks.finite(measure(converted, (X,))).passed


def test_a_gradient_that_is_infinite_only_on_the_way_back(pair: tuple[nn.Module, nn.Module]) -> None:
    _, converted = pair
    wrap(converted.stem, lambda out: out + (out * 0).abs().sqrt())  # type: ignore[arg-type]
    after = measure(converted, (X,))
    assert all(bool(t.isfinite().all()) for t in after.sample.outputs)
    assert checks.finite(after).detail == "gradient of stem.bias (3 in all)"


def test_gradients_that_are_missing_or_zero(pair: tuple[nn.Module, nn.Module]) -> None:
    model, converted = pair
    before = measure(model, (X,))
    assert checks.gradients(before, measure(converted, (X,)), converted, "nf").passed
    detached = copy.deepcopy(converted)
    wrap(detached.blocks[0].conv, lambda out: out.detach())  # type: ignore[index]
    verdict = checks.gradients(before, measure(detached, (X,)), detached, "nf")
    assert verdict.detail.startswith("none for blocks.0.conv.weight")
    silent = copy.deepcopy(converted)
    wrap(silent.blocks[0], lambda out: out * 0)  # type: ignore[index]
    verdict = checks.gradients(before, measure(silent, (X,)), silent, "nf")
    assert verdict.detail.startswith("zero for ")
    assert checks.gradients(
        before, measure(silent, (X,)), silent, "skipinit"
    ).passed  # zero at first by definition


def test_a_new_parameter_that_is_not_trained(pair: tuple[nn.Module, nn.Module]) -> None:
    model, converted = pair
    before = measure(model, (X,))

    class Scaled(nn.Module):
        def __init__(self, used: bool) -> None:
            super().__init__()
            self.used, self.scale = used, nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.detach() if self.used else x

    for used in (False, True):  # one that no output reads needs no gradient
        converted.norm = Scaled(used)
        verdict = checks.gradients(before, measure(converted, (X,)), converted, "nf")
        assert verdict.passed is not used
    assert verdict.detail == "none for norm.scale (1 in all)"


class Leak(nn.Module):
    """Lets a little of the neighbors through: by value, by gradient only, or by their number only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0, keepdim=True)
        if self.kind == "value":
            return x - 0.01 * mean.detach()
        return x + 0.01 * (mean - mean.detach()) if self.kind == "gradient" else x * (1 + 0.01 * len(x))


@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_dependence_on_neighbors(pair: tuple[nn.Module, nn.Module], kind: str) -> None:
    _, converted = pair
    good = checks.independence_and_copies(ENTRY, converted, (X,), measure(converted, (X,)).sample, Net())
    assert good["independent"].passed, good
    assert good["copies"].passed, good
    converted.norm = nn.Sequential(Leak(kind))
    found = checks.independence_and_copies(ENTRY, converted, (X,), measure(converted, (X,)).sample, Net())
    assert not found["independent"].passed
    assert found["copies"].passed


def test_batch_norm_itself_depends_on_neighbors() -> None:
    model = Net()
    found = checks.independence_and_copies(ENTRY, model, (X,), measure(model, (X,)).sample, Net())
    assert not found["independent"].passed


class Forgetful(nn.Module):
    """Holds a constant that one way of copying loses."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.factor = how, 2.0
        if how == "lambda":
            self.function = lambda x: x
        if how == "state":
            self.register_buffer("kept", torch.full((), 2.0), persistent=False)
            self.register_load_state_dict_post_hook(_resets)

    def __deepcopy__(self, memo: dict[int, object]) -> Forgetful:
        new = Forgetful(self.how)
        new.factor = 1.0 if self.how == "deepcopy" else self.factor
        return new

    def __reduce__(self) -> object:
        return (_forgetting, ()) if self.how == "pickle" else super().__reduce__()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _forgetting() -> Forgetful:
    new = Forgetful("")
    new.factor = 1.0
    return new


def _resets(module: Forgetful, keys: object) -> None:
    module.factor = 1.0


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "lambda", "state"])
def test_copies_that_lose_something(pair: tuple[nn.Module, nn.Module], how: str) -> None:
    _, converted = pair
    converted.norm = nn.Sequential(Forgetful(how))
    found = checks.independence_and_copies(ENTRY, converted, (X,), measure(converted, (X,)).sample, Net())
    assert not found["copies"].passed
    assert found["independent"].passed


@pytest.mark.parametrize(("factor", "fine"), [(0.2, False), (0.3, True), (3.5, True), (4.5, False)])
@pytest.mark.parametrize("where", ["stem", "fc"])
def test_signal_beyond_a_factor_four(factor: float, fine: bool, where: str) -> None:
    model = Net(nn.Identity)
    scaled = copy.deepcopy(model)
    wrap(scaled.get_submodule(where), lambda out: out * factor)
    if where == "fc":
        nn.init.zeros_(model.fc.bias)
        nn.init.zeros_(scaled.fc.bias)  # type: ignore[arg-type]
    verdict = signals(model, scaled)
    assert verdict.passed is fine, verdict


def test_a_residual_point_that_is_gone() -> None:
    class Cut(Net):
        def forward(self, x: Tensor) -> Tensor:
            out = self.norm(self.stem(x))
            return self.fc(self.blocks[0].conv(out).mean((2, 3)))  # type: ignore[operator]

    model, cut = Net(), Cut()
    cut.load_state_dict(model.state_dict())
    assert "inf× at blocks" in signals(model, cut).detail


def test_a_classifier_at_zero_is_judged_by_what_it_reads() -> None:
    model = Net(nn.Identity)
    zero = copy.deepcopy(model)
    nn.init.zeros_(zero.fc.weight)  # type: ignore[arg-type]
    nn.init.zeros_(zero.fc.bias)  # type: ignore[arg-type]
    assert signals(model, zero, "fixup").passed
    with torch.no_grad():
        zero.stem.weight.mul_(10)  # type: ignore[union-attr,operator]
    assert not signals(model, zero, "fixup").passed
    dead = copy.deepcopy(model)
    wrap(dead.fc, lambda out: out)
    with torch.no_grad():
        dead.stem.weight.zero_()  # type: ignore[union-attr,operator]
    assert not signals(model, dead, "nf").passed


class Eager(nn.Module):
    """Says something else when compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.01 if torch.compiler.is_compiling() else x


@pytest.mark.filterwarnings("ignore")
def test_compilation_that_changes_the_output(pair: tuple[nn.Module, nn.Module]) -> None:
    _, converted = pair
    assert checks.compiles(converted, (X,), "eager").passed
    converted.norm = nn.Sequential(Eager())
    assert not checks.compiles(converted, (X,), "eager").passed


def test_compiled_sample_is_in_the_zoo() -> None:
    from benchmarks.zoo.catalog import load

    assert {entry.key for entry in load()} >= COMPILED


# fold


def test_randomized_statistics_hold_what_they_promise() -> None:
    norm = nn.BatchNorm2d(4000)
    x = torch.randn(2, 4000, 2, 2)
    folding.randomize_(norm, x, torch.Generator().manual_seed(0))
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    assert (variance == 0).any()
    assert ((variance > 0) & (variance < 1e-38)).any()
    ordinary = variance[variance > 1e-38]
    assert 1e-6 <= float(ordinary.min()) < 1e-5
    assert 1e3 < float(ordinary.max()) <= 1e4
    assert float(mean.abs().min()) < 1e-5
    assert float(mean.abs().max()) > 1e3
    assert (norm.weight == 0).any()
    assert (norm.weight < 0).any()
    level = (norm.eval()(x) - norm.bias.reshape(1, -1, 1, 1)).detach()
    rms = level.square().mean((0, 2, 3)).sqrt()[norm.weight.detach() != 0]
    assert 0.45 < float(rms.min()) <= float(rms.max()) < 1.55


@pytest.mark.parametrize("name", ["pre-activation", "dense", "mobile", "fused", "decoder"])
def test_fold_keeps_the_function(name: str) -> None:
    found = folding.same_function(ENTRY, NETS[name](), (torch.randn(4, 3, 32, 32),))
    assert [f"{k}: {v.detail}" for k, v in found.items() if not v.passed] == []
    assert list(found) == ["same function 32", "same function 64"]


def test_a_fold_that_forgets_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def sloppy(model: nn.Module, *inputs: object, method: str, inplace: bool) -> nn.Module:
        folded = convert(model, *inputs, method=method, inplace=inplace)
        folded.stem.weight.data.mul_(1 + 1e-6)  # type: ignore[union-attr,operator]
        return folded

    monkeypatch.setattr(folding, "convert", sloppy)
    found = folding.same_function(ENTRY, PreActivation(), (X,))
    assert found["same function 32"].passed  # as good as fp32 can tell
    assert not found["same function 64"].passed
