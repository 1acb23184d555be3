"""What an arm trains with when nobody says otherwise, as fields of a run's configuration."""

from __future__ import annotations

from typing import Any

from nfnets.advice import middle_rate, recommended


def recipe(method: str, batch_size: int, optimizer: str | None = None) -> dict[str, Any]:
    """The `RunConfig` fields that follow from a run's method and batch size where nobody sets them.

    A folded net is fine-tuned, by AdamW at lr = 0.001 · √(batch size / 4), since by SGD it ends below BatchNorm. SGD,
    if it is asked for, gets 0.005 · √(batch size / 4), another optimizer none. All with gradient centralization, since
    nothing else takes the common part of what its filters see out of their steps (docs/experiments.md, "Folded nets").

    Args:
        method: "bn" or a conversion method.
        batch_size: Images per optimizer step.
        optimizer: the one that was asked for.

    Returns:
        Fields by name.

    Example:
        >>> recipe("nf", 64), recipe("bn", 64)
        ({'clipping': 0.05, 'clipping_head': 20.0}, {'clipping': None})
        >>> recipe("fold", 16)
        {'clipping': 0.07, 'centralization': True, 'optimizer': 'adamw', 'lr': 0.002}
        >>> recipe("fold", 16, optimizer="sgd")
        {'clipping': 0.07, 'centralization': True, 'optimizer': 'sgd', 'lr': 0.01}
    """
    found = recommended(method, batch_size, optimizer)
    fields: dict[str, Any] = {"clipping": found.clipping}
    if found.head is not None:
        fields["clipping_head"] = found.head
    if method == "fold":  # fine-tuning has rates of its own; elsewhere they are searched
        fields |= {"centralization": found.centralization, "optimizer": found.optimizer}
        if (rate := middle_rate(method, batch_size, found.optimizer)) is not None:
            fields["lr"] = rate
    return fields
