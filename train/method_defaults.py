"""What an arm trains with when nobody says otherwise."""

from __future__ import annotations

from typing import Any

from nfnets.convert.methods.nf import MANY

# They normalize, so that gradients stay bounded by themselves.
NORMALIZED = frozenset({"bn", "gn", "ws_gn", "evonorm_s0", "ghost_bn"})

# What makes the logits is clipped at so many times λ: enough to stop the one step that throws it off, and too much to
# slow it. Unclipped it does, from the rates on that BatchNorm forgives (docs/experiments.md, "The head").
HEAD = 20.0

# A folded net's learning rates at batch 4.
_FOLDED_RATES = {"adamw": 0.001, "sgd": 0.005}


def clipping(method: str, batch_size: int) -> float | None:
    """Adaptive gradient clipping's λ for a conversion method at a batch size; None is off.

    λ = 0.05 · √(64 / batch size), 0.7 of that for `fold`; off for methods that normalize and for `skipinit`.

    The larger the batch, the higher the learning rate that it can use and the less noise hides a bad step: λ has
    to tighten (arXiv 2102.06171 §4.1 finds the same). It stays on at small ones: at batch 4 a converted MobileNetV2
    that is not clipped stays at chance from a rate of 0.003 on. SkipInit's scalars start at zero, where a clipped
    gradient moves them by no more than λ · ε · lr: its branches hardly open. A folded net that was trained well has
    more to lose than to learn from a large step (docs/experiments.md).

    Args:
        method: "bn" or a conversion method.
        batch_size: Images per optimizer step.

    Returns:
        λ rounded to two digits, or None.

    Example:
        >>> clipping("nf", 64), clipping("nf", 4), clipping("fold", 4), clipping("skipinit", 64)
        (0.05, 0.2, 0.14, None)
    """
    if method in NORMALIZED or method == "skipinit":
        return None
    at_64 = 0.035 if method == "fold" else 0.05
    return float(f"{at_64 * (64 / batch_size) ** 0.5:.2g}")


def conversion_options(method: str, batch_size: int) -> dict[str, Any]:
    """The options of a conversion that follow from a run's batch size where nobody sets them.

    `nf` sets single channels from 32 images a step on: DenseNet needs that at batch 64, MobileNetV2 loses eight points
    by it at batch 4 (docs/experiments.md). The images that it measures on are as many in both.

    Args:
        method: "bn" or a conversion method.
        batch_size: Images per optimizer step.

    Returns:
        Options by name.

    Example:
        >>> conversion_options("nf", 64), conversion_options("nf", 4), conversion_options("lsuv", 4)
        ({'channelwise': True}, {'channelwise': False}, {})
    """
    return {"channelwise": batch_size >= MANY} if method == "nf" else {}


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
    fields: dict[str, Any] = {"clipping": clipping(method, batch_size)}
    if fields["clipping"] is not None and method != "fold":  # a folded net's head has been trained
        fields["clipping_head"] = HEAD
    if method == "fold":
        fields |= {"centralization": True, "optimizer": optimizer or "adamw"}
        if (rate := _FOLDED_RATES.get(fields["optimizer"])) is not None:
            fields["lr"] = float(f"{rate * (batch_size / 4) ** 0.5:.2g}")
    return fields
