"""Theory: the moments that every node's output should have, propagated through the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nfnets import gains
from nfnets.errors import UserError
from nfnets.layers import _ScaledStd
from nfnets.marked import measured_constant
from nfnets.tailored import TailoredActivation
from nfnets.trace import Graph, Node, is_batch_norm_like
from nfnets.whose import runs_torchs_code


class Predicted(NamedTuple):
    """What is predicted of an activation."""

    mean: float
    """The mean that all channels share."""
    mean_sq: float
    """Average channel squared mean: mean_c(μ_c²), at least mean²."""
    var: float
    """Average channel variance: mean_c(σ_c²)."""


Moments = Predicted  # its name until signal had a `Moments` of its own

INPUT = Predicted(0.0, 0.0, 1.0)


Correct = Callable[[Node, Predicted], Predicted]


def predict(
    graph: Graph,
    first: Predicted = INPUT,
    correct: Correct | None = None,
    norms: Mapping[int, Tensor] | None = None,
) -> dict[int, Predicted]:
    """Propagate channel moments through a graph under the usual assumptions of signal propagation theory.

    Activations are independent over positions and normal around their channel's mean; weights are what they are.
    A convolution maps (μ, var) to var · ‖W_i‖² and μ² · (Σ W_i)², less what zero padding takes away; an activation
    maps a normal to the moments of act(z); sums add; averages over k positions divide the variance by k. Natural
    images are correlated over positions, so after average pooling the measurement lies above this prediction.

    Args:
        graph: from `nfnets.trace.trace`, with values (a graph on `meta` has no weights to read).
        first: moments of the model's inputs; N(0, 1) unless told otherwise.
        correct: called as `correct(node, moments)` in execution order; what it returns is propagated instead.
        norms: L2 norms of the layers' weights by node, where they are known: they need not be read again.

    Returns:
        Moments by node index.

    Example:
        >>> import torch
        >>> from nfnets.trace import trace
        >>> graph = trace(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()), torch.randn(4, 8, 5, 5))
        >>> round(predict(graph)[2].var, 3)
        0.341

    Paper: arXiv 2101.08692 §3; (1 − 1/π)/2 = 0.341 is the ReLU's variance.
    """
    state: dict[int, Predicted] = {}
    constant: set[int] = set()  # computed from parameters alone, such as a reshaped bias
    for node in graph.nodes:
        if node.kind == "function" and constant.issuperset(node.inputs):
            constant.add(node.index)
        used = [i for i in node.inputs if i not in constant] if node.name in _ARITHMETIC else node.inputs
        inputs = [state[i] for i in used]
        moments = _step(graph, node, inputs, norms or {}) if inputs else first
        state[node.index] = moments if correct is None else correct(node, moments)
    return state


_ARITHMETIC = ("add", "sub", "mul", "div")  # a parameter that is added or multiplied is taken for 0 and 1


def _step(graph: Graph, node: Node, inputs: list[Predicted], norms: Mapping[int, Tensor]) -> Predicted:
    x = inputs[0]
    module = node.module
    if module is not None and is_batch_norm_like(module):
        return _normalized(module)
    if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
        return _weighted(module, graph, node, x, norms.get(node.index))
    if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.modules.batchnorm._NormBase):
        return _normalized(module)
    if node.name == "add" or node.name == "sub":
        return _sum(inputs, node.constants)
    if node.name == "cat":
        return _concatenated(graph, node, inputs)
    if node.name in ("mul", "div"):
        return _product(node, inputs)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return _dropped(module, x)
    pooled = _pool(graph, node, x)
    if pooled is not None:
        return pooled
    activation = activation_at(node)
    return x if activation is None else _activated(activation, x)


def _dropped(dropout: Any, x: Predicted) -> Predicted:
    """In training dropout keeps the mean and divides the mean square by 1 − p; that for SELU keeps both."""
    if (
        not dropout.training
        or dropout.p == 1
        or isinstance(dropout, nn.AlphaDropout | nn.FeatureAlphaDropout)
    ):
        return x
    return Predicted(x.mean, x.mean_sq, (x.var + x.mean_sq) / (1 - dropout.p) - x.mean_sq)


def _normalized(norm: nn.Module) -> Predicted:
    """A norm layer in training mode: its affine map of zero mean and unit variance."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    var = 1.0 if weight is None else _averages(weight)[1]
    mean, mean_sq = (0.0, 0.0) if bias is None else _averages(bias)
    moments = Predicted(mean, mean_sq, var)
    fused = getattr(norm, "act", None)
    return _activated(fused, moments) if isinstance(fused, nn.Module) else moments


def _averages(vector: Tensor) -> tuple[float, float]:
    """Mean and mean square of a parameter's values."""
    values = vector.detach().double().flatten()
    return float(values.mean()), float(values @ values) / max(1, values.numel())


