"""Rows of a distributed run: every rank measures its part of the batch, the report is about the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from nfnets.errors import UserError
from nfnets.signal.rows import RawPoint, merge_rows

Steps = list[tuple[int, list[RawPoint]]]


def _ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    inner: Any = model
    while isinstance(inner, nn.Module):
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            return inner
        inner = getattr(inner, "_orig_mod", None)
    return None


def several(model: nn.Module) -> bool:
    """Whether there is another rank to merge with."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    wrapper = _ddp(model)
    return dist.get_world_size(wrapper.process_group if wrapper else None) > 1


def first() -> bool:
    """Whether this process is the one that speaks for all."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def wrapped(model: nn.Module) -> bool:
    """Whether a model's ranks share the work by DDP, so that its report should be about all of them."""
    return _ddp(model) is not None and several(model)


def merge_steps(steps: Sequence[tuple[int, list[RawPoint]]], model: nn.Module) -> tuple[Steps, int]:
    """The steps that every rank sampled, merged over all ranks; collective.

    Args:
        steps: what this rank measured, by step.
        model: whose process group to use, if it is in DDP.

    Returns:
        The steps, the same on every rank, and the number of ranks.

    Raises:
        UserError: no process group, or ranks that sampled no step in common.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise UserError(
            "merge=True without torch.distributed: expected a process group; call init_process_group"
        )
    wrapper = _ddp(model)
    group = wrapper.process_group if wrapper else None
    world = dist.get_world_size(group)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, list(steps), group=group)
    by_step = [dict(each) for each in everyone]
    common = [step for step, _ in everyone[0] if all(step in each for each in by_step)]
    if not common:
        raise UserError(
            "ranks sampled no step in common: expected the same `every` on each; open the probe on all"
        )
    return [(step, merge_rows([each[step] for each in by_step])) for step in common], world
