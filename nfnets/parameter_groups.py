"""Parameter groups: what is decayed, what is not, and what learns at a tenth of the rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from nfnets.errors import UserError
from nfnets.given import check_module, shown

_WEIGHTS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: weights decayed, everything else not, Fixup's scalars at a tenth of the rate.

    Told by what a parameter is, not by what it is called: weights of linear, convolution and embedding layers are
    decayed; norm layers' parameters and whatever has at most one dimension longer than 1 (biases, gains, SkipInit
    and Fixup scalars, activations' slopes) are not, nor what the model's own `no_weight_decay()` names. Parameters
    with one element of a module that sets `lr_scale` learn at `lr_scale * lr`.

    The scaled rate stands under "lr" only: schedulers of torch and timm start from there. (A group key "lr_scale"
    would make timm's multiply a second time.)

    Args:
        model: every trainable parameter goes into exactly one group; tied ones once, frozen ones nowhere.
        lr: learning rate.
        weight_decay: of the decayed group.

    Returns:
        Dicts with "name" ("decayed", "undecayed", "scalars"), "params", "lr" and "weight_decay"; empty ones left out.

    Raises:
        UserError: no module, nothing to train, lazy parameters, lr or weight_decay negative or not finite.

    Example:
        >>> groups = param_groups(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), lr=0.1, weight_decay=2e-5)
        >>> [(g["name"], len(g["params"]), g["weight_decay"]) for g in groups]
        [('decayed', 1, 2e-05), ('undecayed', 3, 0.0)]

    Paper: arXiv 2102.06171 (no decay of gains, biases and skip scalars); arXiv 1901.09321 (Fixup's rate).
    Official code: deepmind-research, nfnets/experiment.py; hongyi-zhang/Fixup, cifar/cifar_train.py.
    """
    check_module(model)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise UserError(f"{name}={shown(value)}: expected a finite number, 0 or more; check the recipe")
    groups: dict[tuple[str, float], dict[str, Any]] = {}
    for _, p, decayed, scale in _classify(model):
        if not p.requires_grad:
            continue
        name = "scalars" if scale != 1 else "decayed" if decayed else "undecayed"
        group = groups.setdefault(
            (name, scale),
            {"name": name, "params": [], "lr": scale * lr, "weight_decay": weight_decay if decayed else 0.0},
        )
        group["params"].append(p)
    if not groups:
        raise UserError("no trainable parameters: expected at least one with requires_grad; unfreeze some")
    return [groups[key] for key in sorted(groups)]


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that `param_groups` does not decay, for timm's `no_weight_decay()` convention.

    Args:
        model: any module.

    Returns:
        Names as in `named_parameters`; a tied parameter under all its names.

    Raises:
        UserError: no module, or lazy parameters.

    Example:
        >>> sorted(no_weight_decay(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))))
        ['0.bias', '1.bias', '1.weight']

    Checked against timm's `optim.param_groups_weight_decay`.
    """
    check_module(model)
    kept = {id(p) for _, p, decayed, _ in _classify(model) if not decayed}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in kept}


def freeze_weights_(model: nn.Module) -> nn.Module:
    """Let gains, biases, scalars and norm layers' parameters learn, and nothing else: what `param_groups` decays stays.

    With BatchNorm these are γ and β and the classifier's bias; of a net converted by `nf` the gains and biases of its
    layers. Freeze after a conversion: it leaves frozen layers as they are.

    Args:
        model: changed in place.

    Returns:
        The same model.

    Raises:
        UserError: no module, or lazy parameters.

    Example:
        >>> model = freeze_weights_(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.bias', '1.weight', '1.bias']

    Paper: arXiv 2003.00152 (BatchNorm's γ and β only).
    """
    check_module(model)
    for _, p, decayed, _ in [*_classify(model)]:
        if decayed:
            p.requires_grad_(False)
    return model


def _classify(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool, float]]:
    """(name, parameter, decayed, factor of the rate), each parameter once."""
    own = getattr(model, "no_weight_decay", None)
    spared = set(own()) if callable(own) else set()  # pyright: ignore
    seen: set[int] = set()
    for path, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            if nn.parameter.is_lazy(p):
                raise UserError(
                    f"lazy parameter {path}.{attribute}: expected an initialized model; run one forward first"
                )
            name = f"{path}.{attribute}".lstrip(".")
            scale = float(getattr(module, "lr_scale", 1.0)) if p.numel() == 1 else 1.0
            yield name, p, name not in spared and scale == 1 and _is_weight(module, attribute, p), scale


def _is_weight(module: nn.Module, attribute: str, p: nn.Parameter) -> bool:
    if isinstance(module, _NORMS):
        return False  # a LayerNorm's affine has as many dimensions as what it normalizes
    if isinstance(module, _WEIGHTS) and attribute == "weight":
        return True  # a 1×1 depthwise filter too, which has one long dimension
    return sum(n != 1 for n in p.shape) > 1
