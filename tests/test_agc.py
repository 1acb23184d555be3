"""AGC against published vectors, timm, its definition written out, and torch's own training machinery."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nfnets.agc import attach_agc, clip_grad_agc_
from nfnets.errors import UserError
from nfnets.unitwise import module_units, plan_of


def parameter(value: Any, grad: Any) -> nn.Parameter:
    p = nn.Parameter(torch.as_tensor(value))
    p.grad = torch.as_tensor(grad).to(p.dtype)
    return p


def random_gradients(model: nn.Module, size: float = 0.01, seed: int = 0) -> None:
    """Gradients of about `size` times the parameter, so that some units clip at λ = size and some do not."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        rms = p.detach().norm() / p.numel() ** 0.5
        p.grad = torch.randn(p.shape, generator=generator) * size * (rms + 1e-3)


def definition(w: Tensor, g: Tensor, units: list[Any], clipping: float, eps: float) -> tuple[Tensor, int]:
    """The paper's formula, one unit (an index into the tensor) at a time."""
    out, clipped = g.clone(), 0
    for unit in units:
        limit = clipping * max(w[unit].norm().item(), eps)
        norm = g[unit].norm().item()
        if norm > limit:
            out[unit] = g[unit] * limit / max(norm, 1e-6)
            clipped += 1
    return out, clipped


class TestVectors:
    """Numbers published by Composer's tests and worked out from DeepMind's code."""

    def test_a_vector_is_one_unit(self) -> None:
        p = parameter([3.0, 4.0], [7.0, 24.0])
        assert clip_grad_agc_([p], clipping=0.5) == 1
        torch.testing.assert_close(p.grad, torch.tensor([0.7, 2.4]))

    def test_rows(self) -> None:
        p = parameter([[3.0, 4.0], [9.0, 40.0]], [[7.0, 24.0], [5.0, 12.0]])
        assert clip_grad_agc_([p], clipping=0.5) == 0.5
        torch.testing.assert_close(p.grad, torch.tensor([[0.7, 2.4], [5.0, 12.0]]))

    def test_filters(self) -> None:
        w = torch.tensor([[3.0, 8, 2, 2], [1, 3, 3, 9]]).view(2, 1, 2, 2)
        g = torch.tensor([[1.0, 1, 3, 5], [1, 1, 1, 1]]).view(2, 1, 2, 2)
        p = parameter(w, g)
        clip_grad_agc_([p], clipping=1 / 3)
        expected = torch.tensor([[0.5, 0.5, 1.5, 2.5], [1, 1, 1, 1]]).view(2, 1, 2, 2)
        torch.testing.assert_close(p.grad, expected)

    def test_zero_weights_may_still_move(self) -> None:
        p = parameter([0.0, 0.0], [3.0, 4.0])
        clip_grad_agc_([p])
        torch.testing.assert_close(p.grad, torch.tensor([6e-6, 8e-6]))


