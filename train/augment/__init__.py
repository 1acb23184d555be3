"""Augmentation, keyed per sample: crops, flips and all that follow them (`pipeline`), and Mixup and CutMix (`mix`)."""
