"""Gains and moments against the reference's table, closed forms, scipy's quadrature and timm's constants."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import integrate
from timm.layers.create_act import _ACT_LAYER_DEFAULT, create_act_layer
from timm.models.nfnet import _nonlin_gamma
from torch import nn

from nfnets.activations import NAMES
from nfnets.errors import UserError
from nfnets.gains import DEEPMIND, gain, moments

# normalizer_free.md, section 2: double-precision quadrature made independently of this code.
EXACT = {
    "identity": 1.0,
    "relu": 1.712858550449663,
    "relu6": 1.712858554972395,
    "leaky_relu": 1.704831627177336,
    "silu": 1.787187222100442,
    "gelu": 1.700926243363333,
    "gelu_tanh": 1.700916561695450,
    "elu": 1.270843417850196,
    "celu": 1.270843417850196,
    "selu": 1.0,
    "sigmoid": 4.801313372039957,
    "tanh": 1.592537419722831,
    "softplus": 1.919125980107656,
    "log_sigmoid": 1.919125980107656,
    "softsign": 2.337533363108539,
    "glu": 1.846228545338605,
    "mish": 1.592025381099446,
    "hardswish": 1.813871473813183,
    "hardtanh": 1.392036140448310,
    "hardsigmoid": 6.015034486637112,
    "erf": 1.467166950489138,
    "atan": 1.491207618134209,
    "sin": 1.520866623178815,
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_table(name: str) -> None:
    assert gain(name) == pytest.approx(EXACT[name], rel=1e-12)


def test_slopes_of_the_table() -> None:
    assert gain(nn.LeakyReLU(0.1)) == pytest.approx(1.630636971573091, rel=1e-12)
    assert gain(nn.LeakyReLU(0.2)) == pytest.approx(1.546460060360872, rel=1e-12)


def test_closed_forms() -> None:
    pi = math.pi
    assert gain("relu") == pytest.approx(math.sqrt(2 / (1 - 1 / pi)), rel=1e-13)
    for a in (-0.5, 0.0, 0.3, 0.9):
        closed = (1 + a * a) / 2 - (1 - a) ** 2 / (2 * pi)
        assert moments(nn.LeakyReLU(a))[1] == pytest.approx(closed, rel=1e-12)
    mean, var = moments("gelu")
    assert mean == pytest.approx(1 / (2 * math.sqrt(pi)), rel=1e-12)
    assert var + mean**2 == pytest.approx(1 / 3 + 1 / (2 * pi * math.sqrt(3)), rel=1e-12)
    assert moments("erf")[1] == pytest.approx(2 / pi * math.asin(2 / 3), rel=1e-12)
    assert moments("sin")[1] == pytest.approx((1 - math.exp(-2)) / 2, rel=1e-12)


@pytest.mark.parametrize("name", sorted(_nonlin_gamma))
def test_deepmind_constants_are_timms(name: str) -> None:
    assert gain(name, constants="deepmind") == _nonlin_gamma[name]
    # Sampling estimates: near the exact gain, not equal to it.
    assert gain(name) == pytest.approx(_nonlin_gamma[name], rel=1.5e-3)


def test_deepmind_glu_and_coverage() -> None:
    assert gain("glu", constants="deepmind") == 1.8484294414520264
    assert gain("swish", constants="deepmind") == gain("silu", constants="deepmind")
    assert gain(nn.GELU(), constants="deepmind") == 1.7015043497085571
    assert gain("log_softmax") == 1.0
    assert len(DEEPMIND) == 17


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("Swish", "silu"),
        ("hard_swish", "hardswish"),
        ("hard-sigmoid", "hardsigmoid"),
        ("LeakyReLU", "leaky_relu"),
        ("logsigmoid", "log_sigmoid"),
        ("soft_sign", "softsign"),
        ("linear", "identity"),
        ("gelu_new", "gelu_tanh"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert gain(spelling) == gain(name)


@pytest.mark.parametrize("name", sorted(_ACT_LAYER_DEFAULT))
def test_every_timm_activation_by_name_module_and_function(name: str) -> None:
    layer = create_act_layer(name)
    assert layer is not None
    by_module = gain(layer)
    assert gain(name) == pytest.approx(by_module, rel=1e-9)
    # As an unknown callable, integrated without knowing its kinks.
    assert gain(lambda x: layer.double()(x.clone()).detach()) == pytest.approx(by_module, rel=1e-9)


MODULES = [
    nn.Hardtanh(-0.3, 2.1),
    nn.ELU(0.7),
    nn.CELU(1.7),
    nn.Softplus(2.0, 5.0),
    nn.Hardshrink(0.9),
    nn.Softshrink(0.2),
    nn.Threshold(0.4, -1.0),
    nn.Tanhshrink(),
    nn.ReLU(inplace=True),
    nn.SiLU(inplace=True),
    nn.GELU("tanh"),
    nn.RReLU().eval(),
    nn.PReLU(init=-0.4),
    nn.Hardswish(inplace=True),
    nn.LogSigmoid(),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
@pytest.mark.parametrize(("mean", "var"), [(0.0, 1.0), (-0.7, 0.3), (1.5, 40.0), (0.2, 1e-4)])
def test_moments_against_scipy(module: nn.Module, mean: float, var: float) -> None:
    double = copy.deepcopy(module).double()

    def integrand(z: float, power: int) -> float:
        with torch.no_grad():
            y = float(double(torch.tensor([mean + math.sqrt(var) * z], dtype=torch.float64)))
        return y**power * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    # Kinks and jumps of these modules; quad needs to be told, or it misses 1e-8.
    kinks = [(k - mean) / math.sqrt(var) for k in (-3, -0.9, -0.5, -0.3, -0.2, 0, 0.2, 0.4, 0.9, 2.1, 2.5, 3)]
    points = sorted({max(-10.0, min(10.0, k)) for k in kinks})
    first, second = (
        integrate.quad(integrand, -10, 10, args=(k,), points=points, limit=200, epsabs=1e-12, epsrel=1e-10)[0]
        for k in (1, 2)
    )
    got = moments(module, mean, var)
    assert got[0] == pytest.approx(first, rel=1e-7, abs=1e-9)
    assert got[1] == pytest.approx(second - first**2, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["relu", "gelu", "tanh", "silu", "hardswish"]), st.floats(-3, 3), st.floats(1e-3, 100))
def test_moments_against_sampling(name: str, mean: float, var: float) -> None:
    z = np.random.default_rng(0).standard_normal(200_000)
    function = {"hardswish": F.hardswish}.get(name) or getattr(F, name)
    y = function(torch.from_numpy(mean + math.sqrt(var) * z)).numpy()
    m, v = moments(name, mean, var)
    assume(np.count_nonzero(y) > 2000)  # else too few samples pass a ReLU to tell anything
    assert m == pytest.approx(y.mean(), abs=6 * math.sqrt(v / len(z)) + 1e-12)
    spread = np.square(y - y.mean()).std() / math.sqrt(len(z))  # of the variance that the samples have
    assert v == pytest.approx(y.var(), abs=8 * spread + 1e-9)


@settings(deadline=None, max_examples=20)
@given(st.floats(-3, 3), st.floats(-2, 2))
@example(6.103515625e-05, 0.0)  # close to a panel's edge, beyond the outermost node
@example(-1e-4, 0.5)
def test_unknown_callable_with_jump_and_kink_anywhere(at: float, slope: float) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > at, torch.ones_like(x), slope)

    above = 0.5 * math.erfc(at / math.sqrt(2))
    mean, var = moments(step)
    # A jump is located to about 1e-7, and 1e-6 is what is promised.
    assert mean == pytest.approx(above + slope * (1 - above), abs=5e-7)
    assert var == pytest.approx((1 - slope) ** 2 * above * (1 - above), abs=5e-7 * (1 + abs(slope)) ** 2)


def test_a_callable_that_works_in_single_precision() -> None:
    assert gain(lambda x: torch.tanh(x.float())) == pytest.approx(EXACT["tanh"], rel=1e-6)


def test_prelu_averages_over_its_slopes_and_glu_over_its_halves() -> None:
    module = nn.PReLU(3)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.1, -0.5, 0.9]))
    each = [moments(nn.LeakyReLU(a), 0.3, 2.0) for a in (0.1, -0.5, 0.9)]
    assert moments(module, 0.3, 2.0) == pytest.approx(tuple(np.mean(each, axis=0)), rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    z = 0.4 + math.sqrt(1.7) * torch.randn(1_000_000, 2, generator=generator, dtype=torch.float64)
    y = F.glu(z, 1)
    m, v = moments(nn.GLU(), 0.4, 1.7)
    assert m == pytest.approx(y.mean().item(), abs=5e-3)
    assert v == pytest.approx(y.var().item(), rel=1e-2)


def test_the_module_is_left_alone_and_runs_in_any_precision() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.dropout(F.relu_(x) * self.scale)

    module = Learned().half()
    calls: list[object] = []
    module.register_forward_hook(lambda *a: calls.append(a))
    assert gain(module) == pytest.approx(EXACT["relu"] / 3, rel=1e-9)
    assert module.training
    assert module.scale.dtype == torch.float16
    assert not calls


def test_a_subclass_that_computes_something_else_is_not_taken_for_its_parent() -> None:
    class Shifted(nn.ReLU):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.relu(input - 0.5)

    assert moments(Shifted()) == pytest.approx(moments("relu", mean=-0.5), rel=1e-9)


def test_degenerate_variance() -> None:
    assert moments("silu", mean=1.0, var=0.0) == pytest.approx((1 / (1 + math.exp(-1)), 0.0))


def test_every_name_is_understood() -> None:
    for name in NAMES:
        assert gain(name) > 0


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("rellu", "did you mean relu"),
        (nn.Softmax(dim=-1), "elementwise"),
        (lambda x: F.dropout(x, 0.5), "chance"),
        (lambda x: x.sum(), "shape"),
        (torch.sqrt, "NaN"),
        (torch.ones_like, "varies"),
        (3, "a name, a module or a callable"),
    ],
)
def test_refused(activation: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        gain(activation)  # pyright: ignore
    assert "\n" not in str(caught.value)


def test_refused_constants_and_moments() -> None:
    with pytest.raises(UserError, match="did you mean exact"):
        gain("relu", constants="exakt")  # pyright: ignore
    with pytest.raises(UserError, match="no DeepMind gain for mish"):
        gain("mish", constants="deepmind")
    with pytest.raises(UserError, match="no DeepMind gain for LeakyReLU"):
        gain(nn.LeakyReLU(0.1), constants="deepmind")
    for bad in ({"var": -1.0}, {"var": math.nan}, {"mean": math.inf}):
        with pytest.raises(UserError, match="var >= 0"):
            moments("relu", **bad)
    with pytest.raises(UserError, match="number of classes"):
        moments("log_softmax")
