from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler

from nfnets.train.loop.schedule import learning_rate


@given(
    st.floats(1e-4, 10.0),
    st.integers(2, 200),
    st.floats(0, 1),
    st.floats(0, 0.9),
)
def test_against_timm(peak: float, total: int, warm: float, low: float):
    warmup = int(warm * (total - 2))
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=low * peak,
        warmup_t=warmup,
        warmup_lr_init=peak / (warmup + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(total + 2):
        ours = learning_rate(step, peak=peak, total=total, warmup=warmup, floor=low * peak)
        assert ours == pytest.approx(theirs._get_lr(step)[0], rel=1e-9, abs=1e-12)


def test_warmup_alone_ends_at_the_peak():
    assert [learning_rate(t, peak=2.0, total=3, warmup=3) for t in range(4)] == [0.5, 1.0, 1.5, 0.0]


@given(
    st.lists(st.integers(1, 60), unique=True, max_size=4).map(sorted), st.floats(0.05, 1), st.integers(0, 5)
)
def test_falls_against_torch(falls: list[int], factor: float, warmup: int):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=falls, gamma=factor)
    for step in range(60):
        if step >= warmup:
            ours = learning_rate(step, peak=0.3, total=60, warmup=warmup, falls=falls, factor=factor)
            assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("step", "total", "warmup"), [(-1, 3, 0), (0, 3, 4), (0, 3, -1)])
def test_impossible_schedules(step: int, total: int, warmup: int):
    with pytest.raises(ValueError, match="expected step"):
        learning_rate(step, peak=1.0, total=total, warmup=warmup)
