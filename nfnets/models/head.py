"""What the post-activation networks share: mean over space, one linear layer, timm's method names for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.models.stages import StagedNet


def check_rates(drop_rate: float, drop_path_rate: float) -> None:
    """Raise UserError unless both are probabilities under 1."""
    if not (0 <= drop_rate < 1 and 0 <= drop_path_rate < 1):
        raise UserError(f"{drop_rate=}, {drop_path_rate=}: expected probabilities under 1")


class PooledClassifier(StagedNet):
    """A network of `forward_features`, a mean over space, dropout and a linear layer `fc`."""

    fc: nn.Module
    global_pool: str = "avg"
    drop_rate: float = 0.0

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
        parts = self.parts()
        for module in (*parts.stem, *parts.after_stem):
            x = module(x)
        for stage in parts.stages:
            x = self.run_stage(stage, x)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """What the classifier reads."""
        return torch.flatten(self.avgpool(x), 1) if self.global_pool else x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling, dropout and classifier; with `pre_logits`, without the classifier."""
        x = self.pool(x)
        if self.drop_rate and self.training:
            x = F.dropout(x, self.drop_rate)
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
