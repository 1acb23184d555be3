"""What a probe or a profile measured: points, and how they are found. Rules, figures and pages read this."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from nfnets.errors import unknown


@dataclass(frozen=True)
class Point:
    """One measured place of one model. `None` means not measured or not defined there; NaN means NaN was seen.

    Attributes:
        model: the name the caller gave the model.
        name: module path; a residual join carries the path of the module that adds; `#2` is a second call.
        kind: conv, linear, norm, activation, pool, join, module or function.
        role: stem, branch_end, join, head or "".
        feeds: kind of the first node that reads this output.
        depth: weight layers on the longest path from the input to here.
        block: 0 for the stem, j for the j-th residual join, else `None`.
        call: 0 for the first call of a module, 1 for the second, …
        step: the training step that was sampled (0 for `profile`).
        shape: of the output.
        dtype: of the output.
        count: elements per channel behind each mean and variance.
        mean_sq: average channel squared mean, mean_c(E[x_c]²).
        var: average channel variance, mean_c(Var[x_c]), biased.
        residual_var: at a join, the average channel variance at the branch end before SkipInit and α.
        predicted_mean_sq: what theory expects for `mean_sq`.
        predicted_var: what theory expects for `var`.
        predicted_residual_var: what theory expects for `residual_var`.
        total_mean: mean over everything.
        total_var: variance over everything.
        dead: fraction of channels whose output does not vary over the batch.
        min: smallest value.
        max: largest value.
        nonfinite: a NaN or an inf was seen.
        headroom_fp16: log2(65504 / max|x|), bits left before fp16 overflows.
        headroom_bf16: the same for bfloat16.
        cosine: mean cosine similarity between samples; from a probe, at the trunk and the branch ends only.
        rank: effective rank of the batch (participation ratio of its Gram matrix), at most min(N, 16).
        weight_norm: L2 norm of the layer's stored weight.
        update_ratio: ‖ΔW‖ / ‖W‖ from this step to the next.
        clipped: fraction of the weight's units that AGC clipped, over all steps until the next sampled one.
        grad_mean_sq: `mean_sq` of the gradient of the loss by this output.
        grad_var: `var` of that gradient.
        grad_norm: its L2 norm.
        grad_min: its smallest value.
        grad_max: its largest value.
        weight_grad_norm: L2 norm of the weight's gradient.
        training_var: from `profile`, what `var` is with dropout and stochastic depth on.
        quiet: fraction of channels whose variance is below a millionth of the average channel's.
        peak: of attention, the mean over rows of the largest weight.
        logits: of attention whose logits nothing scales, the mean over rows of their variance.
        weight_shape: of the layer's (first) weight.
        groups: of a convolution.
        gain: of a standardized layer, what multiplies its weight: scale · α · rms(gain).
        frozen: whether none of the layer's weights requires a gradient.
        identical: whether the layer's units all have the same weights.
        batch_norm: whether the layer is a norm layer with statistics over the batch.
    """

    model: str
    name: str
    kind: str
    role: str = ""
    feeds: str = ""
    depth: int = 0
    block: int | None = None
    call: int = 0
    step: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    count: int = 0
    mean_sq: float | None = None
    var: float | None = None
    residual_var: float | None = None
    predicted_mean_sq: float | None = None
    predicted_var: float | None = None
    predicted_residual_var: float | None = None
    total_mean: float | None = None
    total_var: float | None = None
    dead: float | None = None
    min: float | None = None
    max: float | None = None
    nonfinite: bool = False
    headroom_fp16: float | None = None
    headroom_bf16: float | None = None
    cosine: float | None = None
    rank: float | None = None
    weight_norm: float | None = None
    update_ratio: float | None = None
    clipped: float | None = None
    grad_mean_sq: float | None = None
    grad_var: float | None = None
    grad_norm: float | None = None
    grad_min: float | None = None
    grad_max: float | None = None
    weight_grad_norm: float | None = None
    training_var: float | None = None
    quiet: float | None = None
    peak: float | None = None
    logits: float | None = None
    weight_shape: tuple[int, ...] = ()
    groups: int | None = None
    gain: float | None = None
    frozen: bool | None = None
    identical: bool | None = None
    batch_norm: bool = False


COLUMNS = tuple(f.name for f in fields(Point))


@dataclass
class Measured:
    """Measured points, in execution order, model by model, step by step.

    Args:
        points: the points.
        notes: what could not be estimated, and why, one line each.
        meta: how it was measured (shapes, versions).

    Example:
        >>> Measured([Point("net", "conv1", "conv", var=1.0)])["conv1"].var
        1.0
    """

    points: list[Point]
    notes: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def models(self) -> tuple[str, ...]:
        """The models' names, in the order they were given."""
        return tuple(dict.fromkeys(p.model for p in self.points))

    @property
    def steps(self) -> tuple[int, ...]:
        """The sampled steps, ascending."""
        return tuple(sorted({p.step for p in self.points}))

    def select(
        self,
        model: str | None = None,
        step: int | None = None,
        role: str | None = None,
        kind: str | None = None,
    ) -> list[Point]:
        """The points that match everything given, in execution order.

        Args:
            model: of this model.
            step: of this step; the latest when a report has several and none is given.
            role: with this role.
            kind: of this kind.

        Returns:
            A new list.

        Example:
            >>> Measured([Point("a", "x", "conv"), Point("b", "x", "conv")]).select(model="b")[0].model
            'b'
        """
        if step is None and self.points:
            step = self.steps[-1]
        return [
            p
            for p in self.points
            if p.step == step
            and (model is None or p.model == model)
            and (role is None or p.role == role)
            and (kind is None or p.kind == kind)
        ]

    def __getitem__(self, name: str) -> Point:
        """The latest point of this name (`model/name` where several models share it)."""
        for p in reversed(self.points):
            if name in (p.name, f"{p.model}/{p.name}"):
                return p
        raise unknown("point", name, {p.name for p in self.points})
