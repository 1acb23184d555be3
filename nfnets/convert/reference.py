"""What the layers of the BatchNorm model put out before anything changes: its scale is the one to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from nfnets.convert.sites import is_weighted
from nfnets.init.ends import kills
from nfnets.init.knob import Knob, knob, origin_of, scaled_to
from nfnets.init.one_pass import Call, Write
from nfnets.trace import Graph, Node, is_batch_norm_like

FACTOR = 2.0
"""How far a scale may move from the BatchNorm model's before it is set to it."""


_TRIES = 20
"""How often a layer is run to find the multiple of its weight that fits."""


class AtMost(float):
    """A mean square that `keep_scales` is to keep from above alone."""


class Reference:
    """Root mean squares of what the model's layers put out; empty where nothing could be measured.

    Args:
        everything: of every node of the graph; otherwise of convolutions and linears only.
    """

    def __init__(self, everything: bool = False):
        self.everything = everything
        self._squares: dict[int, Tensor] = {}
        self._first: dict[str, int] = {}

    def visit(self, node: Node, output: Tensor) -> None:
        """Measure one output, as the tracer meets it; nothing waits for the device."""
        if node.index == 0:  # another pass
            self._squares.clear()
            self._first.clear()
        weighted = is_weighted(node.module)
        wanted = weighted or (self.everything and output.is_floating_point())
        if wanted and not output.is_meta and output.numel():
            wide = torch.promote_types(output.dtype, torch.float32)
            norm = torch.linalg.vector_norm(output.detach(), dtype=wide)
            self._squares[node.index] = norm.square() / output.numel()
            if weighted:
                self._first.setdefault(node.path, node.index)

    def at(self, index: int) -> float:
        """Of a node's output; 0 if it was not measured."""
        square = self._squares.get(index)
        return 0.0 if square is None else math.sqrt(float(square))

    def rms(self, path: str) -> float:
        """Of a layer's output at its first call; infinite if it was not measured, or is 0 and tells nothing."""
        return self.at(self._first.get(path, -1)) or math.inf


def heads(graph: Graph, reference: Reference) -> dict[str, float]:
    """Mean squares of the layers that nothing but the outputs follows: classifiers, box regressors, …"""
    found: dict[str, float] = {}
    layers = [node.index for node in graph.nodes if is_weighted(node.module)]
    seen: set[int] = set()
    waiting = list(graph.outputs)
    while waiting:
        index = waiting.pop()
        node = graph.nodes[index]
        if index in seen or is_norm(node):
            continue
        seen.add(index)
        if not is_weighted(node.module):
            waiting += node.inputs if len(node.inputs) < 2 or node.name != "add" else ()
        elif math.isfinite(rms := reference.rms(node.path)) and not graph.followed(index, layers):
            found[node.path] = rms**2
    return found


def kept(graph: Graph, reference: Reference) -> dict[str, float | None]:
    """What `keep_scales` is to look after: heads with their mean squares, and hidden layers, with None: those whose
    output nothing but a ReLU reads (the first layer of a squeeze-excite gate)."""
    found: dict[str, float | None] = {}
    for node in graph.nodes:
        readers = [graph.nodes[i] for i in graph.consumers(node.index)]
        alone = len(readers) == 1 and len(graph.calls(node.path)) == 1
        if is_weighted(node.module) and alone and kills(readers[0]) and not is_norm(readers[0]):
            found[node.path] = None
    return found | heads(graph, reference)


def is_norm(node: Node) -> bool:
    """Whether a node is a call of a batch norm layer."""
    return node.module is not None and is_batch_norm_like(node.module)


def keep_scales(wanted: Mapping[str, float | None], write: Write) -> Callable[[Call], Tensor | None]:
    """For `one_pass`: the weight of a head whose output left the BatchNorm model's by more than `FACTOR` is scaled
    so that the root mean square is the same, of a layer with `AtMost` only if it is too large; a hidden layer that no
    example activates changes its sign.

    c of mean((c·z + b)²) = wanted, z the output less the bias. A head that a positive c cannot set (its bias alone is
    larger, or z is zero) stays. Where the output need not follow the weight (a max-norm, as a parametrization or in
    the forward), the layer is run again until it fits. Without norm layers the features that a gate reads have means,
    and a few hidden units may all be off for all samples: of a symmetric draw the negative is as good.
    """

    def rescale(call: Call) -> Tensor | None:
        if call.index or call.path not in wanted or not call.output.is_floating_point():
            return None
        target, layer = wanted[call.path], knob(call.module)
        parameter = origin_of(call.module) if isinstance(layer, str) else layer.parameter
        if parameter is None or not parameter.requires_grad:
            return None
        if isinstance(layer, str) or not layer.trusted:
            return None if target is None else _tried(call, parameter, target, write)
        if target is None:
            return _woken(call, layer, write)
        out = call.output.float()
        shape = (-1,) + (1,) * (-layer.channel_dim - 1)
        bias = layer.effective_bias()
        bias = out.new_zeros(1) if bias is None else bias.float()
        rest = out - bias.reshape(shape)
        square, cross = float(rest.square().mean()), float((rest * bias.reshape(shape)).mean())
        constant = float(bias.square().mean()) - target
        now = square + 2 * cross + constant + target
        root = cross**2 - square * constant
        if not _left(now, target) or root < 0 or square == 0:
            return None
        factor = (math.sqrt(root) - cross) / square
        if not (math.isfinite(factor) and factor > 0):
            return None
        write(layer.parameter, layer.parameter.detach() * factor)
        return scaled_to(call.output, out.new_tensor(factor), (1 - factor) * bias, layer.channel_dim)

    return rescale


def _left(now: float, target: float) -> bool:
    least = 0.0 if isinstance(target, AtMost) else 1 / FACTOR**2
    return math.isfinite(now) and not least <= now / target <= FACTOR**2


def _tried(call: Call, parameter: nn.Parameter, target: float, write: Write) -> Tensor | None:
    """The output at the multiple of a parameter that gives it the wanted mean square; None, and all as it was, if there
    is none: spectral norm takes every factor back."""
    old, factor, output = parameter.detach().clone(), 1.0, call.output
    now = float(output.float().square().mean())
    if not _left(now, target):
        return None
    for _ in range(_TRIES):
        if not 0 < now < math.inf:
            break
        factor *= math.sqrt(target / now)
        write(parameter, old * factor)
        output = call.rerun()
        now = float(output.float().square().mean())
        if math.isclose(now, target, rel_tol=0.02):
            return output
    write(parameter, old)
    return None


def _woken(call: Call, layer: Knob, write: Write) -> Tensor | None:
    if not call.output.numel() or float(call.output.amax()) > 0 or float(call.output.amin()) == 0:
        return None
    for parameter in (layer.parameter, layer.bias):
        if parameter is not None:
            write(parameter, -parameter.detach())
    return -call.output
