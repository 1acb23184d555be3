"""Norm layers of any kind: recognized by what they compute, and replaced by the methods that carry them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conversion_nets import NETS
from timm.layers import GroupNorm1, GroupNormAct, LayerNorm2d, LayerNormAct2d, RmsNorm
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNorm2dFp32, RmsNorm2d, SimpleNorm
from torch import Tensor, nn
from typer.testing import CliRunner

import nfnets
from nfnets.cli import app
from nfnets.convert import Change, ConversionError, Method, Net, list_methods, register
from nfnets.errors import UserError
from nfnets.structure.laws import Law
from nfnets.structure.norms import law_of, norm_kind, norm_layers
from nfnets.train import saved_models
from nfnets.train.inputs import noise
from nfnets.train.models import build
from nfnets.train.saved_models import Recipe
from nfnets.verify import batch_independence, same_function

ALL = ("dyt", "derf", "nf", "fixed_variance", "lsuv", "fixup", "skipinit")


class TwoFormats(nn.Module):
    """As Hugging Face's `ConvNextLayerNorm`: its own code for the channels in front."""

    def __init__(self, channels: int, data_format: str):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps, self.data_format, self.normalized_shape = 1e-6, data_format, (channels,)

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + self.eps).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class LlamaNorm(nn.Module):
    """As Hugging Face's `LlamaRMSNorm`; with `plus`, as Gemma's."""

    def __init__(self, channels: int, plus: float = 0.0):
        super().__init__()
        self.weight, self.variance_epsilon, self.plus = nn.Parameter(torch.ones(channels)), 1e-6, plus

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.plus + self.weight) * wide.to(hidden_states.dtype)


class Shaped(nn.Module):
    """γ and β under names of their own, in the shape that they are used in."""

    def __init__(self, channels: int):
        super().__init__()
        self.g, self.b = (nn.Parameter(torch.full((1, channels, 1, 1), v)) for v in (1.0, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, dim=1, unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * self.g + self.b


class Rectified(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def layer(dim: int, *names: str) -> Law:
    return Law("layer", (6,), dim, *names)


FOUND: list[tuple[nn.Module, Law | None]] = [
    (nn.LayerNorm(6), layer(-1, "weight", "bias")),
    (nn.LayerNorm(6, elementwise_affine=False), layer(-1)),
    (nn.LayerNorm((3, 6), bias=False), Law("layer", (3, 6), -1, "weight")),
    (LayerNorm2d(6), layer(1, "weight", "bias")),
    (LayerNorm2dFp32(6), layer(1, "weight", "bias")),
    (LayerNormAct2d(6), layer(1, "weight", "bias")),
    (torchvision.models.convnext.LayerNorm2d(6), layer(1, "weight", "bias")),
    (TwoFormats(6, "channels_first"), layer(1, "weight", "bias")),
    (TwoFormats(6, "channels_last"), layer(-1, "weight", "bias")),
    (Shaped(6), layer(1, "g", "b")),
    (nn.RMSNorm(6), Law("rms", (6,), -1, "weight")),
    (RmsNorm(6), Law("rms", (6,), -1, "weight")),
    (RmsNorm(6, affine=False), Law("rms", (6,), -1)),
    (RmsNorm2d(6), Law("rms", (6,), 1, "weight")),
    (LlamaNorm(6), Law("rms", (6,), -1, "weight")),
    (nn.GroupNorm(2, 6), Law("group", (6,), 1, "weight", "bias")),
    (GroupNorm1(6), Law("group", (6,), 1, "weight", "bias")),
    (GroupNormAct(6, 3), Law("group", (6,), 1, "weight", "bias")),
    (nn.InstanceNorm2d(6), Law("instance", (6,), 1)),
    (nn.InstanceNorm1d(6, affine=True, track_running_stats=True), Law("instance", (6,), 1, "weight", "bias")),
    (LlamaNorm(6, plus=1.0), None),
    (SimpleNorm(6), None),
    (Rectified(6), None),
    (GlobalResponseNorm(6), None),
    (nn.PReLU(6), None),
    (nn.Softmax(-1), None),
    (timm.layers.LayerScale(6), None),
]


@pytest.mark.parametrize(("module", "law"), FOUND, ids=lambda value: type(value).__name__)
def test_a_norm_layer_of_any_class_is_known_by_what_it_computes(module: nn.Module, law: Law | None) -> None:
    weights = {name: p.clone() for name, p in module.state_dict().items()}
    state = torch.random.get_rng_state()
    assert law_of(module) == law
    assert norm_kind(module) == (law.kind if law else "layer" if isinstance(module, nn.LayerNorm) else None)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, weights[name]) for name, p in module.state_dict().items())


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, num_classes=5)


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)


