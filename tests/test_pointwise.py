"""`dyt` and `derf`: the official formulas, measured α, saturation, baking and exporting."""

from __future__ import annotations

import io
import math

import onnxruntime
import pytest
import torch
from test_any_norm import Transformer, images
from torch import Tensor, nn

import nfnets
from nfnets.errors import UserError
from nfnets.layers import DynamicErf, DynamicTanh
from nfnets.signal import saturation
from nfnets.verify import same_function


def official(kind: type, x: Tensor, at: dict[str, Tensor], last: bool) -> Tensor:
    """As the papers' repositories write it."""
    weight, bias = (at[n] if last else at[n][:, None, None] for n in ("weight", "bias"))
    x = torch.tanh(at["alpha"] * x) if kind is DynamicTanh else torch.erf(at["alpha"] * x + at["shift"])
    return x * weight + bias


@pytest.mark.parametrize("kind", [DynamicTanh, DynamicErf])
@pytest.mark.parametrize("last", [True, False])
def test_outputs_and_gradients_are_the_formulas(kind: type, last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = kind(6, channel_dim=-1 if last else 1, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn((3, 4, 5, 6) if last else (3, 6, 4, 5), generator=generator, dtype=torch.float64)
    twins = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(ours), official(kind, theirs, twins, last)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, twins[name].grad, rtol=1e-12, atol=1e-12)
    slope = layer.slope(layer.argument(x))
    step = 1e-6
    rise = layer.bounded(layer.argument(x) + step) - layer.bounded(layer.argument(x) - step)
    at_zero = 1.0 if kind is DynamicTanh else 2 / math.sqrt(math.pi)
    torch.testing.assert_close(slope, rise / (2 * step) / at_zero, rtol=1e-6, atol=1e-8)


def test_official_starts_and_bad_values() -> None:
    tanh, erf = DynamicTanh(4), DynamicErf(4)
    assert {n: tuple(p.shape) for n, p in tanh.named_parameters()} == {
        "alpha": (1,),
        "weight": (4,),
        "bias": (4,),
    }
    assert set(dict(erf.named_parameters())) == {"alpha", "shift", "weight", "bias"}
    assert tanh.alpha.item() == erf.alpha.item() == 0.5
    assert erf.shift.item() == 0
    assert tanh(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
    for wrong in (
        {"alpha": 0.0},
        {"alpha": math.nan},
        {"normalized_shape": (2, 2), "channel_dim": 1},
        {"channel_dim": 2},
    ):
        with pytest.raises(UserError):
            DynamicTanh(**({"normalized_shape": 4} | wrong))
    with pytest.raises(UserError, match="alpha=-1"):
        nfnets.plan(Transformer(), images("own"), method="dyt", norms="all", alpha=-1.0)
    with pytest.raises(UserError, match="alpha='mesured'"):
        nfnets.plan(Transformer(), images("own"), method="dyt", norms="all", alpha="mesured")


@pytest.mark.parametrize("method", ["dyt", "derf"])
def test_gains_and_biases_are_taken_over_and_alpha_is_fixed_or_measured(method: str) -> None:
    torch.manual_seed(0)
    model, x = Transformer().train(), images("own", 8)
    for parameter in model.norm.parameters():
        nn.init.normal_(parameter)
    model.norm.bias.requires_grad_(False)
    fixed = nfnets.convert(model, x, method=method, norms="layer", alpha=0.8)
    assert fixed.norm.alpha.item() == pytest.approx(0.8)
    assert torch.equal(fixed.norm.weight, model.norm.weight)
    assert not fixed.norm.bias.requires_grad
    measured = nfnets.convert(model, x, method=method, norms="layer", alpha="measured")
    seen = saturation(measured, x)
    assert [row.path for row in seen] == [p for p, m in measured.named_modules() if hasattr(m, "alpha")]
    assert all(abs(row.rms - 0.5) < 1e-3 for row in seen), "each reads what those before it put out then"
    assert measured.training


def test_what_tells_nothing_keeps_alpha() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    converted = nfnets.convert(model, torch.randn(3, 4), method="dyt", norms="all", alpha="measured")
    assert converted[1].alpha.item() == 0.5


def test_saturation_by_hand() -> None:
    x = torch.tensor([[0.0, 1.0, 4.0, -9.0]])
    model = nn.Sequential(DynamicTanh(4, alpha=1.0), DynamicErf(4, alpha=2.0, shift=0.1))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    first, second = saturation(model, x)
    assert (first.path, second.path) == ("0", "1")
    assert first.alpha == 1
    assert first.rms == pytest.approx(math.sqrt(98 / 4))
    slopes = [1 - math.tanh(v) ** 2 for v in (0, 1, 4, 9)]
    assert first.slope == pytest.approx(sum(slopes) / 4)
    assert first.saturated == 0.5
    again = [math.exp(-((2 * math.tanh(v) + 0.1) ** 2)) for v in (0, 1, 4, -9)]
    assert second.slope == pytest.approx(sum(again) / 4, rel=1e-5)
    assert "saturated 50.0%" in str(first)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert saturation(nn.Linear(4, 4), x) == []


class Read(nn.Module):
    """Affines before a linear, three linears, a padded convolution with and without a shift, and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.a = DynamicTanh(4)
        self.q, self.k, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), DynamicErf(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.q(x) + self.k(x))


@pytest.mark.parametrize("padding", [0, 1])
def test_baking_folds_affines_into_all_who_read_them_where_that_is_exact(padding: int) -> None:
    torch.manual_seed(0)
    model = Read().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4, dtype=torch.float64)
    baked = nfnets.bake(model, inputs=x)
    torch.testing.assert_close(baked(x), model(x), rtol=1e-12, atol=1e-12)
    assert baked.a.weight is None
    assert baked.a.bias is None
    assert baked.b.weight is not None, "nothing reads it but the output"
    assert model.a.weight is not None
    convolutions = nn.Sequential(
        nn.Conv2d(3, 8, 1), DynamicTanh(8, channel_dim=1), nn.Conv2d(8, 6, 3, padding=padding, groups=2)
    ).double()
    nn.init.normal_(convolutions[1].weight)
    nn.init.normal_(convolutions[1].bias)
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    baked = nfnets.bake(convolutions, inputs=(image,))
    torch.testing.assert_close(baked(image), convolutions(image), rtol=1e-12, atol=1e-12)
    assert (baked[1].bias is None) is (padding == 0), "zeros that are padded are no β"
    assert nfnets.bake(convolutions)[1].weight is not None


@pytest.mark.filterwarnings("ignore")  # torch's exporters warn of themselves
@pytest.mark.parametrize("method", ["dyt", "derf", "nf"])
def test_converted_transformers_export_and_compile(method: str) -> None:
    torch.manual_seed(0)
    x = images("own")
    converted = nfnets.convert(Transformer(), x, method=method, norms="all").eval()
    baked = nfnets.bake(converted, inputs=x)
    assert same_function(converted, baked, x, rtol=1e-5)
    exported = torch.export.export(converted, (x,)).module()
    torch.testing.assert_close(exported(x), converted(x))
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), converted(x))
    file = io.BytesIO()
    torch.onnx.export(baked, (x,), file, dynamo=False, input_names=["x"])
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), converted(x), rtol=1e-4, atol=1e-5)