@pytest.mark.parametrize("name", ["resnet18", "test_nfnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("sync", [True, False])
def test_against_timm(name: str, sync: bool) -> None:
    model = timm.create_model(name, num_classes=10)
    # timm takes an (O, 1, 1, 1) gain as O units, DeepMind as one vector: that difference has its own test.
    kept = [p for p in model.parameters() if p.ndim < 2 or sum(n != 1 for n in p.shape) > 1]
    random_gradients(model)
    theirs = [copy.deepcopy(p) for p in kept]
    for p, q in zip(theirs, kept, strict=True):
        p.grad = None if q.grad is None else q.grad.clone()
    adaptive_clip_grad(theirs)
    counts = plan_of(kept).clip(kept, 0.01, 1e-3, sync=sync)
    assert 0 < counts[:, 0].sum() < plan_of(kept).totals.sum()
    for p, q in zip(kept, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)


# What the paper calls a unit, for each layer, as indices into the weight.
LAYERS: list[tuple[nn.Module, Callable[[Tensor], list[Any]]]] = [
    (nn.Linear(5, 4), lambda w: [(o,) for o in range(4)]),
    (nn.Conv1d(3, 4, 3), lambda w: [(o,) for o in range(4)]),
    (nn.Conv2d(4, 6, 3, groups=2), lambda w: [(o,) for o in range(6)]),
    (nn.Conv3d(2, 3, 2), lambda w: [(o,) for o in range(3)]),
    (nn.Conv2d(6, 6, 3, groups=6), lambda w: [(o,) for o in range(6)]),
    (nn.Conv2d(6, 6, 1, groups=6), lambda w: [...]),
    (nn.Embedding(7, 3), lambda w: [(row,) for row in range(7)]),
    (nn.ConvTranspose2d(1, 9, 2), lambda w: [(0, o) for o in range(9)]),
    (nn.ConvTranspose1d(4, 3, 2), lambda w: [(slice(None), o) for o in range(3)]),
    (nn.ConvTranspose2d(4, 3, 2), lambda w: [(slice(None), o) for o in range(3)]),
    (nn.ConvTranspose3d(2, 3, 2), lambda w: [(slice(None), o) for o in range(3)]),
    (
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        lambda w: [(slice(3 * g, 3 * g + 3), o) for g in range(2) for o in range(2)],
    ),
    (nn.ConvTranspose2d(6, 6, 3, groups=6), lambda w: [(o,) for o in range(6)]),
    (nn.LayerNorm(5), lambda w: [...]),
    (nn.PReLU(), lambda w: [...]),
]


@pytest.mark.parametrize(
    ("layer", "units"), LAYERS, ids=lambda value: str(value) if isinstance(value, nn.Module) else ""
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("sync", [True, False])
def test_units_of_every_layer(
    layer: nn.Module, units: Callable[[Tensor], list[Any]], layout: torch.memory_format, sync: bool
) -> None:
    layer = copy.deepcopy(layer).double()
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if layout == torch.channels_last and weight.ndim == 4:
        layer.to(memory_format=torch.channels_last)  # pyright: ignore
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    # Some units just above, some just below the limit.
    grad *= 0.1 * weight.detach().norm() / grad.norm()
    weight.grad = grad.clone(memory_format=torch.preserve_format)
    expected, clipped = definition(weight.detach(), grad, units(weight), 0.1, 1e-3)
    plan = plan_of([weight], module_units(layer))
    assert plan.totals.tolist() == [len(units(weight))]
    assert plan.clip([weight], 0.1, 1e-3, sync=sync).tolist() == [[clipped, 0]]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("few", [0, 1, 3, 39, 40])
def test_a_few_units_of_many(few: int, transposed: bool, layout: torch.memory_format) -> None:
    layer = nn.ConvTranspose2d(3, 40, 2) if transposed else nn.Conv2d(3, 40, 2)
    layer = layer.double().to(memory_format=layout)  # pyright: ignore
    w = layer.weight
    units = [(slice(None), o) if transposed else (o,) for o in range(40)]
    w.grad = torch.zeros_like(w)
    for i, unit in enumerate(units):
        w.grad[unit] = w.detach()[unit] * (0.02 if 7 * i % 40 < few else 0.005)
    expected, clipped = definition(w.detach(), w.grad, units, 0.01, 1e-3)
    assert clipped == few
    assert clip_grad_agc_(layer).item() == pytest.approx(few / 40)
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=5),
    size=st.floats(-6, 2),
    clipping=st.floats(1e-3, 1.0),
    eps=st.floats(1e-6, 1.0),
    seed=st.integers(0, 99),
)
def test_any_shape_by_the_definition(
    shape: list[int], size: float, clipping: float, eps: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    g *= 10**size
    p = parameter(w, g.clone())
    whole = sum(n != 1 for n in shape) <= 1
    units = [...] if whole else [(o,) for o in range(shape[0])]
    expected, clipped = definition(w, g, units, clipping, eps)
    fraction = clip_grad_agc_([p], clipping, eps)
    assert fraction.item() == pytest.approx(clipped / len(units))
    torch.testing.assert_close(p.grad, expected, rtol=1e-10, atol=0)


def test_a_parametrized_transposed_convolution_keeps_its_unit() -> None:
    plain = nn.ConvTranspose2d(4, 3, 2, bias=False)
    layer = torch.nn.utils.parametrizations.weight_norm(copy.deepcopy(plain))
    params = dict(layer.named_parameters())
    units = module_units(layer)
    direction = params["parametrizations.weight.original1"]
    assert units[id(direction)].dims == (0, 2, 3)
    assert plan_of(list(params.values()), units).totals.tolist() == [1, 3]


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_nonfinite_gradients_are_left_to_be_seen(bad: float, sync: bool) -> None:
    grad = torch.ones(3, 2)
    grad[1, 0] = bad
    p, bias = parameter(torch.ones(3, 2), grad.clone()), parameter(torch.ones(2), [bad, 1.0])
    counts = plan_of([p, bias]).clip([p, bias], 0.01, 1e-3, sync=sync)
    assert counts.tolist() == [[2, 1], [0, 1]]
    assert p.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(p.grad[1], grad[1], equal_nan=True)
    torch.testing.assert_close(bias.grad, torch.tensor([bad, 1.0]), equal_nan=True)
    torch.testing.assert_close(p.grad[0].norm(), torch.tensor(0.01 * 2**0.5))


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normed_in_single(dtype: torch.dtype, sync: bool) -> None:
    # The norm, 2e5, does not fit into float16; the mean square of the weights, 1e-8, does not either.
    w, g = torch.full((4, 100), 1e-4, dtype=dtype), torch.full((4, 100), 2e4, dtype=dtype)
    p, bias = parameter(w, g.clone()), parameter(w.flatten(), g.flatten())
    assert plan_of([p, bias]).clip([p, bias], 0.5, 1e-5, sync=sync).tolist() == [[4, 0], [1, 0]]
    expected = 0.5 * w.float()
    torch.testing.assert_close(p.grad, expected.to(dtype), rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(bias.grad, expected.flatten().to(dtype), rtol=1e-2, atol=1e-6)


def test_what_is_not_clipped_keeps_every_bit() -> None:
    g = torch.randn(64, 50)
    p = parameter(torch.ones(64, 50), g.clone())
    assert plan_of([p]).clip([p], 100.0, 1e-3, sync=False)[0, 0] == 0
    assert torch.equal(p.grad, g)  # pyright: ignore


def test_mixed_dtypes_and_missing_gradients() -> None:
    a, b = (
        parameter(torch.ones(2, 2).double(), torch.ones(2, 2)),
        parameter(torch.ones(3).half(), torch.ones(3)),
    )
    silent = nn.Parameter(torch.ones(5, 5))
    assert clip_grad_agc_([a, silent, b]).item() == 1.0
    torch.testing.assert_close(a.grad, torch.full((2, 2), 0.01).double())
    torch.testing.assert_close(b.grad, torch.full((3,), 0.01).half())
    assert silent.grad is None
    assert clip_grad_agc_([silent]).item() == 0.0


def test_what_can_be_given() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 3, 2), nn.Linear(3, 2))
    random_gradients(model, 1.0)
    copies = [copy.deepcopy(model) for _ in range(3)]
    for twin in copies:
        random_gradients(twin, 1.0)
    clip_grad_agc_(model)
    clip_grad_agc_(copies[0].parameters())
    clip_grad_agc_(copies[1].named_parameters())
    clip_grad_agc_([*copies[2].parameters(), *copies[2].parameters()])  # twice, clipped once
    for twin in copies[1:]:
        for p, q in zip(copies[0].parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)  # pyright: ignore
    # Only the module tells that the first layer is transposed.
    assert not torch.allclose(model[0].weight.grad, copies[0][0].weight.grad, rtol=1e-3, atol=0)  # pyright: ignore
    torch.testing.assert_close(model[1].weight.grad, copies[0][1].weight.grad)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"clipping": 0},
        {"clipping": -1.0},
        {"clipping": math.nan},
        {"clipping": math.inf},
        {"clipping": "0.01"},
        {"eps": 0.0},
        {"eps": -0.001},
        {"eps": math.nan},
        {"clipping": True},
    ],
)
def test_refused_numbers(kwargs: dict[str, Any]) -> None:
    p = parameter([1.0, 1.0], [5.0, 5.0])
    with pytest.raises(UserError, match="expected a finite number above 0"):
        clip_grad_agc_([p], **kwargs)
    optimizer = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(UserError, match="expected a finite number above 0"):
        attach_agc(optimizer, nn.Linear(1, 1), **kwargs)
    assert not optimizer._optimizer_step_pre_hooks
    assert p.grad.tolist() == [5.0, 5.0]  # pyright: ignore