def swin() -> nn.Module:
    name = "swin_tiny_patch4_window7_224"
    return timm.create_model(name, img_size=56, depths=(2, 1), num_heads=(3, 6), num_classes=5)


class Block(nn.Module):
    """As Hugging Face's ViT layer: query, key and value of their own, norm layers before."""

    def __init__(self, width: int, norm: Any):
        super().__init__()
        self.layernorm_before, self.layernorm_after = norm(width), norm(width)
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.intermediate, self.output = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.layernorm_before(hidden_states)
        split = [
            part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        ]
        x = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + self.dense(x)
        return hidden_states + self.output(F.gelu(self.intermediate(self.layernorm_after(hidden_states))))


class Transformer(nn.Module):
    def __init__(self, norm: Any = nn.LayerNorm, width: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(Block(width, norm), Block(width, norm))
        self.norm, self.head = norm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).transpose(1, 2))).mean(1))


class Convolutional(nn.Module):
    """Two residual blocks with a norm layer of a kind behind every convolution."""

    def __init__(self, norm: Any):
        super().__init__()

        def unit(before: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(before, 8, 3, padding=1, bias=False), norm(8), nn.ReLU())

        self.stem, self.first, self.second = unit(3), nn.Sequential(unit(8), unit(8)[:2]), unit(8)[:2]
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.first(x))
        return self.head(F.relu(x + self.second(x)))


def group(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def instance(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True)


SIZES = {"vit": 16, "convnext": 32, "swin": 56}
MODELS: dict[str, Any] = {
    "vit": vit,
    "convnext": convnext,
    "swin": swin,
    "own layer norms": lambda: Transformer(lambda width: TwoFormats(width, "channels_last")),
    "own RMS norms": lambda: Transformer(LlamaNorm),
    "own channels-first": lambda: Convolutional(lambda width: TwoFormats(width, "channels_first")),
    "group": lambda: Convolutional(group),
    "instance": lambda: Convolutional(instance),
    "instance, no affine": lambda: Convolutional(nn.InstanceNorm2d),
}
KINDS = ("batch", "group", "instance", "layer", "rms")


def images(name: str, samples: int = 4) -> Tensor:
    size = SIZES.get(name, 8)
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_no_norm_layer_is_left_and_everything_else_stays(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name](), images(name)
    norms = norm_layers(model, KINDS)
    for method in ALL if name in ("vit", "group", "convnext") else ("dyt", "derf", "nf"):
        converted = nfnets.convert(model, x, method=method, norms="all")
        assert type(converted) is type(model)
        assert norm_layers(converted, KINDS) == {}
        before = {name: type(module) for name, module in model.named_modules() if name not in norms}
        paths = {name for name, _ in converted.named_modules()}
        assert set(before) <= paths
        kept = {key for key in model.state_dict() if key.rpartition(".")[0] not in norms}
        assert kept <= set(converted.state_dict())
        assert batch_independence(converted, x)
        converted(x).square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in converted.parameters())
        again = nfnets.convert(converted, x, method=method, norms="all")
        assert again.state_dict().keys() == converted.state_dict().keys()


def test_batch_stays_the_default_and_all_means_both() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)
    )
    x = torch.randn(2, 3, 8, 8)
    assert [row.path for row in nfnets.plan(model, x)] == ["1"]
    assert [row.path for row in nfnets.plan(model, x, norms="batch")] == ["1"]
    assert [row.path for row in nfnets.plan(model, x, norms=("group",))] == ["4"]
    both = nfnets.plan(model, x, norms="all")
    assert [row.path for row in both] == ["1", "4"]
    assert "norms='all'" in both.summary()
    default = nfnets.convert(model, x)
    assert isinstance(default[4], nn.GroupNorm)


def test_instance_and_group_norm_convert_as_batch_norm_does() -> None:
    """The same constants, up to the shift by a mean that each takes away and no constant can."""
    x = torch.randn(16, 3, 8, 8)
    made = {}
    for kind, norm in (("batch", nn.BatchNorm2d), ("group", group), ("instance", instance)):
        torch.manual_seed(0)
        made[kind] = nfnets.convert(Convolutional(norm), x, norms=kind, channelwise=False).state_dict()
    for kind in ("group", "instance"):
        assert made[kind].keys() == made["batch"].keys()
        for name, value in made["batch"].items():
            torch.testing.assert_close(made[kind][name], value, rtol=1e-5, atol=1e-6)


def test_a_layer_norm_constant_makes_what_the_layer_reads_unit_size() -> None:
    torch.manual_seed(0)
    model, x = Transformer(), images("own")
    converted = nfnets.convert(model, x, method="fixed_variance", norms="layer")
    seen: dict[str, Tensor] = {}
    for path, module in converted.named_modules():
        if type(module).__name__ == "FixedVariance":
            module.register_forward_hook(lambda m, i, o, path=path: seen.__setitem__(path, o))
    converted(x)
    sizes = {path: out.square().mean().sqrt().item() for path, out in seen.items()}
    assert len(sizes) == 5
    assert all(abs(size - 1) < 1e-4 for size in sizes.values()), sizes
    assert converted.norm.bias.shape == (8,)


