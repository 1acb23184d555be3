"""How far a classifier's confidence is to be believed, and the one number that mends most of it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nfnets.errors import UserError

_LIMIT = math.log(1e3)
"""Temperatures lie between 1/1000 and 1000: where every answer is right, the best is 0, and confidence 1."""


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T at which softmax(logits / T) gives held-out labels the highest likelihood.

    T = argmin mean −log softmax(logits / T)[label], found by bisection of its slope, in fp64; the mean is convex in
    1/T, so there is one minimum. T > 1: the model is overconfident. It leaves the predictions as they are.

    Args:
        logits: of images that were not trained on, (images, classes).
        labels: their classes, (images,).

    Returns:
        T, between 0.001 and 1000: divide logits by it.

    Raises:
        UserError: no images, shapes that do not fit, labels that are no class, logits that are not finite.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])  # confidence 98 %, and 75 % are right
        >>> round(temperature(logits, labels), 3), round(4 / math.log(3), 3)
        (3.641, 3.641)

    Paper: arXiv 1706.04599. Checked against scipy's scalar minimizer.
    """
    scores, classes = _checked(logits, labels)
    right = scores.gather(1, classes[:, None])
    gap = scores - right  # the loss is mean log Σ exp(gap / T)

    def slope(log_t: float) -> float:
        scaled = gap * math.exp(-log_t)
        return -float((scaled.softmax(1) * scaled).sum(1).mean())  # d loss / d log T

    low, high = -_LIMIT, _LIMIT
    if slope(low) >= 0:
        return math.exp(low)
    if slope(high) <= 0:
        return math.exp(high)
    for _ in range(60):  # the slope changes its sign once
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.exp((low + high) / 2)


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """The mean distance between confidence and accuracy, in bins of equal width by confidence.

    ECE = Σ_b |b| / N · |accuracy(b) − confidence(b)|.

    Args:
        logits: (images, classes).
        labels: (images,).
        bins: how many.

    Returns:
        Between 0 and 1.

    Raises:
        UserError: as `temperature`; no bin.

    Example:
        >>> round(expected_calibration_error(torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([0, 1])), 3)
        0.5

    Paper: arXiv 1706.04599.
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise UserError(f"bins={bins!r}: expected a whole number from 1 up; pass 15")
    scores, classes = _checked(logits, labels)
    confidence, predicted = scores.softmax(1).max(1)
    right = (predicted == classes).to(scores.dtype)
    bucket = (confidence * bins).ceil().long().clamp(1, bins) - 1
    off = torch.zeros(bins, dtype=scores.dtype, device=scores.device).index_add(0, bucket, right - confidence)
    return float(off.abs().sum() / len(classes))


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log likelihood, in nats an image.

    Example:
        >>> round(nll(torch.zeros(1, 4), torch.tensor([2])), 3)
        1.386
    """
    scores, classes = _checked(logits, labels)
    return float(F.cross_entropy(scores, classes))


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    for name, given in (("logits", logits), ("labels", labels)):
        if not isinstance(given, Tensor):
            raise UserError(
                f"{name} is a {type(given).__name__}: expected a tensor; pass torch.as_tensor({name})"
            )
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
        raise UserError(
            f"logits of shape {tuple(logits.shape)} and {logits.dtype}: expected floating-point (images, classes)"
        )
    if labels.is_floating_point() or tuple(labels.shape) != (len(logits),) or not len(labels):
        raise UserError(
            f"labels of shape {tuple(labels.shape)} and {labels.dtype}: expected a class for each of the "
            f"{len(logits)} rows of logits, at least one"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= logits.shape[1]:
        raise UserError(
            f"labels from {low} to {high}: expected 0 to {logits.shape[1] - 1}, the columns of logits"
        )
    if not bool(logits.isfinite().all()):
        raise UserError("logits are not finite: nothing can be calibrated; look at the model's outputs")
    return logits.detach().double(), labels.to(logits.device)
