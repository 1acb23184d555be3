"""Names that `build` understands."""

from __future__ import annotations

import fnmatch

from nfnets.errors import UserError
from nfnets.models import list_models


def model_names(pattern: str = "*") -> list[str]:
    """Ours, or with a prefix timm's or torchvision's.

    Args:
        pattern: Shell-style; "timm:…" and "torchvision:…" search there.

    Returns:
        Sorted names, as `--model` takes them.

    Raises:
        UserError: no name matches.

    Example:
        >>> model_names("torchvision:resnet1*")
        ['torchvision:resnet18', 'torchvision:resnet101', 'torchvision:resnet152']
    """
    family, colon, rest = pattern.partition(":")
    if family == "timm" and colon:
        import timm

        names = [f"timm:{name}" for name in timm.list_models() if fnmatch.fnmatchcase(name, rest)]
    elif family == "torchvision" and colon:
        from torchvision import models

        known = models.list_models(module=models)
        names = [f"torchvision:{name}" for name in known if fnmatch.fnmatchcase(name, rest)]
    else:
        names = list_models(pattern)
    if not names:
        raise UserError(
            f"no model matches {pattern!r}: try '*resnet*', 'timm:*resnet*' or 'torchvision:*resnet*'"
        )
    return sorted(names, key=lambda name: (len(name), name)) if colon else names
