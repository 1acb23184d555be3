"""What the layers of the BatchNorm model put out before anything changes: its scale is the one to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nfnets.convert.sites import is_weighted
from nfnets.init.knob import knob, scaled_to
from nfnets.init.one_pass import Call, Write
from nfnets.trace import Graph, Node, is_batch_norm_like

FACTOR = 2.0
"""How far a scale may move from the BatchNorm model's before it is set to it."""


class Reference(dict[str, Tensor]):
    """Mean squares of what convolutions and linears put out at their first calls, by path; empty if not measured."""

    def visit(self, node: Node, output: Tensor) -> None:
        """Measure one output, as the tracer meets it; nothing waits for the device."""
        if is_weighted(node.module) and node.path not in self and not output.is_meta and output.numel():
            norm = torch.linalg.vector_norm(output.detach(), dtype=torch.float32)
            self[node.path] = norm.square() / output.numel()

    def rms(self, path: str) -> float:
        """Root mean square of a layer's output; infinite if it was not measured, or is 0 and tells nothing."""
        level = self.get(path)
        return math.inf if level is None else math.sqrt(float(level)) or math.inf


def heads(graph: Graph, reference: Reference) -> dict[str, float]:
    """Mean squares of the layers that nothing but the outputs follows: classifiers, box regressors, …"""
    found: dict[str, float] = {}
    seen: set[int] = set()
    waiting = list(graph.outputs)
    while waiting:
        index = waiting.pop()
        node = graph.nodes[index]
        if index in seen or (node.module is not None and is_batch_norm_like(node.module)):
            continue
        seen.add(index)
        if not is_weighted(node.module):
            waiting += node.inputs if len(node.inputs) < 2 or node.name != "add" else ()
        elif node.path in reference and (square := float(reference[node.path])) > 0:
            found[node.path] = square
    return found


def rescale_heads(wanted: Mapping[str, float], write: Write) -> Callable[[Call], Tensor | None]:
    """For `one_pass`: the weight of a head whose output left the BatchNorm model's by more than `FACTOR` is scaled
    so that the root mean square is the same.

    c of mean((c·z + b)²) = wanted, z the output less the bias. A head that a positive c cannot set (its bias alone is
    larger, or z is zero) stays.
    """

    def rescale(call: Call) -> Tensor | None:
        if call.index or call.path not in wanted or not call.output.is_floating_point():
            return None
        target, layer = wanted[call.path], knob(call.module)
        if isinstance(layer, str) or not layer.trusted or not layer.parameter.requires_grad:
            return None
        out = call.output.float()
        shape = (-1,) + (1,) * (-layer.channel_dim - 1)
        bias = layer.effective_bias()
        bias = out.new_zeros(1) if bias is None else bias.float()
        rest = out - bias.reshape(shape)
        square, cross = float(rest.square().mean()), float((rest * bias.reshape(shape)).mean())
        constant = float(bias.square().mean()) - target
        now = square + 2 * cross + constant + target
        root = cross**2 - square * constant
        if not math.isfinite(now) or 1 / FACTOR**2 <= now / target <= FACTOR**2 or root < 0 or square == 0:
            return None
        factor = (math.sqrt(root) - cross) / square
        if not (math.isfinite(factor) and factor > 0):
            return None
        write(layer.parameter, layer.parameter.detach() * factor)
        return scaled_to(call.output, torch.tensor(factor), (1 - factor) * bias, layer.channel_dim)

    return rescale
