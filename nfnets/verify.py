"""Proof by test: batch independence, and that two models compute the same function."""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nfnets.errors import UserError, first_line
from nfnets.given import check_module, check_named, shown
from nfnets.nested import fresh, tensors_in
from nfnets.preserve import check_ordinary, preserved
from nfnets.tiles import Size, reach, tiled
from nfnets.trace import couples

Given = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found; true if it passed.

    Example:
        >>> bool(Verdict("batch independence", True, 0.0, "…"))
        True
    """

    check: str
    passed: bool
    worst: float
    """The largest deviation that was seen; NaN if something was not finite."""
    detail: str

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.check}: {self.detail}"


def batch_independence(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    rtol: float = 1e-4,
    batch_dim: int | None = None,
    input_batch_dim: int = 0,
) -> Verdict:
    """Whether a sample's output and gradient do not depend on the samples beside it, in training mode.

    The first sample's output must stay when every other sample changes, and ∂ output_0 / ∂ input_j must be zero for
    j ≠ 0. Dropout and stochastic depth draw the same masks both times, RReLU takes its mean slope, and both passes
    start from the same buffers. An output or gradient that is not finite fails. So does a layer of ours that says that
    it couples samples over time (`online`), where one batch may not show it.

    Which dimension of an output holds the samples is found by running the model on one sample more. An output that
    stays as large belongs to no sample and is left out; a list with an entry for each sample is taken as that. A model
    that takes no other number of samples is judged by its outputs' sizes: dimension 0 if that is as long as the batch.

    Args:
        model: left as it was, buffers, gradients and modes included.
        *inputs: tensors with samples in dimension `input_batch_dim`; at least two samples.
        kwargs: inputs that the forward takes by keyword, of the same kind.
        rtol: tolerance of the output comparison, relative to the output's largest magnitude.
        batch_dim: dimension of the samples in every output, such as 1 for (T, N, C); None finds it.
        input_batch_dim: dimension of the samples in every input.

    Returns:
        A `Verdict`.

    Raises:
        UserError: fewer than two samples, no floating-point or complex tensor among inputs or outputs, inputs that
            the model rejects, a model whose mode cannot be set, or one that gives other outputs for the same inputs.

    Example:
        >>> bool(batch_independence(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)))
        True
        >>> bool(batch_independence(nn.BatchNorm2d(3), torch.randn(2, 3, 8, 8)))
        False
    """
    given = _checked({"model": model}, inputs, kwargs, rtol)
    check_ordinary(model)
    at = input_batch_dim
    batched = [t for t in tensors_in(given) if _varies(t)]
    if not batched or any(not -t.ndim <= at < t.ndim or t.shape[at] < 2 for t in batched):
        sizes = [tuple(t.shape) for t in batched]
        raise UserError(
            f"inputs of shapes {sizes}: expected float tensors with 2 samples or more in dimension {at}"
        )
    samples = batched[0].shape[at]
    choose = _chooser(model, given, samples, at) if batch_dim is None else _along(batch_dim)
    first, leak = _observed(model, given, choose, at)
    others = tree_map_only(Tensor, lambda t: _with_other_neighbors(t, at), given)
    moved = _moved(first, _observed(model, others, choose)[0])
    if moved > rtol and (noise := _moved(first, _observed(model, given, choose)[0])) > rtol:
        raise UserError(
            f"two passes over the same inputs differ by {noise:.1e} (relative): expected a forward that repeats from "
            "the same seed; switch off what counts calls or draws from a generator of its own"
        )
    detail = (
        f"other samples move an output by {moved:.1e} (relative), its gradient reaches them with {leak:.1e}"
    )
    worst = _worst([moved, leak])
    if not math.isfinite(worst):
        detail = f"not finite: {detail}"
    said = sorted({f"{type(m).__name__} couples {what}" for m in model.modules() if (what := couples(m))})
    independent = moved <= rtol and leak == 0.0 and not said
    return Verdict("batch independence", independent, worst, "; ".join([detail, *said]))


def same_function(
    a: nn.Module,
    b: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    rtol: float = 1e-4,
) -> Verdict:
    """Whether two models give the same outputs in evaluation mode.

    ‖a(x) − b(x)‖ ≤ rtol · ‖a(x)‖ over every output tensor, in whatever containers, data classes or other objects they
    are. An output that is not finite fails, even if both are not. A model whose mode is fixed (`torch.export`) is run
    as it is.

    Args:
        a: a model, left as it was.
        b: another one that takes the same inputs.
        *inputs: what both forwards take.
        kwargs: inputs that both forwards take by keyword.
        rtol: allowed relative difference in the 2-norm.

    Returns:
        A `Verdict`.

    Raises:
        UserError: no two models, outputs that differ in number or shape, or a model that rejects the inputs.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> bool(same_function(layer, layer, torch.randn(4, 3)))
        True
    """
    given = _checked({"a": a, "b": b}, inputs, kwargs, rtol)
    results = []
    for model in (a, b):
        with preserved(model), torch.no_grad():
            _set_mode(model, False)
            results.append([_wide(t) for t in _outputs(_run(model, fresh(given)))])
    shapes = [[tuple(t.shape) for t in result] for result in results]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise UserError(
            f"outputs of shapes {shapes[0]} and {shapes[1]}: expected two models with the same outputs"
        )
    pairs = [(x, y.to(x.device)) for x, y in zip(*results, strict=True)]
    worst = _worst(float((x - y).norm()) / (float(x.norm()) or 1.0) for x, y in pairs)
    detail = f"outputs differ by {worst:.1e} (relative, 2-norm)"
    odd = [sum(int((~t.isfinite()).sum()) for t in result) for result in results]
    if any(odd):
        detail = f"not finite: {odd[0]} values that the first model puts out, {odd[1]} of the second's"
    return Verdict("same function", worst <= rtol, worst, detail)


@dataclass(frozen=True, slots=True)
class TileVerdict(Verdict):
    """What `tile_independence` found."""

    needed: int = 0
    """Pixels around a tile that have a part in its output."""


def tile_independence(
    model: nn.Module, image: Tensor, tile: Size, halo: Size, rtol: float = 1e-4
) -> TileVerdict:
    """Whether a model computes on tiles of an image what it computes on the whole, in evaluation mode.

    Each tile is shown with a halo, as far as the image goes; of its output the tile's own part is compared with the
    whole's. A fully convolutional net without norm layers differs by rounding from a halo of its receptive field's
    radius on. Group, instance and layer norm over space see other statistics in every tile.

    Args:
        model: (N, C, *space) to tensors of as many dimensions, in any container; left as it was.
        image: (N, C, *space); large enough that the halo does not reach from border to border.
        tile: pixels of a tile, for all dimensions or one for each; a multiple of the model's stride.
        halo: pixels shown around it; a multiple of the model's stride.
        rtol: tolerance, relative to the output's largest magnitude.

    Returns:
        A `TileVerdict`: `worst`, the largest difference (relative), and `needed`, the halo that the middle tile needs
        by its gradient. Where that goes up to the image's border it may be larger.

    Raises:
        UserError: a tile or halo that does not fit, or outputs that have no space.

    Example:
        >>> convolutions = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1))
        >>> found = tile_independence(convolutions, torch.randn(1, 1, 24, 24), tile=8, halo=2)
        >>> bool(found), found.needed
        (True, 2)
        >>> bool(tile_independence(nn.GroupNorm(1, 1), torch.randn(1, 1, 24, 24), tile=8, halo=2))
        False
    """
    _checked({"model": model}, (image,), None, rtol)
    if not isinstance(image, Tensor) or image.ndim < 3 or not image.is_floating_point():
        raise UserError(
            f"image={shown(image)}: expected a float tensor of (samples, channels, height, width); pass one"
        )

    def run(part: Tensor) -> Tensor:
        found = [t for t in _outputs(_run(model, ((part.clone(),), {}))) if t.ndim == image.ndim]
        if not found:
            raise UserError(
                f"no output has the image's {image.ndim} dimensions: expected a model that puts out maps"
            )
        return found[0]

    with preserved(model):
        _set_mode(model, False)
        with torch.no_grad():
            whole, parts = run(image), tiled(run, image, tile, halo)
        needed, border = reach(run, image, tile)
    if parts.shape != whole.shape:
        raise UserError(
            f"tiles put out {tuple(parts.shape)}, the whole {tuple(whole.shape)}: expected tile and halo, and the "
            "image, to be multiples of the model's stride; pass others"
        )
    worst = _worst([float((parts - whole).abs().max()) / (float(whole.abs().max()) or 1.0)])
    reaches = f"a tile's output depends on {needed} pixels around it"
    reaches += ", up to the image's border" if border else ""
    detail = f"tiles differ from the whole by {worst:.1e} (relative); {reaches}, the halo has {halo}"
    return TileVerdict("tile independence", worst <= rtol, worst, detail, needed)


def _checked(
    models: Mapping[str, Any], inputs: tuple[Any, ...], kwargs: Mapping[str, Any] | None, rtol: Any
) -> Given:
    for name, model in models.items():
        check_module(model, name)
    if any(isinstance(each, nn.Module) for each in inputs):
        raise UserError(
            f"a module among the inputs: expected {len(models)} model{'s' * (len(models) > 1)}, then tensors; "
            "check the order"
        )
    check_named(kwargs)
    if isinstance(rtol, bool) or not isinstance(rtol, int | float) or not 0 <= rtol < math.inf:
        raise UserError(f"rtol={shown(rtol)}: expected a finite number, 0 or more; pass rtol=1e-4")
    return inputs, dict(kwargs or {})


def _set_mode(model: nn.Module, mode: bool) -> None:
    """Training or evaluation; an exported program keeps the mode that it was exported in."""
    try:
        model.train(mode)
    except NotImplementedError:
        if mode:
            raise UserError(
                f"{type(model).__name__} cannot be put in training mode: expected a model that can, an exported one "
                "cannot; check the model before torch.export"
            ) from None


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode from a fixed seed, its parameters constants without gradients; everything is put back."""
    held = [(p, p.requires_grad, p.grad) for p in model.parameters() if p.is_leaf]
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), numpy and numpy.random.get_state()
    with preserved(model):
        _set_mode(model, True)
        for module in model.modules():
            # How many slopes it draws depends on signs, so that no seed gives a sample the same ones again.
            if isinstance(module, nn.RReLU):
                module.training = False
        torch.manual_seed(0)
        random.seed(0)
        if numpy:
            numpy.random.seed(0)
        try:
            for parameter, _, _ in held:
                parameter.requires_grad_(False)
                parameter.grad = None  # a forward that unfreezes its parameters would add to it
            yield
        finally:
            for parameter, learns, gradient in held:
                parameter.requires_grad_(learns)
                parameter.grad = gradient
            random.setstate(drawn[0])
            if numpy:
                numpy.random.set_state(drawn[1])