def test_refused_parameters() -> None:
    fine = parameter([1.0, 1.0], [5.0, 5.0])
    for empty in ([], (p for p in ()), nn.ReLU()):
        with pytest.raises(UserError, match="no parameters"):
            clip_grad_agc_(empty)
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="dense"):
        clip_grad_agc_([fine, embedding.weight])
    with pytest.raises(UserError, match="floating point"):
        clip_grad_agc_([fine, parameter(torch.ones(2, dtype=torch.cfloat), torch.ones(2))])
    with pytest.raises(UserError, match="expected tensors"):
        clip_grad_agc_([fine, "weight"])  # pyright: ignore
    assert fine.grad.tolist() == [5.0, 5.0]  # pyright: ignore


class NoSync(TorchDispatchMode):
    """Fails on the operations that read a value on the host or make a shape of one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(
            word in name for word in ("local_scalar", "nonzero", "item", "masked_select", "unique")
        ), name
        return func(*args, **(kwargs or {}))


def test_no_host_synchronization() -> None:
    model = timm.create_model("test_nfnet", num_classes=10)
    random_gradients(model)
    params = list(model.parameters())
    plan = plan_of(params)
    scale = torch.tensor(2.0)
    with NoSync():
        plan.clip(params, 0.01, 1e-3, scale, sync=False)
    with pytest.raises(AssertionError), NoSync():
        plan.clip(params, 0.01, 1e-3, scale, sync=False)[0, 0].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_host_synchronization_on_a_gpu() -> None:
    model = timm.create_model("test_nfnet", num_classes=10).cuda()
    reference = copy.deepcopy(model).cpu()
    random_gradients(reference)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.cuda()
    handle = attach_agc(torch.optim.SGD(model.parameters(), lr=0.0), model, exclude=None)
    handle._clip()  # the plan is made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        handle._clip()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    clip_grad_agc_(reference)
    clip_grad_agc_(reference)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad.cpu(), q.grad, rtol=1e-5, atol=1e-9)  # pyright: ignore


def test_small_tensors_that_are_read_together() -> None:
    """Scalars, vectors, filters and rows of equal and other shapes, by brute force."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (), (5,), (5,), (1,), (4, 3, 3, 3), (6, 3, 3, 3), (4, 2, 3, 3), (7, 5), (2, 5), (64, 300)]
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randint(
            -3, 1, (), generator=generator
        )
    expected, clipped = [], 0
    for p in params:
        assert p.grad is not None
        grad = p.grad.clone()
        for unit, weight in zip(grad, p.detach(), strict=True) if p.ndim > 1 else [(grad, p.detach())]:
            limit = 0.3 * max(float(weight.norm()), 1e-3)
            if (norm := float(unit.norm())) > limit:
                unit.mul_(limit / norm)
                clipped += 1
        expected.append(grad)
    units = sum(len(p) if p.ndim > 1 else 1 for p in params)
    assert 0 < clipped < units
    assert float(clip_grad_agc_(params, 0.3)) == pytest.approx(clipped / units)
    for p, grad in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, grad)
