"""MixUp and CutMix of a step's whole batch, keyed by the step."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from nfnets.train.config import RunConfig
from nfnets.train.keyed import key


class Mixer:
    """Every image mixed with its mirror place in the batch, and the labels with it.

    MixUp: λ · x_i + (1 − λ) · x_(n−1−i) with λ ~ Beta(a, a). CutMix: a box of x_(n−1−i), of area 1 − λ around a
    uniform center, is pasted into x_i, and λ becomes the share that is left of x_i. The target is
    λ · y_i + (1 − λ) · y_(n−1−i). With both configured, a fair coin chooses per step.

    It works on the batch before that is split into micro-batches or over processes: neither changes the result.

    Args:
        config: `mixup`, `cutmix` and `seed` are read.
        num_classes: of the targets.

    Example:
        >>> import torch
        >>> mix = Mixer(RunConfig.create(mixup=0.2), 3)
        >>> images, targets = mix(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), step=0)
        >>> targets.sum(1)
        tensor([1., 1., 1., 1.])

    Reference:
        Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; timm's `Mixup` (batch mode, fair switch).
    """

    def __init__(self, config: RunConfig, num_classes: int) -> None:
        self.mixup, self.cutmix, self.seed = config.mixup, config.cutmix, config.seed
        self.num_classes = num_classes

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Mixed images and soft targets (n × classes, float32) of one step's batch."""
        draw = np.random.default_rng(key(self.seed, "mix", step) % 2**64)
        cuts = self.cutmix > 0 and (self.mixup == 0 or draw.random() < 0.5)
        share = float(draw.beta(self.cutmix, self.cutmix) if cuts else draw.beta(self.mixup, self.mixup))
        other = images.flip(0)
        if cuts:
            top, bottom, left, right = box(share, images.shape[2], images.shape[3], draw)
            images = images.clone()
            images[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
            share = 1.0 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        else:
            images = images * share + other * (1.0 - share)
        hard = F.one_hot(labels, self.num_classes).float()
        return images, hard * share + hard.flip(0) * (1.0 - share)


def box(share: float, height: int, width: int, draw: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box with sides sqrt(1 − share) of the image's, clipped at its edges.

    Example:
        >>> top, bottom, left, right = box(0.0, 8, 8, np.random.default_rng(0))
        >>> bottom - top <= 8 and right - left <= 8
        True
    """
    cut = (1.0 - share) ** 0.5
    tall, wide = int(height * cut), int(width * cut)
    middle, center = int(draw.integers(height)), int(draw.integers(width))
    top, left = max(middle - tall // 2, 0), max(center - wide // 2, 0)
    return top, min(middle + tall // 2, height), left, min(center + wide // 2, width)