def _weighted(layer: nn.Module, graph: Graph, node: Node, x: Predicted, norm: Tensor | None) -> Predicted:
    """Σ over the receptive field: variances add with ‖W_i‖², a shared mean with Σ W_i, channel means with both."""
    weight, bias = _effective(layer, graph.nodes[node.inputs[0]].shape)
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        weight = weight / math.sqrt(math.prod(layer.stride))  # so many taps reach one output
    units = len(weight)
    energy = float(norm if norm is not None and _as_stored(layer) else weight.norm()) ** 2 / units
    spread = max(0.0, x.mean_sq - x.mean**2)
    several = spread > 0 and weight.shape[2:].numel() > 1  # of one tap the sum over taps is the weight
    per_channel = float(weight.flatten(2).sum(2).norm()) ** 2 / units if several else energy
    # Nothing with a mean comes in right after a norm layer without a bias.
    shared, shared_sq = _averages(weight.flatten(1).sum(1)) if x.mean else (0.0, 0.0)
    inside = share_inside(layer, graph, node)
    mean = x.mean * shared
    mean_sq = x.mean**2 * shared_sq + spread * per_channel
    if bias is not None:
        bias_mean, bias_sq = _averages(bias)
        mean, mean_sq = mean + bias_mean, mean_sq + bias_sq
    if measured := measured_constant(layer):
        # Its constant was: before α the variance is 1 by design, or what gains have made of it since.
        mean, mean_sq = (0.0, 0.0) if measured.centred else (mean, mean_sq)
        gain = (layer.alpha * layer.gain).detach().double()  # type: ignore
        return Predicted(mean, mean_sq, float(gain.pow(2).mean()) / measured.square)
    return Predicted(mean, mean_sq, x.var * energy * inside)


_CALLS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear}


class _Spy(TorchFunctionMode):
    """Keeps the weight and bias that a layer's forward really runs with."""

    def __init__(self) -> None:
        super().__init__()
        self.used: tuple[Tensor, Tensor | None] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CALLS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.used = weight, args[2] if len(args) > 2 else kwargs.get("bias")
        return func(*args, **kwargs)


def _as_stored(layer: nn.Module) -> bool:
    """Whether a layer's one weight is used as it is, in fp32 as all that is predicted."""
    weight = layer._parameters.get("weight")
    stored = weight is not None and weight.dtype is torch.float32 and runs_torchs_code(layer)
    return stored and not isinstance(layer, nn.modules.conv._ConvTransposeNd)


