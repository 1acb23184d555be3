"""The network that NF-ResNet, NF-RegNet, NFNet and ECA-NFNet are configurations of."""

from __future__ import annotations

from typing import Any

from timm.layers.classifier import ClassifierHead
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.layers import Scale, ScaledStdConv2d
from nfnets.models.blocks import NormFreeBlock, activation, convolution, gamma, stem
from nfnets.models.config import NormFreeConfig
from nfnets.models.head import check_rates
from nfnets.models.stages import Parts, StagedNet


class NormFreeNet(StagedNet):
    """A pre-activation normalizer-free network: stem, stages of `NormFreeBlock`s, γ · act, mean, classifier.

    The members of the families are built by name, `nfnets.create_model("nfnet_f0")`; `norm="bn"` gives any of them
    its BatchNorm twin. Attributes and methods follow timm's conventions, so that timm's tools can use the model.

    Args:
        config: which member.
        num_classes: outputs; 0 returns the pooled features.
        in_chans: image channels.
        drop_rate: dropout before the classifier, in training.
        drop_path_rate: stochastic depth: block i of n drops its branch with probability rate · i / n, without
            rescaling what remains.
        global_pool: `"avg"`, `"max"`, … as timm's heads, or `""`.

    Raises:
        UserError: an argument out of range, or a group width that a stage is too narrow for.

    Example:
        >>> import torch
        >>> config = NormFreeConfig((1, 1), (64, 128), stem="cifar", stem_width=16, strides=(1, 2))
        >>> NormFreeNet(config, num_classes=10)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])

    Paper: arXiv 2101.08692, 2102.06171. Checked against deepmind-research `nfnets/` (parameters, operations, β) and
    timm `models/nfnet.py` (outputs).
    """

    stem_pattern = r"^stem"
    stage_pattern = r"^stages\.(\d+)"

    def __init__(
        self,
        config: NormFreeConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ):
        if num_classes < 0 or in_chans < 1:
            raise UserError(f"{num_classes=}, {in_chans=}: expected 0 or more classes, 1 or more channels")
        check_rates(drop_rate, drop_path_rate)
        super().__init__()
        self.config, self.num_classes, self.in_chans = config, num_classes, in_chans
        self.stem = stem(config, in_chans)
        self.stages = self._stages(drop_path_rate)
        width = config.widths[-1]
        if config.final_width:
            self.final_conv = convolution(config, width, config.final_width, 1, activated=False)
        else:
            self.final_conv = nn.Identity()
        self.num_features = config.final_width or width
        self.final_act = activation(config, self.num_features, inplace=False)  # it reads an intermediate
        if config.norm is None and config.gain_at == "input":
            self.final_act = nn.Sequential(self.final_act, Scale(gamma(config)))
        self.feature_info = self._feature_info()
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self._initialize()

    def _stages(self, drop_path_rate: float) -> nn.Sequential:
        config, stages, index = self.config, nn.Sequential(), 0
        inputs, betas = config.stem_width, config.betas()
        for outputs, depth, first_stride in zip(config.widths, config.depths, config.strides, strict=True):
            stage = nn.Sequential()
            for place in range(depth):
                first = index == 0 and config.first_ratio is not None
                stage.append(
                    NormFreeBlock(
                        config,
                        inputs,
                        outputs,
                        stride=first_stride if place == 0 else 1,
                        beta=betas[index],
                        ratio=config.first_ratio if first else config.ratio,  # type: ignore[arg-type]
                        drop_path_rate=drop_path_rate * index / len(betas),
                    )
                )
                inputs, index = outputs, index + 1
            stages.append(stage)
        return stages

    def _feature_info(self) -> list[dict[str, Any]]:
        config = self.config
        tapped = self.stem[self._stem_parts() - 1]
        stem_name = "conv3" if config.stem == "deep" else "conv"
        stem_stride = {"cifar": 1}.get(config.stem, 2)
        info: list[dict[str, Any]] = [
            {"num_chs": tapped.out_channels, "reduction": stem_stride, "module": f"stem.{stem_name}"}
        ]
        for index, (channels, reduction) in enumerate(zip(config.widths, config.reductions(), strict=True)):
            info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{index}"})
        if config.final_width:
            info[-1] |= {"num_chs": config.final_width, "module": "final_conv"}
        return info

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_out = self.config.norm == "bn" and isinstance(module, nn.Conv2d) and module.bias is None
                if fan_out:  # torchvision's, for the twin's convolutions
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:  # LeCun: N(0, 1/fan_in)
                    nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if not self.config.skipinit and self.config.norm is None:
            for block in self.blocks():
                convs = [m for m in block.branch.children() if isinstance(m, ScaledStdConv2d)]
                nn.init.zeros_(convs[-1].gain)
        self._initialize_head()

    def _initialize_head(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            nn.init.normal_(self.head.fc.weight, std=0.0 if self.config.zero_head else 0.01)
            nn.init.zeros_(self.head.fc.bias)

    def blocks(self) -> list[NormFreeBlock]:
        """Every block, in execution order."""
        return [module for module in self.modules() if isinstance(module, NormFreeBlock)]

    def _stem_parts(self) -> int:
        """How many of the stem's modules come before its intermediate, with timm's choice of it."""
        return 5 if self.config.stem == "deep" else 1

    def parts(self) -> Parts:
        children, taken = list(self.stem), self._stem_parts()
        return Parts(
            children[:taken], children[taken:], list(self.stages), [self.final_conv], [self.final_act]
        )

    def keep_stages(self, count: int) -> None:
        if not count:
            self.stem = self.stem[: self._stem_parts()]
        for index in range(count, len(self.stages)):
            self.stages[index] = nn.Sequential()
        self.final_conv, self.final_act = nn.Identity(), nn.Identity()

    def drop_last_norm(self) -> None:
        if self.config.norm:
            self.final_act = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last activation, before pooling."""
        x = self.stem(x)
        for stage in self.stages:
            x = self.run_stage(stage, x)
        return self.final_act(self.final_conv(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier; with `pre_logits`, pooling only."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new last linear layer; 0 classes leave the pooled features."""
        at, head = next(self.parameters()), self.head
        pool = head.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.head = ClassifierHead(self.num_features, num_classes, pool, head.drop.p)
        self.head.to(at.device, at.dtype).train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self._initialize_head()
