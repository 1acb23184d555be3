"""Differential privacy: what Opacus must know of converted models. Importing this module tells it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from nfnets import layers
from nfnets.blocks import Scale
from nfnets.errors import UserError
from nfnets.given import check_module
from nfnets.trace import couples, is_batch_norm_like, tensors_in
from nfnets.tuned import TunedNorm, _Tuned

if TYPE_CHECKING:
    from opacus.grad_sample import GradSampleModule

# What conversions leave that has parameters and buffers; the buffers are constants.
_LAYERS: tuple[type[nn.Module], ...] = (layers._ScaledStd, Scale, _Tuned, TunedNorm)


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
    # Poisson sampling draws empty batches, which torch's convolutions cannot differentiate under vmap.
    if len(backprops) == 0:
        return {p: p.new_zeros(0, *p.shape) for p in learned.values()}
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

    `PrivacyEngine().make_private(module=model)` does the same once `nfnets.privacy` is imported; this function is for
    per-sample gradients without an engine, and says more where a model is refused. Opacus refuses any trainable layer
    with buffers, for a buffer may hold statistics of the batch (BatchNorm's does). Those of scaled-standardized, fixed
    and tuned layers are constants that the conversion set, so they are let through. What the constants were measured
    on is not protected: convert with public images or with noise of the images' mean and variance, not with the
    private ones.

    Args:
        model: A model without BatchNorm, left as it is but for Opacus' hooks.
        **options: For `opacus.grad_sample.GradSampleModule`, such as `loss_reduction`.

    Returns:
        The wrapped model.

    Raises:
        UserError: no module, Opacus is not installed, or a layer that reads the batch or may keep something of it, such
            as a BatchNorm layer.

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
    if not _TAUGHT:
        raise UserError("per-sample gradients need Opacus, which is not installed: pip install opacus")
    from opacus.grad_sample import GradSampleModule

    for path, module in model.named_modules():
        trainable = any(p.requires_grad for p in module.parameters(recurse=False))
        keeps = next(module.buffers(recurse=False), None) is not None and not isinstance(module, _LAYERS)
        if _reads_the_batch(module) or (trainable and keeps):
            raise UserError(_refusal(path, module))
    return GradSampleModule(model, **options)


def _reads_the_batch(module: nn.Module) -> bool:
    """Whether a module couples samples: a BatchNorm that normalizes by the batch, with parameters or without, or one of
    ours that says so."""
    known = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return (known and (module.training or module.running_mean is None)) or bool(couples(module))


def _refusal(path: str, module: nn.Module) -> str:
    kind = type(module).__name__
    if is_batch_norm_like(module):
        return (
            f"{path}: a {kind}, which normalizes by the batch: expected a model without BatchNorm; "
            'convert it, nfnets.convert(model, images, method="nf")'
        )
    if what := couples(module):
        return (
            f"{path}: a {kind}, which couples {what}: expected a model whose samples are apart; convert the original "
            'anew, nfnets.convert(model, images, method="nf")'
        )
    names = ", ".join(name for name, _ in module.named_buffers(recurse=False))
    return (
        f"{path}: a trainable {kind} with buffers ({names}), which may hold something of the batch: expected none, as "
        "Opacus does; freeze the module, or make constants plain attributes"
    )


# What Opacus is taught. It has a registry for per-sample gradients, and none for the two things below.


@contextmanager
def _constants_aside(model: nn.Module) -> Iterator[None]:
    """While entered, our layers' constants are plain attributes, which Opacus has nothing against."""
    kept = [(module, module._buffers) for module in model.modules() if isinstance(module, _LAYERS)]
    try:
        for module, buffers in kept:
            module._buffers = {}
            module.__dict__.update(buffers)
        yield
    finally:
        for module, buffers in kept:
            for name in buffers:
                module.__dict__.pop(name, None)
            module._buffers = buffers


def _listen_to_outputs(hooks: Any) -> None:
    """Move Opacus' backward hooks from the modules to the tensors that these put out.

    A module's backward hook makes its output a view that nothing may write into: ResNets add their shortcut in place,
    ReLUs work in place. A tensor's hook still gets the gradient of what was put out.
    """
    handles = hooks.autograd_grad_sample_hooks
    for module in hooks._module.modules():
        # Of its full backward hooks, those that are Opacus'.
        own = [handle for handle in handles if handle.hooks_dict_ref() is module._backward_hooks]
        for handle in own:
            heard = module._backward_hooks[handle.id]
            handle.remove()
            handles[handles.index(handle)] = module.register_forward_hook(_listening(heard))
        if own and not module._backward_hooks:
            module._is_full_backward_hook = None


def _listening(heard: Callable[..., Any]) -> Callable[..., None]:
    """A forward hook: once the gradient of a module's output is there, `heard` is told, as a backward hook is."""

    def listen(module: nn.Module, _: Any, output: Any) -> None:
        put_out = next((t for t in tensors_in(output) if t.requires_grad), None)
        if put_out is not None:
            put_out.register_hook(lambda gradient: heard(module, None, (gradient,)))

    return listen


def _teach() -> bool:
    """Let Opacus' engine take converted models as they are; whether it is installed."""
    try:
        from opacus.grad_sample import GradSampleModule, register_grad_sampler
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
    except ImportError:
        return False
    if hasattr(GradSampleHooks.add_hooks, "__wrapped__"):  # this module runs again (a reload)
        return True
    check: Any = GradSampleHooks.validate.__func__  # type: ignore[attr-defined]
    add: Any = GradSampleHooks.add_hooks

    @wraps(check)
    def validate(cls: Any, module: nn.Module, *, strict: bool = False) -> list[NotImplementedError]:
        couple = [(path, m) for path, m in module.named_modules() if _reads_the_batch(m)]
        errors = [NotImplementedError(_refusal(path, m)) for path, m in couple]
        with _constants_aside(module):
            errors += check(cls, module, strict=False)
        if strict and errors:
            raise NotImplementedError(errors)
        return errors

    @wraps(add)
    def add_hooks(self: Any, *, force_functorch: bool = False, **options: Any) -> None:
        ours = [module for module in self._module.modules() if isinstance(module, _LAYERS)]
        register_grad_sampler([*{type(module) for module in ours}])(per_sample_gradients)
        with _constants_aside(self._module):
            add(self, force_functorch=force_functorch, **options)
        if force_functorch:
            for layer in ours:  # Opacus' would keep a copy of the constants
                layer.ft_compute_sample_grad = _by_functorch(layer)  # type: ignore[assignment]
        _listen_to_outputs(self)

    for kind in (GradSampleHooks, GradSampleModule):
        assert kind.add_hooks is add, f"opacus' {kind.__name__} adds hooks of its own"
    GradSampleHooks.validate = classmethod(validate)  # type: ignore[assignment]
    GradSampleHooks.add_hooks = add_hooks
    return True


def _by_functorch(layer: nn.Module) -> Callable[..., list[Tensor | None]]:
    """`per_sample_gradients` in the form in which Opacus calls what functorch made of a layer."""

    def compute(_: Any, activations: Tensor, backprops: Tensor) -> list[Tensor | None]:
        found = per_sample_gradients(layer, [activations], backprops)
        return [found.get(p) for p in layer.parameters()]  # type: ignore[arg-type]

    return compute


_TAUGHT = _teach()
