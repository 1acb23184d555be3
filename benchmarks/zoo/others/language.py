"""Hugging Face transformers: every model with a norm layer in the batch, small, from its configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.zoo.others import library
from benchmarks.zoo.others.net import Called, Net, Shape

_SIDE = ((3, 64, 64), (3, 128, 128), (3, 224, 224))
_WIDE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
_RESNET = {
    "embedding_size": 16,
    "hidden_sizes": [16, 24, 32, 48],
    "depths": [1, 1, 2, 1],
    "layer_type": "basic",
}
_DEFORMABLE = {
    "d_model": 32, "encoder_hidden_dim": 32, "encoder_in_channels": [24, 32, 48], "feat_strides": [8, 16, 32],
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_in_channels": [32, 32, 32], "num_queries": 8,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "hidden_expansion": 0.5,
    "num_denoising": 0, "num_labels": 3,
}  # fmt: skip

_FOUR = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
_WIDTHS = {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
_MOBILEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 40, 48],
    "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
}
_MOBILEVIT_2 = {"image_size": 64, "width_multiplier": 0.25}
_LEVIT = {
    "image_size": 64,
    "hidden_sizes": [32, 48, 64],
    "num_attention_heads": [2, 3, 4],
    "depths": [2, 2, 2],
}
_LEVIT |= {"key_dim": [8, 8, 8]}
_STAGES = {"stage_in_channels": [16, 16, 32, 48], "stage_mid_channels": [8, 8, 16, 16], "embedding_size": 16}
_STAGES |= {
    "stage_out_channels": [16, 32, 48, 64],
    "stage_num_blocks": [1, 1, 1, 1],
    "stem_channels": [3, 8, 16],
}
_STAGES |= {"stage_numb_of_layers": [2, 2, 2, 2], "hidden_sizes": [16, 32, 48, 64]}
_BEIT = _WIDE | {"image_size": 64, "patch_size": 16, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}
_HEADS = {"num_attention_heads": [1, 2, 2, 4]}
_DPT = _WIDE | {
    "image_size": 64,
    "patch_size": 16,
    "backbone_out_indices": [0, 1, 2, 3],
    "fusion_hidden_size": 16,
}
_DPT |= {"neck_hidden_sizes": [8, 16, 24, 32], "use_batch_norm_in_fusion_residual": True}

_IMAGES: dict[str, dict[str, Any]] = {
    "ResNetForImageClassification": _RESNET,
    "RegNetForImageClassification": _FOUR | {"embedding_size": 16, "groups_width": 8},
    "MobileNetV1ForImageClassification": {"depth_multiplier": 0.25, "min_depth": 4},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.35},
    "MobileNetV2ForSemanticSegmentation": {"depth_multiplier": 0.35},
    "EfficientNetForImageClassification": _WIDTHS,
    "AlignVisionModel": _WIDTHS,
    "MobileViTForImageClassification": _MOBILEVIT,
    "MobileViTForSemanticSegmentation": _MOBILEVIT,
    "MobileViTV2ForImageClassification": _MOBILEVIT_2,
    "MobileViTV2ForSemanticSegmentation": _MOBILEVIT_2,
    "LevitForImageClassification": _LEVIT,
    "LevitForImageClassificationWithTeacher": _LEVIT,
    "CvtForImageClassification": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "SwiftFormerForImageClassification": {
        "image_size": 64,
        "depths": [1, 1, 2, 1],
        "embed_dims": [16, 24, 32, 48],
    },
    "TextNetForImageClassification": {},
    "HGNetV2ForImageClassification": _STAGES,
    "PPLCNetForImageClassification": {"scale": 0.25},
    "PPLCNetV3Backbone": {"scale": 0.25},
    "RTDetrResNetBackbone": _RESNET,
    "BeitForSemanticSegmentation": _BEIT,
    "Data2VecVisionForSemanticSegmentation": _BEIT,
    "SegformerForSemanticSegmentation": _FOUR | _HEADS | {"decoder_hidden_size": 32},
    "DPTForSemanticSegmentation": _DPT,
    "DPTForDepthEstimation": _DPT,
    "PPOCRV5MobileDetForObjectDetection": {},
    "SLANetForTableRecognition": {},
}
_PATCHES = {"num_input_channels": 2, "context_length": 32, "patch_length": 4, "patch_stride": 4}
_PATCH_TST = _PATCHES | {"d_model": 16, "num_attention_heads": 2, "ffn_dim": 32, "num_hidden_layers": 2}
_PATCH_TST |= {"norm_type": "batchnorm"}
_MIXER = _PATCHES | {"d_model": 8, "num_layers": 2, "norm_mlp": "BatchNorm"}
_SERIES: dict[str, dict[str, Any]] = {
    "PatchTSTForPrediction": _PATCH_TST | {"prediction_length": 8},
    "PatchTSTForClassification": _PATCH_TST | {"num_targets": 3, "use_cls_token": True},
    "PatchTSMixerForPrediction": _MIXER | {"prediction_length": 8},
    "PatchTSMixerForTimeSeriesClassification": _MIXER | {"num_targets": 3},
}
_CONFORMER = _WIDE | {"num_hidden_layers": 2, "conv_dim": (16, 16, 16), "conv_kernel": (8, 3, 3)}
_CONFORMER |= {"conv_stride": (4, 2, 2), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
_CONFORMER |= {"mask_time_prob": 0.0}
_SOUND: dict[str, dict[str, Any]] = {
    "Wav2Vec2ConformerModel": _CONFORMER,
    "HubertModel": _CONFORMER | {"conv_pos_batch_norm": True},
}


def _model(name: str, **given: Any) -> nn.Module:
    import transformers

    cls = getattr(transformers, name)
    model = cls(cls.config_class(**given))
    return model.requires_grad_(True)


def _listener(name: str, **given: Any) -> nn.Module:
    model: Any = _model(name, **given)
    model.feature_extractor._requires_grad = False  # or its forward sets the flag of an input that is no leaf
    return model


def _detector(name: str, **given: Any) -> nn.Module:
    import transformers

    backbone = transformers.RTDetrResNetConfig(**_RESNET, out_features=["stage2", "stage3", "stage4"])
    return _model(name, backbone_config=backbone, **_DEFORMABLE, **given)


def _with_backbone(name: str, **given: Any) -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(**_RESNET, out_features=["stage1", "stage2", "stage3", "stage4"])
    return _model(name, backbone_config=backbone, **given)


def _on_vit(name: str, stages: list[str], **given: Any) -> nn.Module:
    import transformers

    config = transformers.VitDetConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        num_channels=4,
    )
    config.out_features = stages
    return _model(name, backbone_config=config, **given)


def _pose(name: str, **given: Any) -> nn.Module:
    import transformers

    config = transformers.VitPoseBackboneConfig(
        image_size=(64, 64), patch_size=(16, 16), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        out_indices=[2], num_experts=1,
    )  # fmt: skip
    return _model(name, backbone_config=config, num_labels=4, **given)


def _tokens(shape: Shape, batch: int, generator: Generator) -> tuple[Any, ...]:
    return (torch.randint(3, 20, (batch, *shape), generator=generator),)


def _spoken(net: Any, tokens: Tensor) -> Any:
    frames = torch.zeros(len(tokens), 16, 8) + tokens[:, :1, None] * 0.01
    return net(tokens, decoder_input_values=frames).spectrogram


def _informed(net: Any, values: Tensor) -> Any:
    past = values[:, :28]
    times = torch.linspace(-0.5, 0.5, 36).expand(len(values), -1)[..., None]
    seen = torch.ones_like(past)
    return net(
        past_values=past, past_time_features=times[:, :28], past_observed_mask=seen,
        future_values=values[:, 28:], future_time_features=times[:, 28:],
    ).last_hidden_state  # fmt: skip


def _clap(net: Any, x: Tensor) -> Any:
    return net(input_features=x, is_longer=torch.zeros(len(x), 1, dtype=torch.bool)).pooler_output


@library
def transformers() -> Iterator[Net]:
    """Image, detection, time series and speech models."""
    import transformers as hf

    def net(
        name: str, build: Callable[[], nn.Module], shapes: Any = _SIDE, kind: str = "image", **more: Any
    ) -> Net:
        return Net(name, build, shapes, kind, **more)

    for name, given in _IMAGES.items():
        if hasattr(hf, name):
            yield net(name, functools.partial(_model, name, **given))
    for name in ("RTDetrForObjectDetection", "RTDetrV2ForObjectDetection", "DFineForObjectDetection"):
        yield net(name, functools.partial(_detector, name), ((3, 64, 64),), "detector")
    feet = {"hidden_size": 32, "pool_scales": [1, 2], "auxiliary_in_channels": 32}
    yield net(
        "UperNetForSemanticSegmentation",
        functools.partial(_with_backbone, "UperNetForSemanticSegmentation", **feet),
    )
    for name in ("DetrForObjectDetection", "ConditionalDetrForObjectDetection", "DabDetrForObjectDetection"):
        small = {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "d_model": 32,
            "encoder_layers": 1,
        }
        small |= {"decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 8}
        small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        if name.startswith("Dab"):
            small["hidden_size"] = small.pop("d_model")
        yield net(name, functools.partial(_with_backbone, name, **small), _SIDE[:1], "detector")
    matting = {
        "hidden_size": 16,
        "convstream_hidden_sizes": [8, 12, 16],
        "fusion_hidden_sizes": [16, 12, 8, 8],
    }
    build = functools.partial(_on_vit, "VitMatteForImageMatting", ["stage2"], **matting)
    yield net("VitMatteForImageMatting", build, ((4, 64, 64),))
    for simple in (True, False):
        build = functools.partial(_pose, "VitPoseForPoseEstimation", use_simple_decoder=simple)
        yield net(f"VitPoseForPoseEstimation{'-simple' if simple else ''}", build, ((3, 64, 64),), "pose")
    for name, given in _SERIES.items():
        yield net(name, functools.partial(_model, name, **given), ((32, 2),), "time series")
    for name, given in _SOUND.items():
        yield net(name, functools.partial(_listener, name, **given), ((2000,), (8000,)), "speech")
    informer = {
        "prediction_length": 8,
        "context_length": 24,
        "lags_sequence": [1, 2, 4],
        "num_time_features": 1,
    }
    informer |= {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    informer |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    build = lambda: Called(_model("InformerModel", **informer), _informed)  # noqa: E731
    yield net("InformerModel", build, ((36,),), "time series", family="informer")
    speech = {
        "hidden_size": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "vocab_size": 24,
    }
    speech |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    speech |= {
        "speech_decoder_prenet_units": 16,
        "speech_decoder_postnet_units": 16,
        "speaker_embedding_dim": 8,
    }
    build = lambda: Called(_model("SpeechT5ForTextToSpeech", **speech), _spoken)  # noqa: E731
    yield net("SpeechT5ForTextToSpeech", build, ((12,),), "speech", family="speecht5", inputs=_tokens)
    clap = {
        "patch_embeds_hidden_size": 16,
        "hidden_size": 128,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
    }
    clap |= {"spec_size": 64, "num_mel_bins": 32, "window_size": 2, "patch_size": 4, "patch_stride": [4, 4]}
    clap |= {"enable_fusion": False}
    build = lambda: Called(_model("ClapAudioModel", **clap), _clap)  # noqa: E731
    yield net("ClapAudioModel", build, ((1, 128, 32),), "sound", family="clap")
    conformer = _WIDE | {"num_hidden_layers": 2, "num_mel_bins": 16, "subsampling_conv_channels": 16}
    yield net(
        "ParakeetEncoder", functools.partial(_model, "ParakeetEncoder", **conformer), ((64, 16),), "speech"
    )
    yield net("LasrEncoder", functools.partial(_model, "LasrEncoder", **conformer), ((64, 16),), "speech")
