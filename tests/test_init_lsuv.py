"""LSUV in one forward pass: exactness against the loop, and every defect of PyPI `lsuv` 0.3.0 as a test."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import nfnets.models.cifar_resnet as cifar
from nfnets.errors import UserError
from nfnets.init import lsuv_
from nfnets.layers import ScaledStdConv2d, ScaledStdConvTranspose2d, ScaledStdLinear


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def stds(model: nn.Module, *inputs: Tensor) -> dict[str, float]:
    """Each weight layer's output std in one ordinary forward pass, taken before anything can overwrite it."""
    found: dict[str, float] = {}

    def hook(path: str):
        def measure(module: nn.Module, args: object, output: Tensor) -> None:
            found.setdefault(path, output.double().std().item())

        return measure

    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    handles = [m.register_forward_hook(hook(p)) for p, m in model.named_modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return found


def assert_unit(model: nn.Module, *inputs: Tensor, target: float = 1.0, tolerance: float = 1e-5) -> None:
    for path, std in stds(model, *inputs).items():
        assert std == pytest.approx(target, rel=tolerance), path


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def vgg(depth: int, width: int = 16, inplace: bool = True, bias: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(3 if index == 0 else width, width, 3, padding=1, bias=bias), nn.ReLU(inplace)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10, bias=bias))


class NormFree(nn.Module):
    """Residual, with the in-place ReLU and `+=` that corrupt the incumbent's statistics."""

    def __init__(self, blocks: int = 3, width: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(blocks))
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            out = second(self.relu(first(x)))
            out += x
            x = self.relu(out)
        return self.fc(x.mean((2, 3)))


def test_exactly_one_forward() -> None:
    model, calls = vgg(6), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    layers = []
    for module in model:
        module.register_forward_pre_hook(lambda module, _: layers.append(module))
    lsuv_(model, torch.randn(4, 3, 8, 8))
    assert len(calls) == 1
    assert len(layers) == len(model)


@pytest.mark.parametrize("depth", [8, 32])
def test_equals_the_loop_of_forward_passes(depth: int) -> None:
    model, x = vgg(depth), torch.randn(8, 3, 8, 8)
    loop = copy.deepcopy(model)
    report = lsuv_(model, x, orthonormal=False)
    with torch.no_grad():
        for index, module in enumerate(loop):
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight /= loop[: index + 1](x).std()
    for ours, reference in zip(model.parameters(), loop.parameters(), strict=True):
        assert (ours - reference).norm() <= 5e-6 * reference.norm()
    assert report.paths("set") == tuple(str(i) for i, m in enumerate(model) if hasattr(m, "weight"))
    again = lsuv_(model, x, orthonormal=False)
    assert all(row.factor == pytest.approx(1, abs=1e-5) for row in again)


def test_matches_the_incumbent_where_it_is_right() -> None:
    lsuv = pytest.importorskip("lsuv")
    model, x = vgg(6, inplace=False), torch.randn(16, 3, 8, 8)
    theirs = copy.deepcopy(model)
    lsuv_(model, x, orthonormal=False)
    lsuv.lsuv_with_singlebatch(theirs, x, std_tol=1e-9, max_attempts=1, do_orthonorm=False, verbose=False)
    first, reference = model[0].weight, theirs[0].weight  # its later layers are hit by its second corrections
    assert (first - reference).norm() <= 1e-5 * reference.norm()


# The defects of the incumbent, initialization.md §2, in its order.


def test_inplace_operations_do_not_reach_the_statistics() -> None:
    model, x = NormFree(), torch.randn(32, 3, 8, 8)
    report = lsuv_(model, x)
    assert_unit(model, x)
    assert [row.path for row in report][:3] == ["stem", "first.0", "second.0"]


def test_every_correction_hits_its_own_layer() -> None:
    model, x = vgg(5), torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        for scale, module in zip(
            [1e-3, 1e3, 1e-3, 50, 0.1], [m for m in model if hasattr(m, "weight")], strict=False
        ):
            module.weight *= scale
    lsuv_(model, x, orthonormal=False)
    assert_unit(model, x)


