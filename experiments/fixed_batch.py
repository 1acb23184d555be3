"""A net of pytorchcv learns 16 digits by heart: BatchNorm and `nf`, clipped or not, 30 steps of Adam.

    pip install --no-deps pytorchcv
    python -m experiments.fixed_batch [efficientnet_b0b]

The digits at 64 × 64 pixels, the same batch at every step, two rates, two seeds; the mean loss of the last three steps.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from nfnets import attach_agc, convert

BATCH, STEPS, SEEDS, RATES = 16, 30, 2, (1e-3, 3e-3)
ARMS: dict[str, tuple[dict[str, bool] | None, float]] = {
    "bn": (None, 0.0),
    "nf, unclipped": ({}, 0.0),
    "nf": ({}, 0.02),
    "nf, channelwise, unclipped": ({"channelwise": True}, 0.0),
    "nf, channelwise": ({"channelwise": True}, 0.02),
}


def learned(name: str, options: dict[str, bool] | None, clipping: float, rate: float, seed: int) -> float:
    """The loss after 30 steps."""
    from pytorchcv.model_provider import get_model

    torch.manual_seed(seed)
    model = get_model(name, pretrained=False, num_classes=10)
    digits = load_digits()
    chosen = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))[:BATCH]
    images = (torch.tensor(digits.images).float()[chosen, None] / 16 - 0.3) / 0.38
    images = F.interpolate(images, size=64, mode="bilinear").repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)[chosen]
    if options is not None:
        model = convert(model, images, **options)
    optimizer = torch.optim.Adam(model.train().parameters(), rate)
    if clipping:
        attach_agc(optimizer, model, clipping=clipping)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(losses[-3:]) / 3


def main() -> None:
    torch.set_num_threads(1)
    name = sys.argv[1] if sys.argv[1:] else "efficientnet_b0b"
    print("| arm | rate | loss, by seed |\n|---|---|---|")
    for arm, (options, clipping) in ARMS.items():
        for rate in RATES:
            losses = [learned(name, options, clipping, rate, seed) for seed in range(SEEDS)]
            print(f"| {arm} | {rate:g} | {', '.join(f'{loss:.3f}' for loss in losses)} |", flush=True)


if __name__ == "__main__":
    main()