def test_a_net_without_batch_norm_says_what_converts_it() -> None:
    with pytest.raises(UserError, match=r"no BatchNorm layer, but 5 layer norms: pass norms='all' .*dyt"):
        nfnets.plan(Transformer(), images("own"))
    mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4))
    with pytest.raises(UserError, match="1 group norm and 1 instance norm"):
        nfnets.plan(mixed, images("own"))
    with pytest.raises(UserError, match="no layer norm layer, but 1 batch norm"):
        nfnets.plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), images("own"), norms="layer")
    with pytest.raises(UserError, match="unknown kind of norm layers 'layers': did you mean layer"):
        nfnets.plan(Transformer(), images("own"), norms="layers")
    with pytest.raises(UserError, match="norms=7: expected 'all'"):
        nfnets.plan(Transformer(), images("own"), norms=7)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the model itself is a LayerNorm"):
        nfnets.plan(nn.LayerNorm(8), torch.randn(2, 8), norms="layer", method="dyt")


def test_methods_say_what_they_carry() -> None:
    assert {name for name, method in list_methods().items() if "layer" in method.carries} >= {*ALL}
    with pytest.raises(
        UserError, match=r"'gn' with norms='layer': it replaces batch norm layers, and no layer"
    ):
        nfnets.plan(Transformer(), images("own"), method="gn", norms="layer")
    with pytest.raises(ConversionError, match="5 norm layers cannot be converted"):
        nfnets.convert(Transformer(), images("own"), method="fold", norms="all")
    with pytest.raises(UserError, match=r"carries='layer': expected a tuple"):

        @register
        @dataclass
        class _(Method):
            name = "carries-a-text"
            carries = "layer"  # type: ignore[assignment]

            def decide(self, net: Net) -> list[Change]:
                return []


# --- what is exact ---


def test_instance_norm_with_frozen_statistics_folds_as_batch_norm() -> None:
    torch.manual_seed(0)
    for affine in (True, False):
        model = Convolutional(
            lambda width, a=affine: nn.InstanceNorm2d(width, affine=a, track_running_stats=True)
        )
        model(torch.randn(8, 3, 8, 8) * 2 + 1)
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.InstanceNorm2d) and affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
        folded = nfnets.convert(model, images("own"), method="fold", norms="instance")
        assert norm_layers(folded, KINDS) == {}
        assert same_function(model.double(), folded.double(), images("own").double(), rtol=1e-6)
    with pytest.raises(ConversionError, match="keeps no running statistics"):
        nfnets.convert(Convolutional(instance), images("own"), method="fold", norms="instance")


# --- bad input ---


class QueryNormed(nn.Module):
    """QK-norm: queries and keys are normalized before their product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.q_norm, self.k_norm, self.proj = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = self.q_norm(q) @ self.k_norm(k).transpose(-2, -1) / 2
        return x + self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("method", ["dyt", "nf"])
def test_norms_of_queries_and_keys_stay_unless_they_are_named(method: str) -> None:
    model, x = QueryNormed(), torch.randn(2, 5, 8)
    rows = {row.path: row for row in nfnets.plan(model, x, method=method, norms="layer")}
    assert rows["norm"].action == "replace"
    assert {rows[path].action for path in ("q_norm", "k_norm")} == {"leave"}
    assert "bounds their logits" in rows["q_norm"].reason
    named = nfnets.plan(model, x, method=method, norms="layer", include=["q_norm"])
    assert [row.path for row in named if row.action == "replace"] == ["q_norm"]


def test_a_norm_over_other_axes_than_the_channels_is_refused_but_by_pointwise_methods() -> None:
    x = torch.randn(2, 3, 8, 8)
    width = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm(8), nn.Conv2d(4, 4, 1))
    whole = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm((4, 8, 8)), nn.Conv2d(4, 4, 1))
    for model, why in ((width, "where 0 has no channels"), (whole, "over 3 dimensions")):
        for method in ("nf", "fixed_variance", "lsuv"):
            (row,) = nfnets.plan(model, x, method=method, norms="all")
            assert row.action == "refuse"
            assert why in row.reason
        converted = nfnets.convert(model, x, method="dyt", norms="all")
        expected = model[1].weight * torch.tanh(0.5 * model[0](x)) + model[1].bias
        torch.testing.assert_close(converted[1](model[0](x)), expected)


class Parallel(nn.Module):
    """Attention and perceptron read one norm layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + self.a(n) + self.b(n).relu()


