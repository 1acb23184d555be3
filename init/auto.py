"""AutoInit: every weight from the moments that its layer receives by theory; no data is looked at."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
from torch import nn

from nfnets.errors import UserError, unknown
from nfnets.graph import REARRANGING, Graph, Node
from nfnets.init.drawn import filled
from nfnets.init.reading import few_samples
from nfnets.init.weights import fan_in, full, settable, zero_bias
from nfnets.layers import Scale, SkipInit
from nfnets.predict import Predicted, activation_at, pools, predict, share_inside
from nfnets.scale.knob import Knob
from nfnets.scale.one_pass import Write, check, transaction
from nfnets.scale.report import Report, Row

Distribution = Literal["normal", "uniform", "truncated"]

# What `predict` has an estimator for, or what leaves the values as they are. Of everything else it assumes that.
_ESTIMATED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_ESTIMATED += (
    nn.modules.dropout._DropoutNd,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.PixelShuffle,
    Scale,
    SkipInit,
)
_ESTIMATED += (nn.PixelUnshuffle, nn.ChannelShuffle, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.RNNBase)
_ARITHMETIC = {"add", "sub", "mul", "div", "cat", "stack", "neg"}
_SHAPES = REARRANGING | {"T", "expand", "repeat"}


def autoinit_(
    model: nn.Module,
    *inputs: Any,
    input_mean: float = 0.0,
    input_var: float = 1.0,
    distribution: Distribution = "normal",
    strict: bool = True,
    generator: torch.Generator | None = None,
    layers: Collection[str] | None = None,
    **kwargs: Any,
) -> Report:
    """Draw every weight so that its layer's output has mean 0 and mean square 1, by theory alone.

        Var(w) = 1 / (fan_in · s · E[x²]),   E[x²] = m² + v of what the layer receives

    s is the share of a filter's taps that fall on the map and not on zero padding. The moments are propagated through
    the graph from N(`input_mean`, `input_var`): activations by quadrature, pools, sums, products, concatenations,
    dropout and norm layers by their estimators (`nfnets.predict.predict`). A layer's output has mean square 1 on
    average over the draws, and what of it is channel means and what variance is propagated apart. Biases are 0.

    Assumed are values that are independent over positions, as of white noise, and what the report's `assumed` lists:
    operations without an estimator keep the moments they are given. Natural images lose variance against this in
    every convolution with random signs, and more in pools: `initialize` measures beside what is promised.

    Args:
        model: changed in place.
        *inputs: example inputs, as `model(*inputs)` takes them; only shapes matter.
        input_mean, input_var: moments of the inputs.
        distribution: `"normal"`, `"uniform"` or `"truncated"`.
        strict: refuse a model with standardized or parametrized weights; otherwise leave those as `refused`.
        generator: source of randomness; torch's global one by default.
        layers: paths of the layers to set; None for all. The others count with the weights they have.
        **kwargs: keyword arguments of the forward.

    Returns:
        A `Report`: a row per layer, `promised` the root mean square of its output.

    Raises:
        UserError: moments that are none, no layers, computed weights, inputs the model rejects; nothing is changed.

    Example:
        >>> model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 10))
        >>> report = autoinit_(model, torch.randn(4, 100))
        >>> [row.reason for row in report]  # He behind a ReLU, as the mean square is 1/2
        ['E[x²] = 1: std √(1/100)', 'E[x²] = 0.5: std √(2/100)', 'E[x²] = 0.3943: std √(2.536/100)']

    Paper: arXiv 2109.08958. Written from its equations; checked against He's and closed forms of moments.
    """
    if distribution not in get_args(Distribution):
        raise unknown("distribution", str(distribution), get_args(Distribution))
    if not (math.isfinite(input_mean) and 0 <= input_var < math.inf) or input_mean == input_var == 0:
        raise UserError(
            f"input_mean={input_mean}, input_var={input_var}: expected finite numbers, a variance of 0 or more, "
            "and not both 0; pass the moments of your data"
        )
    check(model, inputs, kwargs)
    knobs, left = settable(model, "AutoInit", layers, strict)
    graph = few_samples(model, inputs, kwargs)
    with transaction() as write:
        step = _Step(graph, knobs, distribution, generator, write)
        predict(graph, Predicted(input_mean, input_mean**2, input_var), step)
    missing = [Row(path, "unreached", "no call of it") for path in knobs if path not in step.done]
    given = f"inputs of mean {input_mean:g} and variance {input_var:g}, independent over positions"
    return Report("AutoInit", [*step.done.values(), *left, *missing], [given, *taken_as_is(graph)])


class _Step:
    """What `predict` calls at every node: draws the weight of a layer, and says what comes out of it then."""

    def __init__(
        self,
        graph: Graph,
        knobs: dict[str, Knob],
        distribution: str,
        generator: torch.Generator | None,
        write: Write,
    ):
        self.graph, self.knobs, self.distribution = graph, knobs, distribution
        self.generator, self.write = generator, write
        self.seen: dict[int, Predicted] = {}
        self.done: dict[str, Row] = {}

    def __call__(self, node: Node, moments: Predicted) -> Predicted:
        self.seen[node.index] = self._set(node, moments)
        return self.seen[node.index]

    def _set(self, node: Node, moments: Predicted) -> Predicted:
        layer = self.knobs.get(node.path) if node.kind == "module" else None
        if layer is None or node.path in self.done:
            return moments
        x = self.seen[node.inputs[0]]
        square = x.var + x.mean_sq
        if isinstance(node.module, nn.MultiheadAttention):
            self.done[node.path] = Row(node.path, "skipped", "attention has no estimator")
            return moments
        if not 0 < square < math.inf:
            self.done[node.path] = Row(
                node.path, "skipped", f"by theory its input has the mean square {square:.3g}"
            )
            return moments
        reached = share_inside(node.module, self.graph, node)  # type: ignore[arg-type]
        fan = fan_in(layer, node.module)
        std = 1 / math.sqrt(fan * reached * square)
        drawn = filled(full(layer.direction), std, self.distribution, self.generator)
        self.write(layer.direction, drawn.to(layer.direction.dtype))
        zero_bias(layer, self.write)
        padded = "" if reached == 1 else f" · {reached:.4g}"
        reason = f"E[x²] = {square:.4g}: std √({1 / square:.4g}/{fan}{padded})"
        self.done[node.path] = Row(node.path, "set", reason, promised=1.0)
        return Predicted(0.0, x.mean_sq / square, x.var / square)


def taken_as_is(graph: Graph) -> list[str]:
    """Operations that the propagation has no estimator for, one line each kind."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.kind != "input" and node.inputs and not _known(node):
            kind = type(node.module).__name__ if node.module is not None else node.name
            found.setdefault(kind, []).append(node.path or "the root")
    lines = []
    for kind, paths in found.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"{kind} at {paths[0]}{more} keeps the moments of its input: it has no estimator")
    return lines


def _known(node: Node) -> bool:
    if node.module is not None:
        return (
            node.norm or isinstance(node.module, _ESTIMATED) or pools(node) or activation_at(node) is not None
        )
    named = node.name in _ARITHMETIC or node.name in _SHAPES
    return named or pools(node) or activation_at(node) is not None or node.name == "raised"