@pytest.mark.parametrize("how", ["zero weight", "dead input", "constant output"])
def test_dead_outputs_are_skipped_and_reported(how: str) -> None:
    model, x = vgg(4, bias=True), torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        if how == "zero weight":
            model[2].weight.zero_()
            model[2].bias.zero_()
            model[0].bias.zero_()
        elif how == "dead input":
            model[0].bias.fill_(-1e4)
        else:
            model[2].weight.zero_()
    before = model[2].weight.clone()
    report = lsuv_(model, x, orthonormal=how != "dead input")
    assert report["2"].action == "skipped"
    assert "dead" in report["2"].reason
    assert "2" in report.paths("skipped")
    if how != "dead input":
        assert torch.equal(model[2].weight, before)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert "skipped" in str(report)


def test_non_finite_outputs_are_skipped_and_reported() -> None:
    model, x = vgg(3), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    before = model[4].weight.clone()
    report = lsuv_(model, x, orthonormal=False)
    assert report["0"].action == "set"
    assert [report[p].action for p in ("2", "4", "8")] == ["skipped"] * 3
    assert "finite" in report["2"].reason
    assert torch.equal(model[4].weight, before)


def test_execution_order_not_registration_order() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(8, 8, 3, bias=False)
            self.b = nn.Conv2d(8, 8, 3, bias=False)
            self.a = nn.Conv2d(3, 8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    model, x = Reversed(), 7 * torch.randn(8, 3, 12, 12)
    report = lsuv_(model, x)
    assert report.paths("set") == ("a", "b", "c")
    assert_unit(model, x)


def test_standardized_layers_are_scaled_by_their_gain() -> None:
    model = nn.Sequential(
        ScaledStdConv2d(3, 8, 3, scale=1.7, alpha=0.2),
        nn.ReLU(inplace=True),
        ScaledStdConvTranspose2d(8, 6, 3, groups=2),
        nn.Flatten(),
        ScaledStdLinear(6 * 64, 5),
    )
    with torch.no_grad():
        model[0].bias.normal_()
        model[4].bias.normal_(0, 0.3)
    x = torch.randn(64, 3, 8, 8)
    weights = [model[i].weight.clone() for i in (0, 2, 4)]
    lsuv_(model, x, orthonormal=False)
    assert_unit(model, x)
    assert all(torch.equal(model[i].weight, w) for i, w in zip((0, 2, 4), weights, strict=True))
    assert all(model[i].gain.std() == 0 for i in (0, 2, 4))


def test_timm_standardized_layers_too() -> None:
    from timm.layers.std_conv import ScaledStdConv2d as TimmConv

    model, x = (
        nn.Sequential(TimmConv(3, 8, 3), nn.ReLU(inplace=True), TimmConv(8, 8, 3)),
        torch.randn(8, 3, 8, 8),
    )
    lsuv_(model, x)
    assert_unit(model, x)


def test_a_layer_that_ignores_its_weight_scale_is_refused_and_nothing_is_changed() -> None:
    from timm.layers.std_conv import StdConv2d

    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), StdConv2d(8, 8, 3)), torch.randn(8, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"2 \(StdConv2d\) does not follow its weight"):
        lsuv_(model, x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    weight = model[2].weight.clone()
    assert lsuv_(model, x, orthonormal=False, strict=False).paths("refused") == ("2",)
    assert torch.equal(model[2].weight, weight)
    model[2].requires_grad_(False)
    assert lsuv_(model, x).paths("frozen") == ("2",)


@pytest.mark.parametrize("how", ["parametrization", "hook"])
def test_weight_norm_is_scaled_by_g(how: str) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3)]
    if how == "parametrization":
        parametrizations.weight_norm(layers[0])
        parametrizations.weight_norm(layers[2])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(layers[0])
    model, x = nn.Sequential(*layers), torch.randn(16, 3, 8, 8)
    report = lsuv_(model, x, orthonormal=False)
    assert_unit(model, x)
    assert report.paths("set") == ("0", "2")


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.orthogonal])
def test_other_parametrizations_are_refused_before_anything_is_changed(wrap) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), wrap(nn.Conv2d(8, 8, 1)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="2: its weight is parametrized by"):
        lsuv_(model, torch.randn(4, 3, 8, 8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    report = lsuv_(model, torch.randn(4, 3, 8, 8), strict=False)
    assert report["0"].action == "set"
    assert report["2"].action == "refused"


def test_device_and_dtype_stay() -> None:
    model = vgg(3).bfloat16()
    x = torch.randn(32, 3, 8, 8, dtype=torch.bfloat16)
    lsuv_(model, x)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.bfloat16)}
    assert_unit(model, x, tolerance=0.02)
    with pytest.raises(UserError, match="meta device"):
        lsuv_(vgg(2).to("meta"), torch.randn(1, 3, 8, 8, device="meta"))