def _run(model: nn.Module, given: Given) -> Any:
    args, kwargs = given
    try:
        return model(*args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors_in(given))
        mode = "training" if model.training else "evaluation"
        raise UserError(
            f"the model's forward fails in {mode} mode on inputs {shapes or 'of no tensor'}: {first_line(error)}; "
            "pass inputs that model(*inputs, **kwargs) accepts"
        ) from error


def _outputs(outputs: Any) -> list[Tensor]:
    """The tensors of an output, each once: an object may hold one under several names."""
    return list({id(tensor): tensor for tensor in tensors_in(outputs)}.values())


Choose = Callable[[Any], list[Tensor]]
"""Picks the first sample's part of an output."""


def _along(dim: int) -> Choose:
    def choose(outputs: Any) -> list[Tensor]:
        return [t.select(dim, 0) for t in _outputs(outputs) if _varies(t) and -t.ndim <= dim < t.ndim]

    return choose


def _chooser(model: nn.Module, given: Given, samples: int, at: int) -> Choose:
    """What picks the first sample's part, from what one sample more makes longer."""

    def longer(tensor: Tensor) -> Tensor:
        long = -tensor.ndim <= at < tensor.ndim and tensor.shape[at] == samples
        return torch.cat([tensor, tensor.narrow(at, samples - 1, 1)], at) if long else tensor

    grown = tree_map_only(Tensor, lambda t: _watched(longer(t)), given)
    more: Any = None
    with _training(model), torch.enable_grad(), contextlib.suppress(UserError):
        more = _run(model, fresh(grown))
    entries = len(more) if isinstance(more, list | tuple) else None
    sizes = [tuple(t.shape) for t in _outputs(more) if _varies(t)]

    def choose(outputs: Any) -> list[Tensor]:
        if isinstance(outputs, list | tuple) and len(outputs) == samples and entries == samples + 1:
            return [t for t in _outputs(outputs[0]) if _varies(t)]
        found = [t for t in _outputs(outputs) if _varies(t)]
        if len(found) == len(sizes):
            dims = [_grown_dim(tuple(t.shape), size) for t, size in zip(found, sizes, strict=True)]
        else:
            dims = [_long_dim(tuple(t.shape), samples) for t in found]
        return [t.select(dim, 0) for t, dim in zip(found, dims, strict=True) if dim is not None]

    return choose


