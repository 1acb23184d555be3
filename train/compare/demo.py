"""The demo's experiment: small enough for a laptop, real enough to learn from."""

from __future__ import annotations

from nfnets.train.compare.protocol import Arm, ExperimentConfig


def demo_experiment(*, seeds: int = 3, epochs: int = 12, search: bool = True) -> ExperimentConfig:
    """BatchNorm against NF on digits: a CIFAR-style ResNet-20, batch 64.

    Args:
        seeds: How many paired seeds.
        epochs: Passes over the 1,294 training images.
        search: Three learning rates per arm; one otherwise.

    Returns:
        The experiment.
    """
    return ExperimentConfig.create(
        run={
            "model": "bn_resnet20_cifar",
            "data": "digits",
            "epochs": epochs,
            "warmup_epochs": min(1, epochs),
        },
        arms=[Arm(name="bn", method="bn"), Arm(name="nf", method="nf")],  # pyright: ignore[reportCallIssue]
        seeds=range(seeds),
        lrs=(0.05, 0.1, 0.2) if search else (0.1,),
        batch_sizes=(64,),
    )
