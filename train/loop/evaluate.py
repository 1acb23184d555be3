"""Loss, accuracy and calibration of a model on a split, over exact counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.train.data.splits import Split
from nfnets.train.loop.processes import Processes

if TYPE_CHECKING:
    from nfnets.train.data.stream import Stream

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
    split: Split | Stream,
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
        split: every sample is read once; the last batch may be smaller. Samples that cannot be read do not count.
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
    # Rows that another process computes stay 0, so that a sum brings them together exactly.
    counted, losses, correct, confidence = torch.zeros(
        4, len(split), dtype=torch.float64, device=split.device
    )
    was_training = model.training
    model.eval()
    try:
        for rows, images, labels in split.parts(batch_size, rank, size):
            between()
            if not len(rows):
                continue
            inputs = normalize(images)
            if channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            logits = model(inputs).double()
            losses[rows] = nn.functional.cross_entropy(logits, labels, reduction="none")
            confidence[rows], predicted = logits.softmax(1).max(1)
            correct[rows] = (predicted == labels).double()
            counted[rows] = 1
    finally:
        model.train(was_training)
    if processes is not None:
        for row in (counted, losses, correct, confidence):
            processes.sum(row)
    read = counted > 0
    if not read.any():
        raise UserError(f"not one of {len(split)} images could be read; replace them")
    return metrics(losses[read], correct[read], confidence[read])


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
