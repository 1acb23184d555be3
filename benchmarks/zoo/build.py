"""One model of the zoo and inputs for it: created without weights, at the smallest size that makes sense."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.zoo import others

DETECTION = "detection"
_IMAGES = 2  # of a detector; most other models take BATCH samples
BATCH = 4
GIANT = 250_000_000
"""Parameters above which a model runs last, alone, and with what is not at work on disk."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the zoo, as `models.json` keeps it."""

    name: str
    source: str
    """`"timm"`, `"torchvision"` or one of `others.LIBRARIES`."""
    family: str
    """The source's module that defines it."""
    kind: str
    """`"classification"`, `"video"`, `"segmentation"`, `"detection"` or `"flow"`; in other libraries, any word."""
    parameters: int
    norms: int
    """BatchNorm-like layers."""
    shape: tuple[int, ...]
    """Of one sample."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """What its constructor is given besides the name."""
    frozen: bool = False
    """Whether the backbone's norm layers are torchvision's frozen ones, with the statistics of one batch."""

    @property
    def key(self) -> str:
        """Source and name; unique."""
        return f"{self.source}/{self.name}{'+frozen' if self.frozen else ''}"

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        return dataclasses.asdict(self) | {"shape": list(self.shape)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Entry:
        """The entry that `to_json` wrote."""
        return cls(**{**value, "shape": tuple(value["shape"])})


def create(source: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model without pretrained weights, in training mode, on torch's current default device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if source == "timm":
            return timm.create_model(name, pretrained=False, **kwargs).train()
        if source in others.LIBRARIES:
            with patch("torch.hub.download_url_to_file", _refuse):
                return others.nets(source)[name].build().train()
        return torchvision.models.get_model(name, weights=None, **kwargs).train()


def _refuse(url: str, *_: Any, **__: Any) -> None:
    raise RuntimeError(f"nothing is downloaded for the zoo, not {url} either")


def build(entry: Entry, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model on the CPU and its inputs, the same at every call."""
    torch.manual_seed(seed)
    model = create(entry.source, entry.name, entry.kwargs)
    inputs = inputs_for(entry, seed)
    if entry.frozen:
        model = _frozen(model, inputs)
    return model, inputs


def spilled(entry: Entry, model: nn.Module) -> nn.Module:
    """A giant, its tensors moved from memory to a mapped file that goes with them; any other model as it is."""
    if entry.parameters <= GIANT:
        return model
    tensors = {
        name: t
        for name, t in [*model.named_parameters(), *model.named_buffers()]
        if t.layout == torch.strided
    }
    with tempfile.NamedTemporaryFile() as file:
        torch.save({name: t.detach() for name, t in tensors.items()}, file)
        file.flush()
        mapped = torch.load(file.name, mmap=True)
    for name, tensor in tensors.items():
        tensor.data = mapped[name]
    return model


def inputs_for(entry: Entry, seed: int = 0) -> tuple[Any, ...]:
    """Unit normal images (video clips, pairs of frames); for a detector images in [0, 1] and targets."""
    generator = torch.Generator().manual_seed(seed)
    if entry.source in others.LIBRARIES:
        return others.nets(entry.source)[entry.name].inputs(entry.shape, BATCH, generator)
    if entry.kind == DETECTION:
        images = [torch.rand(entry.shape, generator=generator) for _ in range(_IMAGES)]
        return images, [_target(entry) for _ in images]
    number = 2 if entry.kind == "flow" else 1
    batch = 2 if entry.kind in ("flow", "video") else BATCH  # their maps are large enough
    return tuple(torch.randn(batch, *entry.shape, generator=generator) for _ in range(number))


def _target(entry: Entry) -> dict[str, Tensor]:
    height, width = entry.shape[-2:]
    box = torch.tensor([[0.1 * width, 0.1 * height, 0.7 * width, 0.8 * height]])
    target = {"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}
    if "mask" in entry.name:
        masks = torch.zeros(1, height, width, dtype=torch.uint8)
        masks[:, height // 4 : height // 2, width // 4 : width // 2] = 1
        target["masks"] = masks
    if "keypoint" in entry.name:
        target["keypoints"] = torch.tensor([[[0.4 * width, 0.4 * height, 1.0]] * 17])
    return target


def _frozen(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    """The detector with a frozen backbone, as if pretrained: its statistics are those of one batch."""
    body: nn.Module = model.backbone.body  # type: ignore[assignment,union-attr]
    norms = {path: m for path, m in body.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.momentum = 1.0
    with torch.no_grad():
        images, _ = model.transform(inputs[0])  # type: ignore[operator]
        body(images.tensors)
    for path, norm in norms.items():
        frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
        frozen.load_state_dict(norm.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(body.get_submodule(parent), name, frozen)
    return model
