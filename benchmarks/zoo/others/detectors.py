"""Detectors and text readers; in training mode they return the maps of their heads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.others import library
from benchmarks.zoo.others.net import Called, Net

_YOLOS = {
    "DetectionModel": "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-ghost yolov8n-p2 yolov9t yolov10n yolo11n yolo12n "
    "yolo26n",
    "SegmentationModel": "yolov8n-seg yolo11n-seg yolo26n-seg",
    "PoseModel": "yolov8n-pose yolo11n-pose",
    "OBBModel": "yolov8n-obb yolo11n-obb",
    "ClassificationModel": "yolov8n-cls yolo11n-cls yolo12n-cls",
}


@library
def ultralytics() -> Iterator[Net]:
    """The smallest YOLO of each version and task."""
    from ultralytics.nn import tasks

    for task, names in _YOLOS.items():
        for name in names.split():
            build = functools.partial(_yolo, getattr(tasks, task), name)
            yield Net(
                name, build, ((3, 64, 64), (3, 128, 128)), "detector", family=task.removesuffix("Model")
            )


def _yolo(cls: Any, name: str) -> nn.Module:
    model = cls(f"{name}.yaml", ch=3, nc=5, verbose=False)
    model.requires_grad_(True)
    return model


@library
def effdet() -> Iterator[Net]:
    """EfficientDets without their trainer."""
    from effdet import EfficientDet, get_efficientdet_config

    for name in ("tf_efficientdet_lite0", "efficientdet_d0", "cspresdet50", "mixdet_m"):
        yield Net(
            name,
            functools.partial(_effdet, EfficientDet, get_efficientdet_config, name),
            ((3, 128, 128),),
            "detector",
        )


def _effdet(cls: Any, config_of: Any, name: str) -> nn.Module:
    config = config_of(name)
    config.image_size, config.num_classes = (128, 128), 5
    return cls(config, pretrained_backbone=False)


@library
def doctr() -> Iterator[Net]:
    """Text: classifiers, detectors by segmentation, recognizers."""
    from doctr.models import classification, detection, recognition

    lines = ((3, 32, 64), (3, 32, 128))
    names = "mobilenet_v3_small mobilenet_v3_large resnet18 resnet31 vgg16_bn_r magc_resnet31 textnet_tiny vip_tiny"
    for name in names.split():
        if hasattr(classification, name):
            yield Net(name, functools.partial(getattr(classification, name), pretrained=False), lines)
    names = "db_mobilenet_v3_large db_resnet50 linknet_resnet18 fast_tiny fast_small"
    for name in names.split():
        build = functools.partial(_detecting, getattr(detection, name))
        yield Net(name, build, ((3, 64, 64), (3, 128, 128)), "text")
    names = "crnn_vgg16_bn crnn_mobilenet_v3_small sar_resnet31 master"
    for name in names.split():
        build = functools.partial(_reading, getattr(recognition, name))
        yield Net(name, build, lines, "text")


def _detecting(make: Any) -> nn.Module:
    return Called(make(pretrained=False, pretrained_backbone=False), _maps)


def _maps(net: Any, x: Tensor) -> Tensor:
    target = [{"words": torch.tensor([[0.2, 0.2, 0.8, 0.7]]).numpy()}] * len(x)
    return net(x, target, return_model_output=True)["out_map"]


def _reading(make: Any) -> nn.Module:
    return Called(make(pretrained=False, pretrained_backbone=False, vocab="abcdef"), _letters)


def _letters(net: Any, x: Tensor) -> Tensor:
    return net(x, ["abc"] * len(x), return_model_output=True)["out_map"]


@library
def easyocr() -> Iterator[Net]:
    """Text detection and recognition."""
    from easyocr.craft import CRAFT
    from easyocr.model.model import Model
    from easyocr.model.vgg_model import Model as Small

    yield Net("CRAFT", functools.partial(CRAFT, pretrained=False), ((3, 64, 64),), "text")
    for name, cls in (("recognizer", Model), ("recognizer-vgg", Small)):
        build = functools.partial(_recognizer, cls)
        yield Net(name, build, ((1, 32, 64), (1, 64, 128)), "text")


def _recognizer(cls: Any) -> nn.Module:
    return Called(cls(1, 64, 32, 20), _read)


def _read(net: Any, x: Tensor) -> Tensor:
    return net(x, None)


@library
def face_alignment() -> Iterator[Net]:
    """Landmarks by hourglasses, faces by single shots."""
    from face_alignment.models.fan import FAN

    yield Net("FAN", functools.partial(FAN, 1), ((3, 64, 64), (3, 128, 128), (3, 256, 256)), "pose")
