"""What timm asks of a network of a stem and stages: features in between, recomputation, parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nfnets.errors import UserError


class Parts(NamedTuple):
    """A network in execution order. Intermediates are taken after `stem`, after each stage, the last after `neck`."""

    stem: Sequence[nn.Module]
    after_stem: Sequence[nn.Module]
    stages: Sequence[nn.Module]
    neck: Sequence[nn.Module]
    last: Sequence[nn.Module]


class StagedNet(nn.Module):
    """The methods that timm's tools call on a model, from two things it must declare: `parts` and `feature_info`."""

    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    stem_pattern: str
    stage_pattern: str
    grad_checkpointing: bool = False

    def parts(self) -> Parts:
        """The modules between the intermediates, as they are now (a conversion may have replaced them)."""
        raise NotImplementedError

    def keep_stages(self, count: int) -> None:
        """Remove the stages after these and what follows them; with 0, also what follows the stem's intermediate."""
        raise NotImplementedError

    def drop_last_norm(self) -> None:
        """Remove a norm layer that follows the last intermediate."""

    def drop_head(self) -> None:
        """Remove what a head has beside pooling and classifier."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        raise NotImplementedError

    def run_stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        """One stage, its blocks recomputed in the backward pass if `set_grad_checkpointing` says so."""
        if not self.grad_checkpointing:
            return stage(x)
        for block in stage.children():
            x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features between stages, as timm's models give them.

        Args:
            x: images (N, C, H, W).
            indices: which: 0 is the stem's, i the i-th stage's; negative ones count from the end, a number takes
                the last so many, None takes all.
            norm: accepted, as by timm's own models of this kind, and without effect: intermediates are not normalized.
            stop_early: do not run what comes after the last one taken.
            output_fmt: `"NCHW"`.
            intermediates_only: leave out the final features.

        Returns:
            What `forward_features` gives (or, stopped early, what was computed last) and the list of intermediates;
            or the list alone.

        Raises:
            UserError: another format, or an index that this network does not have.
        """
        if output_fmt != "NCHW":
            raise UserError(f"{output_fmt=}: expected 'NCHW'; features of a convolutional network are maps")
        parts = self.parts()
        taken, last = self._taken(indices)
        found: list[Tensor] = []
        x = _through(parts.stem, x)
        if 0 in taken:
            found.append(x)
        if not (stop_early and last == 0):
            x = _through(parts.after_stem, x)
        stages = parts.stages[:last] if stop_early else parts.stages
        for index, stage in enumerate(stages, 1):
            x = self.run_stage(stage, x)
            if index == len(parts.stages):
                x = _through(parts.neck, x)
            if index in taken:
                found.append(x)
        if intermediates_only:
            return found
        return (_through(parts.last, x) if len(stages) == len(parts.stages) else x), found

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove what the intermediates at `indices` do not need.

        Args:
            indices: as for `forward_intermediates`.
            prune_norm: remove a norm layer after the last stage, with its activation (the BatchNorm twins have one).
            prune_head: remove the classifier and pooling too; they go anyway if the last stage does.

        Returns:
            The indices, counted from the start.
        """
        taken, last = self._taken(indices)
        shortened = last < len(self.parts().stages)
        if shortened:
            self.keep_stages(last)
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        elif prune_norm:
            self.drop_last_norm()
        if shortened or prune_head:
            self.drop_head()
            self.reset_classifier(0, "")
        return taken

    def _taken(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        count = len(self.parts().stages) + 1
        if indices is None or isinstance(indices, int):
            last = count if indices is None else indices
            taken = list(range(count - last, count)) if 1 <= last <= count else []
        else:
            taken = [index + count if index < 0 else index for index in indices]
        if not taken or not all(0 <= index < count for index in taken):
            raise UserError(
                f"{indices=}: expected some of 0 (stem) to {count - 1}, negative ones to count from the end, "
                f"or how many of the last, 1 to {count}"
            )
        return taken, max(taken)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of gains, biases, norm parameters and scalars (timm's optimizer factory reads this)."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layer groups for timm's layer-wise learning-rate decay: the stem, each block (or stage), the head."""
        blocks = self.stage_pattern if coarse else self.stage_pattern + r"\.(\d+)"
        return {"stem": self.stem_pattern, "blocks": [(blocks, None), (r"^final_conv", (99999,))]}


def _through(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x