class Modulated(nn.Module):
    """AdaLN: a norm without γ and β, then a scale and a shift that are computed from a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.condition = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(3, 16)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.condition(c).chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class Styled(nn.InstanceNorm2d):
    """AdaIN: the style is an argument of the norm layer itself."""

    def forward(self, x: Tensor, style: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * style.std((2, 3), keepdim=True) + style.mean((2, 3), keepdim=True)


class Transferred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), Styled(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), x)


class Tied(nn.Module):
    """One layer norm that runs twice, and one that shares its γ."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.other = (
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.LayerNorm(8),
        )
        self.other.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.b(self.norm(self.a(x)))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(self.norm(self.a(x)), 2)


def test_norms_that_two_branches_read_are_modulated_tied_or_called_with_more() -> None:
    x = torch.randn(4, 8)
    for method in ("dyt", "nf", "fixed_variance", "lsuv"):
        assert norm_layers(nfnets.convert(Parallel(), x, method=method, norms="all"), KINDS) == {}
        tied = nfnets.convert(Tied(), x, method=method, norms="all")
        assert norm_layers(tied, KINDS) == {}
        if method == "dyt":
            assert tied.norm.weight is tied.other.weight
        model, given = Modulated(), (x, torch.randn(4, 3))
        modulated = nfnets.convert(model, *given, method=method, norms="all")
        if method == "dyt":
            scale, shift = model.condition(given[1]).chunk(2, -1)
            torch.testing.assert_close(modulated(*given), torch.tanh(x / 2) * (1 + scale) + shift)
            assert [name for name, _ in modulated.norm.named_parameters()] == ["alpha"]
        (row,) = nfnets.plan(Transferred(), torch.randn(2, 3, 8, 8), method=method, norms="all")
        assert row.action == "refuse"
        assert "called with 2 arguments" in row.reason
    rows = {row.path: row for row in nfnets.plan(Functional(), x, method="dyt", norms="all")}
    assert rows[""].action == "refuse"
    assert "calls F.group_norm" in rows[""].reason


def test_what_is_called_a_norm_and_is_none_that_is_known_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), LlamaNorm(8, plus=1.0), nn.Linear(8, 8), nn.LayerNorm(8))
    planned = nfnets.plan(model, torch.randn(4, 8), method="dyt", norms="all")
    assert [(row.path, row.action) for row in planned] == [("3", "replace"), ("1", "leave")]
    assert "computes none of" in planned.rows[1].reason
    rectified = nn.Sequential(nn.Linear(8, 8), Rectified(8))
    (row,) = nfnets.plan(rectified, torch.randn(4, 8), method="dyt", norms="all")
    assert row.reason == "Rectified.forward does more than layer normalization"
    unbatched = nn.Sequential(nn.InstanceNorm2d(3), nn.Conv2d(3, 4, 3))
    (row,) = nfnets.plan(unbatched, torch.randn(3, 8, 8), method="dyt", norms="all")
    assert "no dimension of samples" in row.reason


def test_a_norm_without_tensors_gets_its_models_type_and_device() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for method in ("dyt", "derf", "fixed_variance"):
        converted = nfnets.convert(model, x, method=method, norms="all")
        assert {p.dtype for p in converted[1].parameters()} == {torch.float64}
    shapes = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)).to("meta")
    converted = nfnets.convert(shapes, x.float().to("meta"), method="dyt", norms="all")
    assert {p.device.type for p in converted.parameters()} == {"meta"}


def test_batch_norm_nets_take_pointwise_layers_too() -> None:
    model = NETS["fused"]()
    x = torch.randn(4, 3, 16, 16)
    converted = nfnets.convert(model, x, method="dyt", alpha="measured")
    assert norm_layers(converted) == {}
    assert batch_independence(converted, x)


def test_the_commands_take_kinds_and_a_recipe_keeps_them(tmp_path: Path) -> None:
    said = CliRunner().invoke(
        app, ["plan", "--model", "timm:test_vit", "--method", "dyt", "--norms", "layer,rms"]
    )
    assert said.exit_code == 0, said.output
    assert "13 to replace" in " ".join(said.output.split())
    recipe = Recipe("timm:test_vit", "dyt", {"norms": ["layer"], "alpha": "measured"}, 5, 3, 160)
    model = build(recipe.model, num_classes=5, channels=3, size=160)
    inputs = noise(recipe.described, batch=2, seed=0)
    converted = saved_models.convert_model(model, inputs, recipe).eval()
    saved_models.save(converted, recipe, tmp_path / "dyt.safetensors")
    again = saved_models.load(tmp_path / "dyt.safetensors").eval()
    assert norm_layers(again, KINDS) == {}
    assert torch.equal(again(*inputs.args), converted(*inputs.args))
