"""Loss, accuracy and calibration of a model on a split, over exact counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nfnets.train.data import Split
from torch import Tensor, nn

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """Means over every sample of a split.

    `bins` are the reliability diagram's: (samples, mean confidence, accuracy) for each of `BINS` equal
    intervals of confidence.
    """

    loss: float
    accuracy: float
    ece: float
    count: int
    bins: tuple[tuple[int, float, float], ...]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    normalize: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    channels_last: bool = False,
    between: Callable[[], None] = lambda: None,
) -> Metrics:
    """Cross-entropy (no smoothing), top-1 accuracy and calibration error, in evaluation mode and fp32.

    ECE = Σ_b n_b / n · |accuracy_b − confidence_b| over 15 equal bins of confidence.

    Args:
        model: gives logits. Its training mode is restored.
        split: every sample is read once; the last batch may be smaller.
        normalize: pixels to the model's input.
        batch_size: images per forward pass.
        channels_last: the input's memory format.
        between: called before each batch (a chance to stop).

    Returns:
        The metrics; a model with non-finite weights gives a non-finite loss.

    Reference:
        Guo et al., arXiv 1706.04599 (ECE with 15 bins).
    """
    was_training = model.training
    model.eval()
    losses, correct, confidence = [], [], []
    try:
        for images, labels in zip(
            split.images.split(batch_size), split.labels.split(batch_size), strict=True
        ):
            between()
            inputs = normalize(images)
            if channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            logits = model(inputs).double()
            losses.append(nn.functional.cross_entropy(logits, labels, reduction="none"))
            top, predicted = logits.softmax(1).max(1)
            correct.append(predicted == labels)
            confidence.append(top)
    finally:
        model.train(was_training)
    return metrics(torch.cat(losses), torch.cat(correct), torch.cat(confidence))


def metrics(losses: Tensor, correct: Tensor, confidence: Tensor) -> Metrics:
    """The metrics of per-sample losses, hits and confidences.

    Example:
        >>> m = metrics(torch.tensor([0.5, 1.5]), torch.tensor([True, False]), torch.tensor([0.9, 0.9]))
        >>> m.loss, m.accuracy, round(m.ece, 6)
        (1.0, 0.5, 0.4)
    """
    losses, correct, confidence = losses.double().cpu(), correct.cpu(), confidence.double().cpu()
    count = len(losses)
    where = (confidence.nan_to_num(0.0) * BINS).long().clamp(0, BINS - 1)
    size = torch.bincount(where, minlength=BINS).double()
    hits = torch.bincount(where, correct.double(), minlength=BINS)
    trust = torch.bincount(where, confidence.nan_to_num(0.0), minlength=BINS)
    nonempty = size.clamp(min=1)
    return Metrics(
        loss=float(losses.mean()),
        accuracy=int(correct.sum()) / count,
        ece=float(((hits - trust).abs()).sum() / count),
        count=count,
        bins=tuple(
            (int(n), float(c), float(a))
            for n, c, a in zip(
                size.tolist(), (trust / nonempty).tolist(), (hits / nonempty).tolist(), strict=True
            )
        ),
    )
