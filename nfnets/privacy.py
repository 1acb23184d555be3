"""Differential privacy: per-sample gradients of converted models, for Opacus."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from nfnets import layers
from nfnets.blocks import Scale
from nfnets.errors import UserError
from nfnets.given import check_module
from nfnets.trace import is_batch_norm_like

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule

# What conversions leave that has parameters and buffers; the buffers are constants.
_LAYERS: tuple[type[nn.Module], ...] = (layers._ScaledStd, Scale)


class _Copy(nn.Identity):
    """What stands where a norm layer stood hands on a copy, for ResNets add their shortcut in place.

    Opacus' hooks make a layer's output a view that autograd lets nothing write into.
    """

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()


def per_sample_gradients(
    layer: nn.Module, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Gradients of a scaled-standardized layer's (or another's) parameters, a row for each sample.

    ∂L_n/∂θ = Σ ∂y_n/∂θ · ∂L_n/∂y_n, through the standardization to weight, gain and bias.

    Args:
        layer: A scaled-standardized layer, or any that couples no samples. Its buffers are constants.
        activations: Its input (N, …), alone in a list, as Opacus' grad samplers take it.
        backprops: The loss's gradients by its output (N, …).

    Returns:
        By parameter that requires a gradient, a tensor of shape (N, *parameter's shape).

    Raises:
        UserError: `layer` is no module.

    Example:
        >>> import torch
        >>> layer = layers.ScaledStdConv2d(3, 8, 3)
        >>> found = per_sample_gradients(layer, [torch.randn(4, 3, 8, 8)], torch.randn(4, 8, 6, 6))
        >>> found[layer.weight].shape, found[layer.gain].shape
        (torch.Size([4, 8, 3, 3, 3]), torch.Size([4, 8]))

    Checked against one backward pass for each sample.
    """
    check_module(layer, "layer")
    learned = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    others = {name: p.detach() for name, p in layer.named_parameters() if not p.requires_grad}
    others |= dict(layer.named_buffers())

    def product(parameters: dict[str, Tensor], x: Tensor, backprop: Tensor) -> Tensor:
        y = functional_call(layer, {**others, **parameters}, (x.unsqueeze(0),))
        return (y * backprop.unsqueeze(0)).sum()

    values = {name: p.detach() for name, p in learned.items()}
    with _unhooked(layer):
        per_sample = vmap(grad(product), in_dims=(None, 0, 0))
        found = per_sample(values, activations[0].to(backprops.dtype), backprops)
    return {p: found[name] for name, p in learned.items()}


@contextmanager
def _unhooked(layer: nn.Module) -> Iterator[None]:
    """While entered, the layer's hooks (Opacus' own) see nothing."""
    kept = {name: getattr(layer, name) for name in ("_forward_hooks", "_backward_hooks")}
    try:
        for name in kept:
            setattr(layer, name, OrderedDict())
        yield
    finally:
        for name, hooks in kept.items():
            setattr(layer, name, hooks)


def grad_sample_module(model: nn.Module, **options: Any) -> GradSampleModule:
    """Wrap a converted model for Opacus, which then computes per-sample gradients of every layer.

    Opacus refuses any trainable layer with buffers, for a buffer may hold statistics of the batch (BatchNorm's
    does). Those of scaled-standardized and fixed-variance layers are constants that the conversion set, so they are
    let through; all others are refused here as Opacus would. What the constants were measured on is not protected:
    convert with public images or with noise of the images' mean and variance, not with the private ones.

    Args:
        model: A model without BatchNorm. Its activations no longer work in place.
        **options: For `opacus.grad_sample.GradSampleModule`, such as `loss_reduction`.

    Returns:
        The wrapped model, for `PrivacyEngine().make_private(module=…)`.

    Raises:
        UserError: no module, Opacus is not installed, or a layer with buffers is left, such as a BatchNorm layer.

    Example:
        >>> import torch
        >>> model = nn.Sequential(layers.ScaledStdConv2d(3, 8, 3), nn.Identity(), nn.ReLU(inplace=True), nn.Flatten())
        >>> private = grad_sample_module(model)  # doctest: +SKIP
        >>> private(torch.randn(4, 3, 8, 8)).square().sum().backward()  # doctest: +SKIP
        >>> model[0].weight.grad_sample.shape  # doctest: +SKIP
        torch.Size([4, 8, 3, 3, 3])

    Checked against opacus 1.6.
    """
    check_module(model)
    try:
        from opacus.grad_sample import GradSampleModule, register_grad_sampler
    except ImportError:
        raise UserError(
            "per-sample gradients need Opacus, which is not installed: pip install opacus"
        ) from None
    ours: set[type[nn.Module]] = set()
    for path, module in model.named_modules():
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        if trainable and next(module.buffers(recurse=False), None) is not None:
            if not isinstance(module, _LAYERS):
                raise UserError(_refusal(path, module))
            ours.add(type(module))
    for module in list(model.modules()):
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
        for name, child in module.named_children():
            if type(child) is nn.Identity:
                setattr(module, name, _Copy())
    register_grad_sampler(list(ours))(per_sample_gradients)
    given: dict[str, Any] = {"strict": False} | options
    return GradSampleModule(model, **given)


def _refusal(path: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if is_batch_norm_like(module):
        return (
            f"{path}: a {kind}, which normalizes by the batch: expected a model without BatchNorm; "
            'convert it, nfnets.convert(model, images, method="nf")'
        )
    names = ", ".join(name for name, _ in module.named_buffers(recurse=False))
    return (
        f"{path}: a trainable {kind} with buffers ({names}), which may hold something of the batch: expected none, as "
        "Opacus does; freeze the module, or make constants plain attributes"
    )
