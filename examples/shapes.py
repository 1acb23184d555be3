"""Drawn images of rectangles and ellipses on noise, with boxes, labels and masks: data that needs no download."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = ("background", "rectangle", "ellipse")


def scene(size: int, seed: int, shapes: int = 3) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """One image with what a detector and a segmenter should find in it.

    Args:
        size: pixels per side.
        seed: decides everything.
        shapes: how many, later ones in front.

    Returns:
        Image (3, size, size) in [0, 1]; boxes (shapes, 4) in pixels and labels (shapes,); mask (size, size) of labels.
    """
    generator = torch.Generator().manual_seed(seed)
    image = 0.3 * torch.rand(3, size, size, generator=generator)
    mask = torch.zeros(size, size, dtype=torch.int64)
    rows = torch.arange(size).view(-1, 1)
    columns = torch.arange(size).view(1, -1)
    boxes, labels = [], []
    for _ in range(shapes):
        low, high = size // 6, size // 2
        height, width = torch.randint(low, high, (2,), generator=generator).tolist()
        top = int(torch.randint(0, size - height, (1,), generator=generator))
        left = int(torch.randint(0, size - width, (1,), generator=generator))
        label = int(torch.randint(1, 3, (1,), generator=generator))
        inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
        if label == 2:
            middle, center = top + height / 2 - 0.5, left + width / 2 - 0.5
            inside &= ((rows - middle) / (height / 2)) ** 2 + ((columns - center) / (width / 2)) ** 2 <= 1
        color = 0.3 + 0.7 * torch.rand(3, 1, generator=generator)
        image[:, inside] = color
        mask[inside] = label
        boxes.append([left, top, left + width, top + height])
        labels.append(label)
    target = {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}
    return image, target, mask