def _effective(layer: Any, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """A layer's weight as it is used: computed ones too, such as timm's own standardized convolutions."""
    plain = runs_torchs_code(layer)
    if plain or isinstance(layer, _ScaledStd):
        weight, bias = (
            (layer.weight, layer.bias) if plain else (layer.effective_weight(), layer.effective_bias())
        )
        return weight.detach().float(), bias
    with torch.no_grad(), _Spy() as spy:
        layer.forward(torch.zeros((1, *shape[1:]), device=layer.weight.device, dtype=layer.weight.dtype))
    weight, bias = spy.used or (layer.weight, layer.bias)
    return weight.detach().float(), bias


def share_inside(layer: nn.Module, graph: Graph, node: Node) -> float:
    """The share of a filter's taps that fall inside the map rather than on zero padding."""
    padding = getattr(layer, "padding", 0)
    if not isinstance(padding, tuple) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return 1.0
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return 1.0
    share = 1.0
    sizes = graph.nodes[node.inputs[0]].shape[2:]
    geometry: Any = zip(sizes, layer.kernel_size, layer.stride, padding, layer.dilation, strict=False)  # type: ignore
    for size, kernel, stride, pad, dilation in geometry:
        starts = np.arange(0, size + 2 * pad - dilation * (kernel - 1), stride) - pad
        taps = starts[:, None] + dilation * np.arange(kernel)[None]
        share *= float(((taps >= 0) & (taps < size)).mean()) if taps.size else 1.0
    return share


def _sum(inputs: list[Predicted], constants: tuple[float, ...]) -> Predicted:
    mean = sum(m.mean for m in inputs)
    spread = sum(max(0.0, m.mean_sq - m.mean**2) for m in inputs)
    if len(inputs) == 1 and len(constants) == 1:
        mean += constants[0]
    return Predicted(mean, mean**2 + spread, sum(m.var for m in inputs))


def _concatenated(graph: Graph, node: Node, inputs: list[Predicted]) -> Predicted:
    channels = [graph.nodes[i].shape[1] if len(graph.nodes[i].shape) > 1 else 1 for i in node.inputs]
    weights = np.array(channels) / sum(channels)
    mean, mean_sq, var = (float(np.dot(weights, column)) for column in zip(*inputs, strict=True))
    return Predicted(mean, mean_sq, var)


def _product(node: Node, inputs: list[Predicted]) -> Predicted:
    x = inputs[0]
    if len(inputs) == 1:
        factor = math.prod(node.constants) if node.constants else 1.0
        factor = 1.0 / factor if node.name == "div" and factor else factor
        return Predicted(x.mean * factor, x.mean_sq * factor**2, x.var * factor**2)
    if node.name == "div" or len(inputs) != 2 or node.inputs[0] == node.inputs[1]:
        return x
    y = inputs[1]  # independent factors: E[(xy)²] = E[x²]·E[y²], a gate's variance counts for little
    mean, mean_sq = x.mean * y.mean, x.mean_sq * y.mean_sq
    return Predicted(mean, mean_sq, (x.var + x.mean_sq) * (y.var + y.mean_sq) - mean_sq)


def _pool_name(node: Node) -> str:
    return type(node.module).__name__.lower() if node.module is not None else node.name.replace("_", "")


def pools(node: Node) -> bool:
    """Whether a node pools over positions."""
    name = _pool_name(node)
    return bool(node.inputs) and ("pool" in name or name == "mean")


def _pool(graph: Graph, node: Node, x: Predicted) -> Predicted | None:
    """Averages divide the variance by the window; a maximum of k normals moves the mean and shrinks the variance."""
    name = _pool_name(node)
    before, after = graph.nodes[node.inputs[0]].shape, node.shape
    if pools(node):
        window = _window(node, before, after)
        if "max" in name:
            center, var = _maximum(window)
            spread = max(0.0, x.mean_sq - x.mean**2)
            mean = x.mean + math.sqrt(x.var) * center
            return Predicted(mean, mean**2 + spread, x.var * var)
        return Predicted(x.mean, x.mean_sq, x.var / window)
    return None


def _window(node: Node, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    kernel = getattr(node.module, "kernel_size", None)
    rank = len(before) - 2
    if kernel is None and node.kind == "function" and node.constants and "adaptive" not in node.name:
        kernel = int(node.constants[0]) if node.name.endswith(("pool1d", "pool2d", "pool3d")) else None
    if kernel is not None:
        return kernel**rank if isinstance(kernel, int) else math.prod(kernel)
    return max(1, math.prod(before) // max(1, math.prod(after)))


def _maximum(count: int) -> tuple[float, float]:
    """Mean and variance of the maximum of `count` independent N(0, 1), by quadrature."""
    if count <= 1:
        return 0.0, 1.0
    z = np.linspace(-8.0, 8.0, 4001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    below = np.cumsum(density) * (z[1] - z[0])
    weights = count * np.clip(below, 0, 1) ** (count - 1) * density
    weights /= weights.sum()
    mean = float(weights @ z)
    return mean, float(weights @ (z - mean) ** 2)


def activation_at(node: Node) -> nn.Module | Callable[[Tensor], Tensor] | str | None:
    """The node's activation as `gains` takes it, or None if it is none."""
    if node.kind == "module":
        module = node.module
        if isinstance(module, TailoredActivation):
            return module
        known = module is not None and type(module).__module__ == "torch.nn.modules.activation"
        return module if known and not isinstance(module, nn.MultiheadAttention | nn.Softmax) else None
    if node.name == "leaky_relu" and node.constants:
        return nn.LeakyReLU(node.constants[0])
    return node.name if node.name in _FUNCTIONS else None


_FUNCTIONS = {"relu", "relu6", "silu", "gelu", "elu", "celu", "selu", "sigmoid", "tanh", "softplus", "mish"}
_FUNCTIONS |= {"leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "softsign", "logsigmoid"}


def _activated(activation: Any, x: Predicted) -> Predicted:
    """Channel means are themselves normal around the shared mean: average the channels' moments over them."""
    if not all(map(math.isfinite, x)):
        return x
    spread = math.sqrt(max(0.0, x.mean_sq - x.mean**2))
    nodes, weights = _hermite(8) if spread > 1e-3 * math.sqrt(x.var + 1e-12) else (np.zeros(1), np.ones(1))
    try:
        found = [gains.moments(activation, mean=x.mean + spread * z, var=max(x.var, 1e-12)) for z in nodes]
    except UserError:
        return x
    means, variances = (np.array(column) for column in zip(*found, strict=True))
    return Predicted(float(weights @ means), float(weights @ means**2), float(weights @ variances))


def _hermite(count: int) -> tuple[np.ndarray, np.ndarray]:
    z, w = np.polynomial.hermite_e.hermegauss(count)
    return z, w / w.sum()
