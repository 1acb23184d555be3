"""What the post-activation networks share: mean over space, one linear layer, timm's method names for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nfnets.errors import UserError


class PooledClassifier(nn.Module):
    """A network of `forward_features`, a mean over space and a linear layer `fc`."""

    num_classes: int
    num_features: int
    fc: nn.Module
    global_pool: str = "avg"

    def set_head(self, features: int, num_classes: int, global_pool: str | None = None) -> None:
        """Register pooling and classifier; 0 classes leave the features, pooled (`"avg"`) or not (`""`)."""
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in ("avg", "") or (num_classes and not global_pool):
            raise UserError(f"{global_pool=}, {num_classes=}: expected 'avg', or '' with num_classes=0")
        self.avgpool = nn.AdaptiveAvgPool2d(1) if global_pool else nn.Identity()
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = features
        self.num_classes = num_classes
        self.fc = nn.Linear(features, num_classes) if num_classes else nn.Identity()

    def initialize_head(self) -> None:
        """Initialize `fc`; torch's default unless overridden."""

    def forward_features(self, x: Tensor) -> Tensor:
        """The last activation, before pooling."""
        raise NotImplementedError

    def pool(self, x: Tensor) -> Tensor:
        """What the classifier reads."""
        return torch.flatten(self.avgpool(x), 1) if self.global_pool else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier; with `pre_logits`, pooling only."""
        x = self.pool(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new last linear layer; 0 classes leave the features."""
        at = next(self.parameters())
        self.set_head(self.num_features, num_classes, global_pool)
        self.initialize_head()
        self.fc.to(at.device, at.dtype).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of biases, norm parameters and scalars (timm's optimizer factory reads this)."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
