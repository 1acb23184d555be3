"""Whether a convolution or linear of somebody else's class applies its own weight and bias, and nothing after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nfnets.computed import has_own_weight
from nfnets.copying import twin_of
from nfnets.scale.knob import knob
from nfnets.skip_layers import SCALAR
from nfnets.structure.walk import computes_weight, hooks_of, is_hooked, is_weighted
from nfnets.trace import Graph, Node, preserved

_CALLS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}


class _Watch(TorchFunctionMode):
    """Keeps what every convolution and matrix product was called with, and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _CALLS:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            self.seen.append((given.get("weight"), given.get("bias"), output))
        return output


def affine_in_parameters(graph: Graph, node: Node | None) -> bool:
    """Whether a layer's output is its weight applied to something that depends on the input alone, plus its bias.

    Torch's own layers are. A subclass with a forward of its own (padding as TensorFlow's, say) is watched for one
    call on zeros: it must make one convolution or matrix product, of its weight and its bias as they are, and return
    the result untouched. Nothing is computed on `meta`, and the answer is the same there.

    Args:
        graph: of the model.
        node: a call of the layer; None for no layer.
    """
    layer = None if node is None else node.module
    if node is None or layer is None or not is_weighted(layer) or has_own_weight(layer):
        return has_own_weight(layer)
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or not isinstance(layer.bias, Tensor | None) or not node.inputs:
        return False
    twin = layer if bias is not None else with_parameters(layer, bias=weight.new_zeros(units(layer)).detach())
    shape = (1, *graph.nodes[node.inputs[0]].shape[1:])
    with preserved(layer), torch.no_grad(), _Watch() as watch:
        try:
            output = twin.forward(torch.zeros(shape, device=weight.device, dtype=weight.dtype))
        except Exception:  # it wants more than a tensor of this shape: whatever it does, it is not this
            return False
    return [(w is twin.weight, b is twin.bias, o is output) for w, b, o in watch.seen] == [(True, True, True)]


def follows_weight(graph: Graph, node: Node) -> bool:
    """Whether twice the weight makes twice the output (less the bias): not so where a layer's own forward standardizes
    its weight, or squashes what it computed.

    A layer whose forward wants more than one tensor is taken to follow: whoever scales it must look again.

    Args:
        graph: of the model.
        node: a call of a convolution or linear that has a knob.
    """
    layer: Any = node.module
    found = knob(layer)
    weight = layer._parameters.get("weight")
    if isinstance(found, str) or found.trusted or weight is None or weight.is_meta or not node.inputs:
        return True
    bias = {} if layer._parameters.get("bias") is None else {"bias": torch.zeros_like(layer.bias)}
    with preserved(layer), torch.no_grad():
        x = torch.randn((2, *graph.nodes[node.inputs[0]].shape[1:]), device=weight.device).to(weight.dtype)
        try:
            once, twice = (
                with_parameters(layer, weight=factor * weight.detach(), **bias).forward(x).double()
                for factor in (1, 2)
            )
        except Exception:
            return True
    error = (twice - 2 * once).norm() / (twice.norm() + once.norm())
    return not bool(error > (0.02 if weight.element_size() < 4 else 1e-3))


def units(layer: nn.Module) -> int:
    """Output channels or features of a convolution or linear."""
    return int(getattr(layer, "out_channels", None) or layer.out_features)  # type: ignore[arg-type]


def with_parameters(module: nn.Module, **parameters: Tensor) -> nn.Module:
    """A twin of a module that shares everything but the given parameters.

    They require gradients where those did that they replace; a new one, where any of the module's does.
    """
    twin = twin_of(module)
    learns = any(parameter.requires_grad for parameter in module.parameters())
    for name, value in parameters.items():
        old = module._parameters.get(name)
        twin._parameters[name] = nn.Parameter(value, learns if old is None else old.requires_grad)
    return twin


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOKS += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_HOOKS += ("_is_full_backward_hook",)


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module's hooks to what stands in its place; their handles still remove them.

    Not so if any is of `torch.nn.utils`: what computes a weight needs the module that has it.
    """
    own = new._forward_hooks or new._forward_pre_hooks
    if not own and is_hooked(old) and not any(computes_weight(hook) for hook in hooks_of(old)):
        for name in _HOOKS:
            setattr(new, name, getattr(old, name))
        if SCALAR in old._parameters and SCALAR not in new._parameters:  # our own hook reads it
            new.register_parameter(SCALAR, old._parameters[SCALAR])
