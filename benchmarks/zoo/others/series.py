"""Libraries for signals over time: EEG, time series, speech, tables."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.others import library
from benchmarks.zoo.others.net import Called, Net


@library
def braindecode() -> Iterator[Net]:
    """Every EEG net, at the sizes that its own tests use."""
    from braindecode.models import util

    util._init_models_dict()
    places = [{"ch_name": f"C{n}", "kind": "eeg", "loc": torch.randn(12).numpy()} for n in range(1, 4)]
    usual = {"n_chans": 22, "n_times": 1000, "n_outputs": 4, "sfreq": 250, "chs_info": places}
    for name, wanted, special in util.models_mandatory_parameters:
        if name not in util.models_dict:  # wrappers around others
            continue
        cls = util.models_dict[name]
        given = {key: usual[key] for key in wanted} | ((special() if callable(special) else special) or {})
        if "chs_info" in given:
            given["n_chans"] = len(given["chs_info"])
        takes = inspect.signature(cls.__init__).parameters
        build = functools.partial(cls, **{key: value for key, value in given.items() if key in takes})
        chans, times = given.get("n_chans", 22), given.get("n_times", 1000)
        yield Net(name, build, ((chans, times), (chans, 2000), (chans, 3000)), "eeg")


_TSAI = """
FCN.FCN FCNPlus.FCNPlus ResNet.ResNet ResNetPlus.ResNetPlus ResCNN.ResCNN InceptionTime.InceptionTime
InceptionTimePlus.InceptionTimePlus XceptionTime.XceptionTime XceptionTimePlus.XceptionTimePlus
OmniScaleCNN.OmniScaleCNN RNN_FCN.LSTM_FCN RNN_FCN.GRU_FCN RNN_FCN.MLSTM_FCN RNN_FCNPlus.LSTM_FCNPlus
RNNAttention.RNNAttention RNNAttention.LSTMAttention mWDN.mWDN XCM.XCM XCMPlus.XCMPlus TST.TST TSTPlus.TSTPlus
ConvTranPlus.ConvTranPlus XResNet1d.xresnet1d18 XResNet1d.xresnet1d18_deep XResNet1d.xresnet1d34
XResNet1d.xresnet1d50
"""


@library
def tsai() -> Iterator[Net]:
    """Time series classifiers."""
    importlib.import_module("tsai.models")
    for path in _TSAI.split():
        name = path.rpartition(".")[2]
        yield Net(name, functools.partial(_tsai, path), ((3, 64),), "time series")


def _tsai(path: str) -> nn.Module:
    """Its module is imported here: a path that is gone costs one net, and not the library."""
    module, _, name = path.partition(".")
    make = getattr(importlib.import_module(f"tsai.models.{module}"), name)
    given: dict[str, Any] = {"c_in": 3, "c_out": 4}
    if "seq_len" in inspect.signature(make).parameters or name == "MLSTM_FCN":  # which passes it on
        given["seq_len"] = 64
    return make(**given)


@library
def speechbrain() -> Iterator[Net]:
    """Speaker and speech nets; most take (batch, time, features)."""
    from speechbrain.lobes.models import CRDNN, ECAPA_TDNN, Cnn14, ContextNet, ResNet, Xvector

    features = ((60, 40), (100, 80))
    thin = {"channels": [32, 32, 32, 32, 96], "attention_channels": 16, "lin_neurons": 24}
    yield Net(
        "ECAPA_TDNN", functools.partial(ECAPA_TDNN.ECAPA_TDNN, 40, device="cpu", **thin), features, "speech"
    )
    x = {
        "tdnn_blocks": 3,
        "tdnn_channels": [32, 32, 64],
        "tdnn_kernel_sizes": [5, 3, 1],
        "tdnn_dilations": [1, 2, 1],
    }
    yield Net(
        "Xvector",
        functools.partial(Xvector.Xvector, device="cpu", in_channels=40, lin_neurons=16, **x),
        features,
        "speech",
    )
    narrow = {"channels": [8, 8, 16, 16], "block_sizes": [1, 1, 1, 1], "lin_neurons": 16}
    yield Net("ResNet", functools.partial(ResNet.ResNet, 40, device="cpu", **narrow), features, "speech")
    crdnn = {"cnn_channels": (8, 8), "rnn_neurons": 16, "rnn_layers": 1, "dnn_neurons": 16}
    yield Net("CRDNN", functools.partial(CRDNN.CRDNN, input_size=40, **crdnn), features, "speech")
    yield Net(
        "ContextNet",
        functools.partial(ContextNet.ContextNet, (4, 60, 40), out_channels=[16] * 23),
        features,
        "speech",
    )
    yield Net("Cnn14", functools.partial(Cnn14.Cnn14, mel_bins=64, emb_dim=64), ((64, 64),), "speech")


@library
def pytorch_tabnet() -> Iterator[Net]:
    """Tables, with ghost batch norm."""
    from pytorch_tabnet.tab_network import TabNet

    for kind in ("sparsemax", "entmax"):
        build = functools.partial(_tabnet, TabNet, mask_type=kind)
        yield Net(f"TabNet-{kind}", build, ((12,),), "table")


def _tabnet(cls: Any, **given: Any) -> nn.Module:
    return cls(12, 3, group_attention_matrix=torch.eye(12), **given)


@library
def rtdl_revisiting_models() -> Iterator[Net]:
    """Tables."""
    from rtdl_revisiting_models import ResNet

    given = {"d_block": 32, "d_hidden_multiplier": 2.0, "dropout1": 0.15, "dropout2": 0.0}
    yield Net("ResNet", functools.partial(ResNet, d_in=12, d_out=3, n_blocks=3, **given), ((12,),), "table")


@library
def fastai() -> Iterator[Net]:
    """XResNets, U-Nets that hook their encoder, tables."""
    from fastai.tabular.model import TabularModel
    from fastai.vision.learner import create_body
    from fastai.vision.models import xresnet
    from fastai.vision.models.unet import DynamicUnet
    from torchvision.models import resnet18

    for name in (
        "xresnet18",
        "xresnet34",
        "xresnet50",
        "xresnet18_deep",
        "xse_resnet18",
        "xresnext18",
        "xse_resnext18",
    ):
        yield Net(name, functools.partial(getattr(xresnet, name), n_out=5))
    yield Net(
        "DynamicUnet",
        lambda: DynamicUnet(create_body(resnet18(), 3, False), 2, (64, 64)),
        kind="segmentation",
    )
    yield Net(
        "TabularModel", lambda: Called(TabularModel([(5, 3)], 12, 3, [32, 16]), _tables), ((12,),), "table"
    )


def _tables(net: nn.Module, x: Tensor) -> Tensor:
    return net((x[:, :1] > 0).long(), x)


@library
def lightly() -> Iterator[Net]:
    """Heads of self-supervised learning and its ResNet with split batch norm."""
    from lightly.models import ResNetGenerator
    from lightly.models.modules import heads

    for name in (
        "SimCLRProjectionHead",
        "BYOLProjectionHead",
        "BarlowTwinsProjectionHead",
        "SimSiamProjectionHead",
        "SimSiamPredictionHead",
        "SwaVProjectionHead",
        "MoCoProjectionHead",
        "VICRegProjectionHead",
        "NNCLRProjectionHead",
        "TiCoProjectionHead",
        "MSNProjectionHead",
        "DINOProjectionHead",
    ):
        sizes = {"input_dim": 16, "hidden_dim": 32, "output_dim": 16}
        if name == "DINOProjectionHead":
            sizes |= {"batch_norm": True}
        yield Net(name, functools.partial(getattr(heads, name), **sizes), ((16,),), "head")
    for splits in (0, 2):
        build = functools.partial(ResNetGenerator, "resnet-9", width=0.25, num_splits=splits)
        yield Net(f"resnet-9{'-split' if splits else ''}", build, ((3, 32, 32),))