def _grown_dim(size: tuple[int, ...], grown: tuple[int, ...]) -> int | None:
    """The first dimension that one sample more made longer."""
    if len(size) != len(grown):
        return None
    return next((dim for dim, (n, m) in enumerate(zip(size, grown, strict=True)) if m > n), None)


def _long_dim(size: tuple[int, ...], samples: int) -> int | None:
    """The dimension that is as long as the batch; the first if several are and it is among them."""
    dims = [dim for dim, n in enumerate(size) if n == samples]
    if len(dims) > 1 and dims[0] != 0:
        raise UserError(
            f"an output of shape {size} for {samples} samples, of a model that takes no other number: expected one "
            "dimension of that length; pass batch_dim=…"
        )
    return dims[0] if dims else None


def _observed(
    model: nn.Module, given: Given, choose: Choose, at: int | None = None
) -> tuple[list[Tensor], float]:
    """The first sample's outputs and, given the inputs' dimension of samples, what its gradient is at the others."""
    refusal: UserError | None = None
    # Copies, which a forward may overwrite; leaves, whose `requires_grad` it may set.
    for prepare in (fresh, lambda leaves: leaves):
        watched = tree_map_only(Tensor, _watched, given)
        with _training(model), torch.enable_grad():
            try:
                outputs = _run(model, prepare(watched))
            except UserError as error:
                refusal = refusal or error
                continue
            first = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in choose(outputs)]
            if not first:
                raise UserError(
                    "the model's output holds no float tensor with a batch dimension: nothing to compare"
                )
            # No model need be differentiable. `backward` and not `grad`, which reentrant checkpoints refuse.
            differentiable = [_weighed(out) for out in first if out.requires_grad]
            if differentiable and at is not None:
                torch.autograd.backward(differentiable)
            gradients = [t.grad for t in tensors_in(watched) if t.grad is not None]
            leak = _largest(g.narrow(at, 1, g.shape[at] - 1) for g in gradients) if at is not None else 0.0
            return [t.detach() for t in first], leak
    assert refusal is not None
    raise refusal


def _moved(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference, relative to the largest magnitude; infinite if shapes differ."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return math.inf
    return _largest(a - b for a, b in zip(first, second, strict=True)) / (_largest(first) or 1.0)


def _varies(value: Any) -> bool:
    """Whether it holds real or complex numbers of samples: no indices, no single number for all."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.ndim > 0


def _watched(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(_varies(tensor))


def _with_other_neighbors(tensor: Tensor, at: int) -> Tensor:
    changed = tensor.clone()
    if _varies(tensor):
        others = changed.narrow(at, 1, tensor.shape[at] - 1)
        others.copy_(1.7 * others.flip(-1) + 0.5)
    return changed


def _weighed(output: Tensor) -> Tensor:
    return (output * torch.linspace(1, 2, output.numel()).to(output).view_as(output)).sum()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _largest(tensors: Iterable[Tensor]) -> float:
    return _worst(t.abs().max().item() for t in tensors if t.numel())


def _worst(deviations: Iterable[float]) -> float:
    """The largest, and NaN if there is one: `max` would pass over it."""
    return torch.tensor([0.0, *deviations], dtype=torch.float64).max().item()
