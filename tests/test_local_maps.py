"""Local Q and C maps against closed forms, SciPy, and the constants of PyPI `dks` 0.1.2 (DeepMind's)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from nfnets.activations import resolve
from nfnets.errors import UserError
from nfnets.layers import TailoredActivation
from nfnets.local_maps import (
    c_map,
    dks_constants,
    increasing,
    integrals,
    leaky_constants,
    leaky_relu_map,
    tat_constants,
)

C = np.array([-0.95, -0.4, 0.0, 0.3, 0.7, 0.99])


def resnet101(x: float, r: Callable[[float], float]) -> float:
    """M(x) of the papers' rescaled ResNet-101, written down from its blocks: 3, 4, 23, 3 of three activations each,
    shortcut weight 0.6, projections behind the first activation of a stage, an activation at the end."""
    branch = r(r(r(x)))
    for blocks in (3, 4, 23, 3):
        for block in range(blocks):
            shortcut = r(x) if block == 0 else x
            x = 0.36 * shortcut + 0.64 * r(r(r(x)))
    return max(r(x), branch)


# from dks.base import activation_transform as at
# at._get_activations_params([name], method, dks_params={"c_slope_1_target": 1.2}, tat_params={"c_curve_target": 0.2},
#                            subnet_max_func=M), with M as above, "swish" for silu and "gelu_exact" for gelu
DKS_SAYS = {
    ("tanh", "TAT"): (0.05802052185775174, 0.5218639804107907, -0.47964307043602933, 22.360662617679573),
    ("tanh", "DKS"): (0.07461073057540929, 0.5566915199964039, -0.5034378768692019, 18.002635964442153),
    ("softplus", "TAT"): (0.15011489794745747, 0.5374599901124356, -0.9964810144656421, 10.548801878808609),
    ("softplus", "DKS"): (0.187610081682664, 0.40688063442258693, -0.9213466151411168, 8.878672543666086),
    ("silu", "TAT"): (0.0875225923638387, 0.447036985452745, -0.2719491049920553, 15.944011132899531),
    ("silu", "DKS"): (0.1067373257731159, 0.3496710166880955, -0.2077678835592355, 13.955412026469313),
    ("gelu", "TAT"): (0.058051910756080925, 0.3270459942411899, -0.2049475513745151, 22.900883046768847),
    ("gelu", "DKS"): (0.0704325312653056, 0.2594892979275957, -0.15815378961895762, 20.211589023162524),
    ("erf", "TAT"): (0.05101695305767468, 0.5435395708960796, -0.5584034865193054, 23.33129353526285),
}


@pytest.mark.parametrize(("name", "method"), list(DKS_SAYS))
def test_constants_are_those_of_dks(name: str, method: str) -> None:
    if method == "TAT":
        local = increasing(lambda k: resnet101(0.0, lambda y: y + k), 0.2, 0.0, math.inf)
        found = tat_constants(name, local)
    else:
        local = increasing(lambda k: resnet101(1.0, lambda y: y * k), 1.2, 1.0, math.inf)
        found = dks_constants(name, local)
    assert found[:4] == pytest.approx(DKS_SAYS[name, method], rel=1e-6)


def test_leaky_relu_is_that_of_dks() -> None:
    bend = increasing(lambda u: resnet101(0.0, lambda c: leaky_relu_map(c, 1 - u)), 0.75, 0.0, 1.0)
    found = leaky_constants(1 - bend)
    assert found.negative_slope == pytest.approx(0.6291800290346146, abs=1e-8)
    assert found.output_scale == pytest.approx(1.196996549778802, abs=1e-8)
    slope = increasing(lambda k: resnet101(1.0, lambda y: y * k), 1.2, 1.0, math.inf)
    found = dks_constants("relu", slope)
    assert found.negative_slope == pytest.approx(0.8761257073473065, abs=1e-6)
    assert found.output_shift == pytest.approx(-0.049418692997275034, abs=1e-6)
    assert found.output_scale == pytest.approx(1.0651832702681547, abs=1e-6)


def test_outputs_are_those_of_dks_for_torch() -> None:
    """dks.pytorch.activation_transform.get_transformed_activations(["softplus"], "DKS", …)["softplus"](x)."""
    x = torch.tensor([-2.0, -1, -0.5, 0, 0.5, 1, 2], dtype=torch.float64)
    softplus = TailoredActivation(nn.Softplus(), *DKS_SAYS["softplus", "DKS"])
    leaky = TailoredActivation(nn.LeakyReLU(0.6291800290346146), output_scale=1.196996549778802)
    expected = [
        *(-1.8844441417122866, -0.9994385417638674, -0.5279197416315541, -0.03734660053509875),
        *(0.47196563180081935, 0.9996293683613959, 2.1081378189990256),
    ]
    torch.testing.assert_close(softplus(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    expected = [
        *(-1.5062526478883203, -0.7531263239441601, -0.37656316197208006, 0.0),
        *(0.598498274889401, 1.196996549778802, 2.393993099557604),
    ]
    torch.testing.assert_close(leaky(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["tanh", "silu", "elu", "selu", "gelu", "softsign", "hardswish"])
def test_solutions_keep_their_conditions(name: str) -> None:
    """Q(1), Q'(1), C(0) and C'(1) of the module itself, by differences and SciPy."""
    found = dks_constants(name, 1.02)
    act = resolve(name)

    def f(z: float, scale: float = 1.0) -> float:
        x = torch.tensor([found.input_scale * scale * z + found.input_shift], dtype=torch.float64)
        return found.output_scale * (float(act.fn(x)) + found.output_shift)

    z, w = np.polynomial.hermite_e.hermegauss(200)
    w = w / w.sum()
    at = lambda scale: np.array([f(each, scale) for each in z])  # noqa: E731
    assert w @ at(1.0) ** 2 == pytest.approx(1, abs=2e-3)
    assert w @ at(1.0) == pytest.approx(0, abs=2e-3)
    step = 1e-3
    q_slope = (w @ at(math.sqrt(1 + step)) ** 2 - w @ at(math.sqrt(1 - step)) ** 2) / (2 * step)
    assert q_slope == pytest.approx(1, abs=5e-3)
    module = TailoredActivation(_module(name), *found[:4])
    assert (1 - c_map(module, 1 - 1e-3)) / 1e-3 == pytest.approx(1.02, abs=5e-3)


def _module(name: str) -> nn.Module:
    return {
        "tanh": nn.Tanh(),
        "silu": nn.SiLU(),
        "elu": nn.ELU(),
        "selu": nn.SELU(),
        "gelu": nn.GELU(),
        "softsign": nn.Softsign(),
        "hardswish": nn.Hardswish(),
    }[name]


def test_c_maps_are_the_closed_forms() -> None:
    # Williams 1997: E[erf(x) erf(y)] = (2/π) asin(2c/3). Cho and Saul 2009: ReLU.
    np.testing.assert_allclose(c_map("erf", C), np.arcsin(2 * C / 3) / np.arcsin(2 / 3), atol=1e-7)
    np.testing.assert_allclose(c_map("relu", C), leaky_relu_map(C, 0.0), atol=1e-4)
    np.testing.assert_allclose(c_map(nn.LeakyReLU(0.3), C), leaky_relu_map(C, 0.3), atol=1e-4)
    assert leaky_relu_map(0.0, 0.0) == pytest.approx(1 / math.pi)
    np.testing.assert_allclose(leaky_relu_map(C, 1.0), C, atol=1e-12)


def test_integrals_are_scipys() -> None:
    def expect(f: Callable[[float], float]) -> float:
        return integrate.quad(lambda z: f(z) * stats.norm.pdf(z), -10, 10, epsabs=1e-12)[0]

    found = integrals(resolve("tanh"), 0.7, 0.4)
    t = lambda z: math.tanh(0.7 * z + 0.4)  # noqa: E731
    d = lambda z: 0.7 * (1 - t(z) ** 2)  # noqa: E731
    assert found.mean == pytest.approx(expect(t), abs=1e-9)
    assert found.square == pytest.approx(expect(lambda z: t(z) ** 2), abs=1e-9)
    assert found.slope == pytest.approx(expect(lambda z: d(z) ** 2), abs=1e-9)
    assert found.q_slope == pytest.approx(expect(lambda z: t(z) * d(z) * z), abs=1e-9)
    assert found.curvature == pytest.approx(expect(lambda z: (2 * 0.7 * t(z) * d(z)) ** 2), abs=1e-9)


def test_activations_without_a_solution_are_refused() -> None:
    for name in ("selu", "hardswish", "relu"):  # their slope jumps: C''(1) is infinite
        with pytest.raises(UserError, match=f"activation {name}: no constants"):
            tat_constants(name, 0.01)


def test_the_module() -> None:
    module = TailoredActivation(nn.ReLU(inplace=True), 2.0, 1.0, -1.0, 0.5)
    x = torch.tensor([-1.0, 1.0])
    assert module(x).tolist() == [-0.5, 1.0]
    assert x.tolist() == [-1.0, 1.0]
    assert "input_scale=2, input_shift=1, output_shift=-1, output_scale=0.5" in repr(module)
    tanh = TailoredActivation(nn.Tanh(), *DKS_SAYS["tanh", "TAT"])  # constants that nearly cancel
    x = torch.linspace(-2, 2, 41)
    torch.testing.assert_close(tanh(x.bfloat16()).float(), tanh(x), rtol=0.02, atol=0.02)
    assert tanh(x.bfloat16()).dtype == torch.bfloat16
    for bad in (lambda: TailoredActivation(nn.ReLU(), math.nan), lambda: TailoredActivation("relu")):
        with pytest.raises(UserError, match="expected"):
            bad()
    assert resolve(TailoredActivation(nn.ReLU(), 2.0, 1.0)).kinks == (-0.5,)