def test_an_exception_leaves_no_hook_and_the_old_weights() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("boom")

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), Fails())
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="boom"):
        lsuv_(model, torch.randn(4, 3, 8, 8))
    assert hooks(model) == 0
    assert [m.training for m in model] == [True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_modes_buffers_gradients_and_random_state_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Dropout(0.5),
        nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)),
    )
    model[3].eval()
    buffers = copy.deepcopy(dict(model.named_buffers()))
    state = torch.get_rng_state()
    lsuv_(model, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), orthonormal=False)
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == [True, True, True, True, False, False, False]
    assert all(torch.equal(buffers[k], v) for k, v in model.named_buffers())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_batch_norm_nets_are_set_for_the_mode_they_train_in() -> None:
    model, x = cifar.CifarResNet(20), torch.randn(32, 3, 16, 16)
    lsuv_(model, x)
    assert_unit(copy.deepcopy(model).train(), x, tolerance=2e-5)


def test_dict_batches_keyword_arguments_and_several_inputs() -> None:
    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, batch: dict[str, Tensor], *, other: Tensor) -> dict[str, Tensor]:
            return {"out": self.a(batch["image"]) + self.b(other)}

    report = lsuv_(Takes(), {"image": torch.randn(4, 3, 8, 8)}, other=torch.randn(4, 3, 8, 8))
    assert report.paths("set") == ("a", "b")


def test_transformer_encoder() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(16, 10, 32)
    report = lsuv_(model, x)
    assert len(report.paths("set")) == 6
    again = lsuv_(model, x, orthonormal=False)
    assert all(row.std_before == pytest.approx(1, rel=1e-4) for row in again)
    assert model.training


# The rules of the single pass.


def test_biases_by_the_closed_form() -> None:
    model, x = vgg(5, bias=True), torch.randn(16, 3, 8, 8)
    with torch.no_grad():
        for module in model:
            if hasattr(module, "weight"):
                module.bias.normal_(0.3, 0.5)
    biases = [m.bias.clone() for m in model if hasattr(m, "weight")]
    lsuv_(model, x)
    assert_unit(model, x, tolerance=3e-6)
    kept = [m.bias for m in model if hasattr(m, "weight")]
    assert all(torch.equal(a, b) for a, b in zip(biases, kept, strict=True))


def test_a_bias_without_a_root_is_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-3.0, 3, -3, 3]))
    before = model[0].weight.clone()
    report = lsuv_(model, torch.randn(64, 3, 4, 4), orthonormal=False)
    assert report["0"].action == "skipped"
    assert "bias alone" in report["0"].reason
    assert torch.equal(model[0].weight, before)
    assert report["2"].action == "set"


def test_shared_modules_and_tied_weights_are_set_once() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Conv2d(3, 4, 3, bias=False)
            self.tied = nn.Conv2d(3, 4, 3, bias=False)
            self.tied.weight = self.shared.weight

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.shared(x) + self.shared(y) + self.tied(y)

    model, x, y = Siamese(), torch.randn(8, 3, 8, 8), 5 * torch.randn(8, 3, 8, 8)
    report = lsuv_(model, x, y)
    assert [(row.path, row.action) for row in report] == [
        ("shared", "set"),
        ("shared", "shared"),
        ("tied", "shared"),
    ]
    assert model.shared(x).std().item() == pytest.approx(1, rel=1e-5)
    assert report.rows[1].std == pytest.approx(model.shared(y).std().item(), rel=1e-4)


