"""One run's configuration: every setting with its bounds, and the fingerprint that names the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from nfnets.errors import UserError, unknown
from nfnets.plain import fault, read_json, shown

# They change how fast, where or how often a run is looked at, never the weights it ends with.
_NOT_IN_FINGERPRINT = frozenset(
    {
        "data_dir",
        "download",
        "verify_data",
        "workers",
        "unreadable_budget",
        "keep_checkpoints",
        "checkpoint_every",
        "eval_every",
        "eval_batch_size",
    }
)

# They change the last bits, and with them a run's end. Left open, they are settled when a run begins and recorded, so
# that it goes on as it began, whatever machine or shell it goes on in.
_OPEN = {"threads": None, "device": "auto"}

# Small ones live on the device; imagenet and timm:NAME are read from their files while training.
RESIDENT = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder")
STREAMED = ("imagenet",)
TIMM = "timm:"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class RunConfig(BaseModel):
    """Everything that decides one training run.

    `batch_size` is the number of images per optimizer step. It is split evenly over `accumulation`
    micro-batches and, under `torchrun`, over the processes, so neither changes the schedule.

    Args:
        **fields: see the fields' descriptions (`RunConfig.model_json_schema()`).

    Raises:
        UserError: from `RunConfig.create`, in one line, for a field that is unknown or out of bounds.

    Example:
        >>> RunConfig.create(data="digits", epochs=2).epochs
        2
        >>> RunConfig.create(lr=-1)
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: lr=-1: input should be greater than 0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    model: str = Field(
        "bn_resnet20_cifar",
        min_length=1,
        description="timm:NAME, torchvision:NAME, package.module:function or a name of nfnets.create_model",
    )
    model_options: dict[str, JsonValue] = Field(
        {}, description="keyword arguments for the model's constructor"
    )
    method: str = Field(
        "bn", min_length=1, description="'bn' leaves the model alone; else a conversion method"
    )
    method_options: dict[str, JsonValue] = Field({}, description="keyword arguments for nfnets.convert")
    init_from: Path | None = Field(
        None,
        description="weights of the model before conversion (a run's model.safetensors), to go on from",
    )

    data: str = Field(
        "digits",
        description="digits, mnist, fashion-mnist, cifar10, cifar100 and imagefolder are resident on the device; "
        "imagenet (train and val as folders, tars or WebDataset shards) and timm:NAME are streamed",
    )
    data_dir: Path | None = Field(None, description="where the data set's own files lie")
    data_options: dict[str, JsonValue] = Field(
        {},
        description="of streamed data: train_split, val_split, test_split, num_classes; the rest goes to timm",
    )
    download: bool = Field(False, description="fetch the data set where torchvision can and it is missing")
    verify_data: bool = Field(True, description="compare the checksums of MNIST's and CIFAR's files")
    unreadable_budget: int = Field(
        0, ge=0, description="images that may turn out unreadable before the run fails; they are counted"
    )
    workers: int | None = Field(
        None, ge=0, le=256, description="processes that decode streamed images; None is one per core, up to 8"
    )
    image_size: int = Field(64, ge=8, le=1024, description="pixels per side that images of any size get")
    min_crop: float = Field(
        0.08, gt=0, le=1, description="least share of a streamed image's area that a random crop keeps"
    )
    crop_pct: float = Field(
        0.875,
        gt=0,
        le=1,
        description="of the shorter side: the center crop of a streamed image in evaluation",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="of streamed images")
    train_limit: int | None = Field(
        None,
        ge=2,
        description="use the first N of a keyed permutation of the training set (validation included)",
    )
    validation_fraction: float = Field(0.1, gt=0, lt=0.9, description="share of the training set held out")

    epochs: int = Field(10, ge=1, le=100_000, description="passes over the training split")
    batch_size: int = Field(64, ge=1, le=1_048_576, description="images per optimizer step")
    eval_batch_size: int = Field(256, ge=1, le=1_048_576, description="images per evaluation forward pass")
    accumulation: int = Field(1, ge=1, le=65_536, description="micro-batches that a batch is split into")

    optimizer: str = Field("sgd", min_length=1, description="sgd, adamw or any name of timm's factory")
    optimizer_options: dict[str, JsonValue] = Field(
        {}, description="keyword arguments for the optimizer, such as betas"
    )
    lr: Positive = Field(0.1, description="peak learning rate")
    momentum: Fraction = Field(0.9, description="momentum, AdamW's first beta")
    nesterov: bool = Field(True, description="Nesterov momentum (sgd)")
    weight_decay: NonNegative = Field(5e-4, description="on weights of two or more dimensions only")
    clipping: Positive | None = Field(None, description="adaptive gradient clipping's λ; None is off")
    clipping_head: Positive | None = Field(
        None,
        description="clip the weights that make the logits at so many times λ, unless they start at zero; None: never",
    )
    centralization: bool = Field(
        False, description="gradient centralization: the mean of every filter's gradient is taken out"
    )
    clipping_eps: Positive = Field(1e-3, description="the least unit norm that AGC compares with")
    sam_rho: NonNegative = Field(0.0, description="radius of sharpness-aware minimization; 0 is off")
    sam_share: Share = Field(1.0, description="part of each batch that SAM's ascent is taken on")
    warmup_epochs: NonNegative = Field(0.0, description="epochs of linear warm-up from 0")
    schedule: Literal["cosine", "steps", "constant"] = Field(
        "cosine", description="the learning rate after the warm-up; steps fall at decay_epochs"
    )
    decay_epochs: tuple[Positive, ...] = Field((), description="epochs at whose end the rate falls (steps)")
    decay_factor: Share = Field(0.1, description="what each fall multiplies the rate by (steps)")
    min_lr: NonNegative = Field(0.0, description="the learning rate at the cosine's end")

    label_smoothing: Fraction = Field(0.0, description="share of the target spread over all classes")
    mixup: NonNegative = Field(0.0, description="MixUp's Beta parameter; 0 is off")
    cutmix: NonNegative = Field(0.0, description="CutMix's Beta parameter; 0 is off")
    augment: Literal["none", "crop", "crop-flip"] = Field(
        "crop",
        description="random shifts by up to an eighth of the side (streamed images: crops of random area and "
        "aspect), and horizontal flips",
    )
    randaugment_layers: int = Field(
        0, ge=0, le=16, description="RandAugment's operations per image; 0 is off"
    )
    randaugment_magnitude: float = Field(
        9.0,
        ge=0,
        le=30,
        allow_inf_nan=False,
        description="their strength, in tenths: 10 is full, as in NFNets",
    )
    random_erasing: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.0, description="probability that a box of an image is erased; 0 is off"
    )
    erasing_fill: Literal["mean", "noise"] = Field(
        "mean", description="what an erased box holds: the data's mean, or normal noise"
    )
    augment_repeats: int = Field(
        1, ge=1, le=64, description="times that a batch holds each of its images, every time drawn anew"
    )
    drop_rate: Fraction | None = Field(None, description="dropout; None leaves the model's own default")
    drop_path_rate: Fraction | None = Field(
        None, description="stochastic depth; None leaves the model's own default"
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="decay of the weights' moving average, which is then what is evaluated"
    )

    seed: int = Field(0, ge=0, lt=2**63, description="of initialization, order and augmentation")
    order: Literal["shuffled", "fixed"] = Field(
        "shuffled",
        description="the images' order: anew in every epoch, or one permutation for all (single shuffle), which leaves "
        "the same images over that fill no batch",
    )
    train: Literal["all", "affine"] = Field(
        "all",
        description="what learns: everything, or gains, biases and norm layers' parameters only, all weights as they "
        "were initialized",
    )
    eval_every: int = Field(1, ge=0, description="epochs between validations; 0 is at the end only")
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; None is one epoch"
    )
    keep_checkpoints: int = Field(
        2, ge=2, le=1000, description="the last so many checkpoints stay, and the best by validation"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where there is one")
    channels_last: bool = Field(False, description="channels-last memory format")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast's type")
    grad_checkpointing: bool = Field(
        False, description="recompute blocks in the backward pass instead of keeping their activations"
    )
    compile: bool = Field(False, description="torch.compile the model")
    sync_bn: bool = Field(
        False, description="BatchNorm's statistics over all processes; norm-free arms have none"
    )
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads, which decide the last bits; None is what a run or a sweep began with: a run with "
        "torch's choice (OMP_NUM_THREADS, or the cores), a sweep's runs with OMP_NUM_THREADS or one",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """JSON can hold every value, and no switch stands for a number: true is not a batch size of 1."""
        name = info.field_name or ""
        wrong = fault(str(value)) if isinstance(value, Path) else None
        if isinstance(value, dict | list | tuple | str | float):
            wrong = fault(value)
        if wrong is None and isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            wrong = "no number or name"
        if wrong is not None:
            raise ValueError(f"{name}={shown(value)}: {wrong}")
        return value

    @field_validator("data")
    @classmethod
    def _known_data(cls, name: str) -> str:
        if name not in (*RESIDENT, *STREAMED) and not name.startswith(TIMM):
            raise ValueError(
                f"data={name!r}: {unknown('data set', name, (*RESIDENT, *STREAMED, 'timm:NAME'))}"
            )
        return name

    @property
    def streamed(self) -> bool:
        """Whether images are read from their files while training, not resident on the device."""
        return self.data not in RESIDENT

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation={self.accumulation}: expected a divisor of batch_size={self.batch_size}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr:g}: expected at most lr={self.lr:g}")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs:g}: expected at most epochs={self.epochs}")
        if self.nesterov and self.momentum == 0 and self.optimizer == "sgd":
            raise ValueError("momentum=0: Nesterov needs a momentum above 0; set nesterov to false")
        if self.batch_size % self.augment_repeats:
            raise ValueError(
                f"augment_repeats={self.augment_repeats}: expected a divisor of batch_size={self.batch_size}"
            )
        if (self.schedule == "steps") != bool(self.decay_epochs):
            raise ValueError(
                f"decay_epochs={self.decay_epochs}: expected epochs for schedule='steps', none for another"
            )
        if self.grad_checkpointing and self.compile:
            raise ValueError(
                "grad_checkpointing=True: the compiler decides itself what to compute again; set one of it and compile"
            )
        if self.min_lr and self.schedule != "cosine":
            raise ValueError(f"min_lr={self.min_lr:g}: only schedule='cosine' ends at it; leave it out")
        if self.data in ("imagefolder", "imagenet") and self.data_dir is None:
            raise ValueError(f"data={self.data!r}: expected a folder of class folders; set data_dir")
        if self.data_options and not self.streamed:
            raise ValueError(f"data_options={self.data_options}: expected streamed data, got {self.data!r}")
        return self

    @classmethod
    def create(cls, **fields: Any) -> RunConfig:
        """A configuration, or a UserError that names the field, its value and its bound in one line."""
        try:
            return cls(**fields)
        except ValidationError as error:
            raise _one_line(error, cls.model_fields) from None

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        """The configuration that `write` left, or a UserError."""
        fields = read_json(path, "the settings of a run, as JSON")
        try:
            return cls.create(**fields)
        except UserError as error:
            raise UserError(f"{path}: not the settings of a run: {error}") from None

    def to_json(self) -> str:
        """Every field, as indented JSON."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def decisive(self) -> dict[str, Any]:
        """The fields that determine the result, by name."""
        fields = self.model_dump(mode="json")
        if self.init_from is not None:  # what is in the file decides, not where it lies
            fields["init_from"] = _sha256(self.init_from)
        return {name: fields[name] for name in sorted(fields) if name not in _NOT_IN_FINGERPRINT}

    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of what determines the result.

        Example:
            >>> a = RunConfig.create(workers=1)
            >>> a.fingerprint() == RunConfig.create(workers=2).fingerprint()
            True
            >>> a.fingerprint() == RunConfig.create(threads=2).fingerprint()
            False
        """
        canonical = json.dumps(self.decisive(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def settled(self, begun: RunConfig | Mapping[str, Any]) -> RunConfig:
        """This configuration, with what it leaves open (threads, device) as in another one.

        Example:
            >>> config = RunConfig.create(lr=0.3, device="cpu")
            >>> config.settled(RunConfig.create(threads=2, device="cuda")) == config.settled({"threads": 2})
            True
        """
        there = begun.model_dump() if isinstance(begun, RunConfig) else begun
        left = {n: there[n] for n, unset in _OPEN.items() if n in there and getattr(self, n) == unset}
        return self.model_copy(update=left)

    def differences(self, other: RunConfig) -> list[str]:
        """Decisive fields in which two configurations differ, as 'name: this, there other'.

        Example:
            >>> RunConfig.create(lr=0.1).differences(RunConfig.create(lr=0.2))
            ['lr: 0.1 here, 0.2 there']
        """
        here, there = self.decisive(), other.decisive()
        return [
            f"{name}: {here[name]} here, {there[name]} there" for name in here if here[name] != there[name]
        ]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"init_from={path}: cannot be read ({error.strerror}); expected weights") from None


def _one_line(error: ValidationError, fields: Any) -> UserError:
    """The first faults of a validation, in one line, each as 'field=value: what was expected'."""
    lines = []
    for one in error.errors(include_url=False):
        name = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            return unknown("setting", name, fields)
        if one["type"] == "value_error":
            lines.append(str(one["ctx"]["error"]) if "ctx" in one else one["msg"])
            continue
        message = one["msg"]
        lines.append(f"{name}={shown(one['input'])}: {message[0].lower()}{message[1:]}")
    return UserError("; ".join(dict.fromkeys(lines)))
