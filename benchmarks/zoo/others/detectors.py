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
