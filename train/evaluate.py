"""Loss, accuracy and calibration of a model on a split, over exact counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nfnets.train.data import Split
from nfnets.train.processes import Processes

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
    processes: Processes | None = None,
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
        processes: the batches are dealt out to them, and every sample is counted once.

    Returns:
        The metrics; a model with non-finite weights gives a non-finite loss.

    Reference:
        Guo et al., arXiv 1706.04599 (ECE with 15 bins).
    """
    rank, size = (0, 1) if processes is None else (processes.rank, processes.size)
    device, count = split.labels.device, len(split)
    # Rows that another process computes stay 0, so that a sum brings them together exactly.
    losses, correct, confidence = torch.zeros(3, count, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    try:
        for start in range(rank * batch_size, count, size * batch_size):
            between()
            rows = slice(start, start + batch_size)
            inputs, labels = normalize(split.images[rows]), split.labels[rows]
            if channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            logits = model(inputs).double()
            losses[rows] = nn.functional.cross_entropy(logits, labels, reduction="none")
            confidence[rows], predicted = logits.softmax(1).max(1)
            correct[rows] = (predicted == labels).double()
    finally:
        model.train(was_training)
    if processes is not None:
        losses, correct, confidence = (processes.sum(row) for row in (losses, correct, confidence))
    return metrics(losses, correct, confidence)


def metrics(losses: Tensor, correct: Tensor, confidence: Tensor) -> Metrics:
    """The metrics of per-sample losses, hits and confidences.

    Example:
        >>> m = metrics(torch.tensor([0.5, 1.5]), torch.tensor([True, False]), torch.tensor([0.9, 0.9]))
        >>> m.loss, m.accuracy, round(m.ece, 6)
        (1.0, 0.5, 0.4)
    """
    losses, correct, confidence = losses.double().cpu(), correct.double().cpu(), confidence.double().cpu()
    count = len(losses)
    where = (confidence.nan_to_num(0.0) * BINS).long().clamp(0, BINS - 1)
    size = torch.bincount(where, minlength=BINS).double()
    hits = torch.bincount(where, correct, minlength=BINS)
    trust = torch.bincount(where, confidence.nan_to_num(0.0), minlength=BINS)
    nonempty = size.clamp(min=1)
    return Metrics(
        loss=float(losses.mean()),
        accuracy=float(correct.sum()) / count,
        ece=float(((hits - trust).abs()).sum() / count),
        count=count,
        bins=tuple(
            (int(n), float(c), float(a))
            for n, c, a in zip(
                size.tolist(), (trust / nonempty).tolist(), (hits / nonempty).tolist(), strict=True
            )
        ),
    )
