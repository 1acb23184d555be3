"""The protocol of a comparison: arms × batch sizes × learning rates × seeds, and how a rate is chosen.

1. Every arm searches the same declared number of learning rates at every batch size, with the same tuning seeds,
   and is judged on the held-out validation split.
2. The winner runs on every seed, to the end of its budget. Its final-epoch test accuracy is reported.
3. The test split never decides anything, and a run that diverged stays in the table.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from nfnets.errors import UserError, unknown
from nfnets.plain import shown, value_of
from nfnets.train import named_recipes
from nfnets.train.config import RunConfig

# What the protocol sets for every run; an arm or the base configuration cannot.
SWEPT = ("lr", "batch_size", "seed")
# Arms see the same images, or there is nothing to compare; only the common configuration sets these.
_DATA = ("data", "data_dir", "data_options", "download", "verify_data", "unreadable_budget", "image_size")
COMMON = (*_DATA, "crop_pct", "train_limit", "validation_fraction", "epochs")
# A published recipe says how an arm trains; what it trains is the arm's own or the common configuration's.
_TRAINED = ("model", "model_options", "method", "method_options")
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Arm(BaseModel):
    """One contestant: a name and every `RunConfig` field in which it departs from the common ones."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1000,
            pattern=r"^[^\s\x00-\x1f\x7f]+$",
            description="shown in tables and folders",
        ),
    ]
    lrs: Annotated[
        tuple[Rate, ...] | None, Field(description="candidates of its own, as many as every other arm has")
    ] = None
    recipe: Annotated[
        str | None,
        Field(description="a published recipe (`nfnets recipes`) for all that the arm does not set"),
    ] = None

    @property
    def fields(self) -> dict[str, Any]:
        """The `RunConfig` fields that the arm sets itself."""
        return dict(self.model_extra or {})

    def published(self, batch_size: int, epochs: int) -> dict[str, Any]:
        """The `RunConfig` fields of the arm's recipe, at this batch size and length.

        The learning rate is searched all the same, and what all arms have in common stays theirs.

        Example:
            >>> Arm(name="nf", recipe="nf-resnet").published(256, 90)["label_smoothing"]
            0.1
        """
        if self.recipe is None:
            return {}
        left_out = {*SWEPT, *COMMON, *_TRAINED}
        found = named_recipes.recipe(self.recipe).fields(batch_size, epochs)
        return {name: value for name, value in found.items() if name not in left_out}

    @model_serializer(mode="wrap")
    def _brief(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a recipe as before there were any: sweeps from then go on."""
        fields = handler(self)
        if fields["recipe"] is None:
            del fields["recipe"]
        return fields

    @classmethod
    def parse(cls, text: str) -> Arm:
        """An arm from a word: a method, then `:field=value` for anything else.

        Args:
            text: e.g. `"bn"`, `"nf"`, `"nf:clipping=0.02"`, `"nf:recipe=nfnet"`. A key that is not a `RunConfig` field
                is an option of the method.

        Returns:
            The arm, named by the text itself.

        Raises:
            UserError: no method, or a part that is not `field=value`.

        Example:
            >>> Arm.parse("nf:clipping=0.02:alpha=0.5").fields
            {'method': 'nf', 'clipping': 0.02, 'method_options': {'alpha': 0.5}}
        """
        method, *parts = text.strip().split(":")
        if not method:
            raise UserError(f"arm {text!r}: expected a method, then settings, e.g. bn or nf:clipping=0.02")
        fields: dict[str, Any] = {"method": method}
        options: dict[str, Any] = {}
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise UserError(
                    f"arm {text!r}: expected method:field=value, e.g. nf:clipping=0.02, got {part!r}"
                )
            (fields if key in RunConfig.model_fields or key == "recipe" else options)[key] = value_of(value)
        if options:
            fields["method_options"] = options
        try:
            return cls(name=text.strip(), **fields)
        except ValidationError as error:
            raise _one_line(error, f"arm {shown(text.strip())}: ") from None


class ExperimentConfig(BaseModel):
    """Arms, seeds and budgets of one comparison."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Annotated[dict[str, Any], Field(description="RunConfig fields common to every run")] = {}
    arms: Annotated[tuple[Arm, ...], Field(min_length=1, description="the first one is the baseline")]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=10_000)] = (0, 1, 2)
    lrs: Annotated[tuple[Rate, ...], Field(min_length=1, description="the budget of every arm")] = (0.1,)
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (64,)
    lr_scaling: Annotated[
        Literal["none", "sqrt", "linear"],
        Field(description="how the candidates follow the batch size, from the first one on"),
    ] = "none"
    tuning_seeds: Annotated[
        tuple[Seed, ...],
        Field(description="of the search, whose mean decides; none: the first of the seeds"),
    ] = ()
    margin: Annotated[
        float, Field(gt=0, lt=1, description="differences in accuracy below this one do not matter")
    ] = 0.01
    target: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="validation accuracy of time-to-accuracy; None: the baseline's less margin",
        ),
    ] = None

    @classmethod
    def create(cls, **fields: Any) -> ExperimentConfig:
        """The configuration, or one line that names the field, what it was given and what it expects.

        Raises:
            UserError: a field out of bounds, an unknown one, or budgets that are not equal.

        Example:
            >>> ExperimentConfig.create(arms=[{"name": "bn", "method": "bn"}], seeds=[])
            Traceback (most recent call last):
            ...
            nfnets.errors.UserError: seeds=[]: tuple should have at least 1 item after validation, not 0
        """
        try:
            config = cls(**fields)
        except ValidationError as error:
            raise _one_line(error) from None
        for arm in config.arms:  # every run is valid before the first one starts
            for batch_size in config.batch_sizes:
                for lr in config.candidates(arm, batch_size):
                    config.run_config(Trial(arm.name, batch_size, lr, config.seeds[0]))
        return config

    @model_validator(mode="before")
    @classmethod
    def _one_tuning_seed(cls, fields: Any) -> Any:
        """Sweeps from when a search had one seed go on."""
        if isinstance(fields, dict) and "tuning_seed" in fields:
            fields = dict(fields)
            one = fields.pop("tuning_seed")
            fields.setdefault("tuning_seeds", () if one is None else (one,))
        return fields

    @model_validator(mode="after")
    def _consistent(self) -> ExperimentConfig:
        for what, values in (
            ("arms", [slug(arm.name) for arm in self.arms]),
            ("seeds", self.seeds),
            ("tuning_seeds", self.tuning_seeds),
            ("lrs", self.lrs),
            ("batch_sizes", self.batch_sizes),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} {list(values)}: expected each one once")
        for owner, fields in [("run", self.run), *((f"arm {arm.name}", arm.fields) for arm in self.arms)]:
            for key in fields:
                if key in SWEPT:
                    raise ValueError(f"{owner} sets {key}: the protocol sets it; use lrs, batch_sizes, seeds")
                if key in COMMON and owner != "run":
                    raise ValueError(f"{owner} sets {key}: expected the same for all arms; set it in run")
                if key not in RunConfig.model_fields:
                    raise ValueError(str(unknown(f"field of {owner}", key, RunConfig.model_fields)))
        for arm in self.arms:
            if arm.lrs is not None and len(arm.lrs) != len(self.lrs):
                raise ValueError(
                    f"arm {arm.name} has {len(arm.lrs)} learning rates, the others {len(self.lrs)}: "
                    "the budget is equal for all; give as many"
                )
        return self

    @property
    def tuned_with(self) -> tuple[int, ...]:
        """The seeds of the learning-rate search."""
        return self.tuning_seeds or self.seeds[:1]

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def candidates(self, arm: Arm, batch_size: int) -> tuple[float, ...]:
        """The learning rates that an arm searches at a batch size."""
        power = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}[self.lr_scaling]
        factor = (batch_size / self.batch_sizes[0]) ** power
        given = arm.lrs or self.lrs
        if factor == 1.0:
            return given
        digits = 4  # of a scaled rate; more where fewer would make one of two
        while (
            len(scaled := {float(f"{lr * factor:.{digits}g}"): lr for lr in given}) < len(given)
            and digits < 17
        ):
            digits += 1
        return tuple(scaled)

    def run_config(self, trial: Trial) -> RunConfig:
        """What `engine.run` is given for one trial; what nobody sets (AGC's λ, say) follows from its method."""
        swept = {"lr": trial.lr, "batch_size": trial.batch_size, "seed": trial.seed}
        arm = self.arm(trial.arm)
        epochs = self.run.get("epochs", RunConfig.model_fields["epochs"].default)
        published = arm.published(trial.batch_size, epochs) if isinstance(epochs, int) else {}
        given = {**self.run, **published, **arm.fields, **swept}
        fields = named_recipes.by_method(given, given.get("optimizer")) | given
        if fields.get("init_from") is not None:  # a trained net for every seed: "runs/trained/s{seed}/…"
            fields["init_from"] = str(fields["init_from"]).replace("{seed}", str(trial.seed))
        return RunConfig.create(**fields)

    def first_run(self) -> RunConfig:
        """Any run of the sweep: what it says of the data holds for all."""
        arm, batch_size = self.arms[0], self.batch_sizes[0]
        lr = self.candidates(arm, batch_size)[0]
        return self.run_config(Trial(arm.name, batch_size, lr, self.seeds[0]))

    def searches(self) -> dict[tuple[str, int], list[Trial]]:
        """The trials of each arm and batch size's learning-rate search; none where there is one candidate."""
        seeds = self.tuned_with if len(self.lrs) > 1 else ()
        return {
            (arm.name, b): [Trial(arm.name, b, lr, seed) for lr in self.candidates(arm, b) for seed in seeds]
            for b in self.batch_sizes
            for arm in self.arms
        }

    def planned(self) -> list[tuple[str, int, float | None, int]]:
        """Every run as (arm, batch size, learning rate, seed), the rate None where the search decides it."""
        runs: list[tuple[str, int, float | None, int]] = []
        for (arm, batch_size), search in self.searches().items():
            runs += [(arm, batch_size, trial.lr, trial.seed) for trial in search]
            tuned = {trial.seed for trial in search}
            lr = None if search else self.candidates(self.arm(arm), batch_size)[0]
            runs += [(arm, batch_size, lr, seed) for seed in self.seeds if seed not in tuned]
        return runs

    def rates(self, records: Mapping[Trial, dict[str, Any]]) -> dict[tuple[str, int], float]:
        """The learning rate of every arm and batch size whose search is over."""
        found = {}
        for (arm, b), search in self.searches().items():
            if not search:
                found[arm, b] = self.candidates(self.arm(arm), b)[0]
            elif all(trial in records for trial in search):
                found[arm, b] = choose((trial.lr, records[trial]) for trial in search)
        return found

    def finals(self, chosen: dict[tuple[str, int], float]) -> list[Trial]:
        """The reported runs, seed by seed, so that an interrupted sweep holds pairs.

        Args:
            chosen: The learning rate by (arm, batch size); what has none yet is left out.

        Returns:
            The runs.
        """
        return [
            Trial(arm.name, b, chosen[arm.name, b], seed)
            for seed in self.seeds
            for b in self.batch_sizes
            for arm in self.arms
            if (arm.name, b) in chosen
        ]


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep."""

    arm: str
    batch_size: int
    lr: float
    seed: int

    @property
    def folder(self) -> str:
        """Its folder under `<out>/runs/`."""
        return f"{slug(self.arm)}-b{self.batch_size}-lr{rate(self.lr)}-s{self.seed}"


def rate(lr: float) -> str:
    """A learning rate in as few digits as tell it from every other one.

    Example:
        >>> rate(0.1), rate(0.12345678), rate(3e-5)
        ('0.1', '0.12345678', '3e-05')
    """
    return f"{lr:g}" if float(f"{lr:g}") == lr else repr(lr)


def slug(name: str) -> str:
    """An arm's name as part of a folder's; a long one is cut and ends with a hash of the whole.

    Example:
        >>> slug("nf:clipping=0.02"), slug("nf:init_from=runs/a.safetensors"), len(slug("x" * 300))
        ('nf-clipping=0.02', 'nf-init_from=runs-a.safetensors', 89)
    """
    plain = re.sub(r"[^\w.=+-]", "-", name)
    if len(plain.encode(errors="replace")) <= 120:  # with what is added to it, a file's name has 255 bytes
        return plain
    start = plain.encode(errors="replace")[:80].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def choose(results: Iterable[tuple[float, dict[str, Any]]]) -> float:
    """The learning rate to report with: the highest validation accuracy; reads nothing of the test split.

    Over several tuning seeds it is the mean that counts, and a rate at which fewer runs diverge comes first. Ties go to
    the lower validation loss, then to the lower rate. Where every candidate diverged, the lowest rate is taken: its
    divergence is then what the table shows.

    Args:
        results: (learning rate, result of its run) pairs.

    Returns:
        One of the learning rates.

    Example:
        >>> choose([(0.1, {"status": "done", "val_accuracy": 0.9, "val_loss": 0.3}),
        ...         (0.3, {"status": "diverged", "val_accuracy": None, "val_loss": None})])
        0.1
    """
    tried: dict[float, list[dict[str, Any]]] = {}
    for lr, result in results:
        tried.setdefault(lr, []).append(result)

    def merit(lr: float) -> tuple[float, float, float, float]:
        # A run without an accuracy diverged. The status may be the test split's doing, and is not asked.
        done = [result for result in tried[lr] if result.get("val_accuracy") is not None]
        if not done:
            return (-math.inf, -math.inf, -math.inf, -lr)
        losses = [math.inf if result.get("val_loss") is None else result["val_loss"] for result in done]
        accuracy = fmean(result["val_accuracy"] for result in done)
        return (len(done) - len(tried[lr]), accuracy, -fmean(losses), -lr)

    return max(tried, key=merit)


def _one_line(error: ValidationError, where: str = "") -> UserError:
    """The first fault of a validation: its place, what was given there, and what was expected."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    given = f"{place}={shown(first['input'])}: " if place else ""
    message = first["msg"].removeprefix("Value error, ")
    return UserError(f"{where}{given}{message[0].lower()}{message[1:]}")
