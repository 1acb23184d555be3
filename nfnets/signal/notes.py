"""What could not be measured or estimated, and why: one line each, the same from a profile and from a probe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nfnets.signal.attention import unscaled
from nfnets.signal.measured import Point
from nfnets.signal.rules import sick_gradients
from nfnets.trace import Graph, is_batch_norm_like

# What may be meant so and mostly is not, as `nfnets check --allow` calls it, and the words that its note begins with.
DOUBTS = {
    "frozen": "frozen, no weight of theirs requires a gradient",
    "zero-head": "the head's weights are zeros",
    "few-samples": "BatchNorm over",
    "dropout": "dropout that leaves a fifth of the units or less",
}
# What dropout of so much leaves is a fifth of the units.
_DROPS = 0.8
# Below so many values a variance is off by a quarter, and a unit seems dead by chance.
_FEW = 32


def empty_input(inputs: Any) -> str | None:
    """Why nothing can be measured, where an input holds no value at all.

    Args:
        inputs: what the model is called with.

    Returns:
        A line, or `None`.
    """
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            return f"input of shape {tuple(leaf.shape)}: expected at least one sample; pass a batch"
    return None


def of_output(output: Any) -> list[str]:
    """What a model returns that has no statistics.

    Args:
        output: what it returned.

    Returns:
        Lines.
    """
    if any(isinstance(t, Tensor) and not t.is_floating_point() for t in tree_leaves(output)):
        return ["an output is not floating point and was not measured"]
    return []


def of_patterns(patterns: Sequence[str]) -> list[str]:
    """Patterns of `include` and `exclude` that choose nothing.

    Args:
        patterns: those.

    Returns:
        Lines.
    """
    return [f"no point's name matches the pattern {pattern!r}" for pattern in patterns]


def of_model(model: nn.Module, samples: int, batch_statistics: bool | None = None) -> list[str]:
    """What the modules tell that no output shows: norm layers that see too little, and dropout that leaves too little.

    Args:
        model: the model.
        samples: in the batch.
        batch_statistics: whether its norm layers used the batch; None: as their mode says.

    Returns:
        Lines.
    """
    notes = []
    norms = [(n, m) for n, m in model.named_modules() if is_batch_norm_like(m)]
    by_batch = [n for n, m in norms if (m.training if batch_statistics is None else batch_statistics)]
    if by_batch and samples <= 2:
        notes.append(
            f"{DOUBTS['few-samples']} {samples} sample{'s' * (samples > 1)} (first {by_batch[0]}): the statistics are "
            "this batch's own, and evaluation will differ"
        )
    fresh = [n for n, m in norms if not m.training and _int(getattr(m, "num_batches_tracked", None)) == 0]
    if fresh:
        notes.append(
            f"BatchNorm in evaluation mode whose statistics no training has set (first {fresh[0]}): means 0 and "
            "variances 1 stand there"
        )
    heavy = [
        f"{n} ({m.p:g})"
        for n, m in model.named_modules()
        if isinstance(m, nn.modules.dropout._DropoutNd) and m.p >= _DROPS
    ]
    if heavy:
        notes.append(f"{DOUBTS['dropout']}: {_few(heavy)}")
    return notes


def _int(value: Any) -> int | None:
    known = isinstance(value, Tensor) and not value.is_meta and value.device.type == "cpu"
    return int(value) if known else None


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def of_graph(graph: Graph) -> list[str]:
    """Attention whose logits are a product of two activations that nothing has scaled.

    Args:
        graph: of the pass.

    Returns:
        Lines.
    """
    found = [
        n for n in graph.nodes if n.name == "softmax" and n.inputs and unscaled(graph.nodes, n.inputs[0])
    ]
    if not found:
        return []
    where = f"{found[0].path}.softmax".lstrip(".")
    return [
        f"attention without a scale at {len(found)} places (first {where}): logits grow with the width of a head; "
        "divide by its square root"
    ]


def of_points(points: Sequence[Point]) -> list[str]:
    """What the points of one model do not tell, or tell coarsely, and where values are not finite.

    Args:
        points: in execution order, step by step.

    Returns:
        Lines.
    """
    notes = []
    if any(p.shape and p.shape[0] == 1 for p in points):
        notes.append("a batch of one: cosine and rank between samples cannot be estimated")
    few = list(dict.fromkeys(p.name for p in points if p.count < _FEW))
    if few:
        shown = ", ".join(few[:3]) + (", …" if len(few) > 3 else "")
        notes.append(
            f"fewer than {_FEW} values a channel at {len(few)} points ({shown}): variance and dead are coarse"
        )
    weighted = [p for p in points if p.frozen is not None]
    frozen = list(dict.fromkeys(p.name for p in weighted if p.frozen))
    if frozen and any(not p.frozen for p in weighted):
        notes.append(f"{DOUBTS['frozen']}: {_few(frozen)}")
    if any(p.role == "head" and p.weight_norm == 0 for p in points):
        notes.append(f"{DOUBTS['zero-head']}: no gradient passes it before they have moved")
    bad = [p for p in points if p.nonfinite]
    if bad:
        notes.append(f"NaN or inf first at {_first(bad)}")
    steps = {p.step for p in bad}
    # Backwards the last layer comes first; of a step whose outputs are not finite its gradients cannot be.
    wrong = [p for p in points if p.step not in steps and sick_gradients(p)]
    if wrong:
        earliest = [p for p in wrong if p.step == wrong[0].step]
        notes.append(f"NaN or inf in the gradient, backwards first at {_first(earliest[::-1], len(wrong))}")
    return notes


def doubts(notes: Sequence[str]) -> dict[str, str]:
    """The notes of what breaks no rule, as it may be meant so, and yet keeps a net from being trained as it stands.

    Args:
        notes: of a report.

    Returns:
        By a name of `DOUBTS`.

    Example:
        >>> doubts(["the head's weights are zeros: no gradient passes it before they have moved"]).keys()
        dict_keys(['zero-head'])
    """
    return {name: note for name, words in DOUBTS.items() for note in notes if words in note}


def _first(points: Sequence[Point], count: int | None = None) -> str:
    first = points[0]
    when = f" at step {first.step}" if first.step else ""
    return f"{first.name}{when} ({count or len(points)} points in all)"