def test_frozen_layers_stay() -> None:
    model, x = vgg(3), torch.randn(8, 3, 8, 8)
    model[2].weight.requires_grad_(False)
    before = model[2].weight.clone()
    report = lsuv_(model, x)
    assert report.paths("frozen") == ("2",)
    assert torch.equal(model[2].weight, before)
    assert stds(model, x)["4"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, groups=4, bias=False),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, dilation=2, padding="same", padding_mode="circular"),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.Conv2d(8, 4, 1),
    ],
)
@pytest.mark.parametrize("per_channel", [False, True])
def test_kinds_of_convolutions(layer: nn.Module, per_channel: bool) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), copy.deepcopy(layer)), torch.randn(8, 3, 10, 10)
    report = lsuv_(model, x, per_channel=per_channel)
    out = model(x)
    if not per_channel:
        assert_unit(model, x)
        return
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(out.shape[1]), rtol=1e-5, atol=1e-5)
    if layer.bias is not None:
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), rtol=0, atol=2e-6)
        assert report["2"].channel_mean_sq < 1e-10


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank: int) -> None:
    conv, transposed = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
    model, x = (
        nn.Sequential(conv(2, 4, 3), nn.ReLU(True), transposed(4, 4, 3)),
        torch.randn(4, 2, *[6] * rank),
    )
    lsuv_(model, x)
    assert_unit(model, x)
    lsuv_(model, x, per_channel=True)
    out = model(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(out.std(1), torch.ones(4), rtol=1e-5, atol=1e-5)


def test_per_channel_removes_the_mean_shift_that_unit_std_hides() -> None:
    model, x = vgg(32, bias=True), torch.randn(64, 3, 8, 8)
    other = copy.deepcopy(model)
    whole, channels = lsuv_(model, x)["66"], lsuv_(other, x, per_channel=True)["66"]
    assert whole.std == pytest.approx(1, rel=1e-4)
    assert whole.channel_var < 0.1  # §2: nearly all of the classifier's variance is mean shift
    assert channels.channel_var == pytest.approx(63 / 64, rel=1e-3)
    assert channels.channel_mean_sq < 1e-8


def test_per_channel_is_weight_norms_data_dependent_initialization() -> None:
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4))), 3 + 2 * torch.randn(50, 6)
    direction = F.normalize(model[0].weight.detach(), dim=1)
    lsuv_(model, x, per_channel=True, orthonormal=False)
    t = x @ direction.T  # arXiv 1602.07868: g = 1/σ[t], b = −μ[t]/σ[t]
    torch.testing.assert_close(
        model[0].parametrizations.weight.original0[:, 0], 1 / t.std(0), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(model[0].bias, -t.mean(0) / t.std(0), rtol=1e-4, atol=1e-4)


def test_functional_and_scripted_parts_are_reported() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight - self.weight.mean())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    model = nn.Sequential(Functional(), scripted, nn.Conv2d(8, 4, 3), nn.Identity())
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    x = torch.randn(8, 3, 8, 8)
    report = lsuv_(model, x)
    assert {(row.path, row.action) for row in report} == {
        ("2", "set"),
        ("unused", "unreached"),
        ("0", "invisible"),
        ("1", "invisible"),
    }
    with pytest.raises(UserError, match="scripted model"):
        lsuv_(scripted, x)


def test_orthonormal_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2, groups=2))
    lsuv_(model, torch.randn(8, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    rows = model[0].weight.flatten(1)
    torch.testing.assert_close(F.normalize(rows) @ F.normalize(rows).T, torch.eye(8), rtol=0, atol=1e-5)
    again = nn.Sequential(nn.Conv2d(3, 8, 3))
    lsuv_(again, torch.randn(8, 3, 8, 8), generator=torch.Generator().manual_seed(3))
    other = again[0].weight.flatten(1)
    torch.testing.assert_close(F.normalize(other), F.normalize(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lsuv_(nn.Sequential(nn.ReLU()), torch.randn(2, 3)), "no convolution or linear"),
        (lambda: lsuv_(nn.Linear(3, 3)), "no input tensor"),
        (lambda: lsuv_(nn.Linear(3, 3), torch.randn(2, 4)), "forward fails on inputs"),
        (lambda: lsuv_(nn.Linear(3, 3), torch.randn(2, 3), target_std=0), "target_std=0"),
        (lambda: lsuv_(nn.LazyLinear(3), torch.randn(2, 3)), "is lazy"),
        (lambda: lsuv_("resnet18", torch.randn(2, 3)), "expected an nn.Module"),
    ],
)
def test_bad_input_is_one_clear_line(call, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_target_std() -> None:
    model, x = NormFree(), torch.randn(16, 3, 8, 8)
    lsuv_(model, x, target_std=0.5)
    assert_unit(model, x, target=0.5)
