from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nfnets.agc import clip_grad_agc_
from nfnets.train.config import RunConfig
from nfnets.train.loop.order import Batch
from nfnets.train.loop.processes import Processes
from nfnets.train.loop.trainer import Trainer
from nfnets.train.models import build


def trainer(name: str, **fields: Any) -> Trainer:
    config = RunConfig.create(
        model=f"train_nets:{name}",
        **({"batch_size": 24, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "epochs": 5} | fields),
    )
    torch.manual_seed(3)
    model = build(config.model, num_classes=10, channels=1, size=8)
    return Trainer(model, config, 4, 10, Processes(torch.device("cpu")))


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    index = torch.arange(24)
    return Batch(torch.randn(24, 1, 8, 8, generator=generator), (index * 7 + step) % 10, index)


class Reference(torch.optim.Optimizer):
    """SAM's two steps as Foret et al. write them, around torch's own SGD."""

    def __init__(self, parameters: list[nn.Parameter], rho: float, **options: Any) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base = torch.optim.SGD(parameters, **options)
        self.rho = rho

    def first_step(self) -> None:
        parameters = self.param_groups[0]["params"]
        norm = torch.sqrt(sum(((p.grad**2).sum() for p in parameters), torch.zeros(())))
        for p in parameters:
            self.state[p]["climb"] = p.grad * self.rho / norm
            p.data += self.state[p]["climb"]

    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.data -= self.state[p]["climb"]
        self.base.step()


def steps(model: nn.Module, images: Tensor, labels: Tensor, optimizer: Reference, share: float) -> None:
    some = round(share * len(labels))
    optimizer.zero_grad()
    F.cross_entropy(model(images[:some]), labels[:some]).backward()
    optimizer.first_step()
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()


@pytest.mark.parametrize("clipping", [None, 0.02])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_against_the_papers_two_steps(clipping: float | None, share: float):
    ours = trainer(
        "plain_net", sam_rho=0.3, sam_share=share, clipping=clipping, weight_decay=0.0, schedule="constant"
    )
    torch.manual_seed(3)
    theirs = build("train_nets:plain_net", num_classes=10, channels=1, size=8)
    reference = Reference(list(theirs.parameters()), 0.3, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(5):
        loss, fraction = ours.step(batch(step))
        images, labels = batch(step).images, batch(step).labels
        first = F.cross_entropy(theirs(images[: round(share * 24)]), labels[: round(share * 24)])
        assert float(loss) == pytest.approx(first.item(), rel=1e-4)
        steps(theirs, images, labels, reference, share)
        if clipping is not None:  # of the second gradient, relative to the weights where the step is taken
            for p in theirs.parameters():
                p.data -= reference.state[p]["climb"]
            head = theirs.get_parameter("4.weight")
            clip_grad_agc_([p for p in theirs.parameters() if p is not head], clipping)
            for p in theirs.parameters():
                p.data += reference.state[p]["climb"]
            assert fraction is not None
            assert float(fraction) > 0
        reference.second_step()
    for a, b in zip(ours.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_accumulation_is_the_whole_batch():
    one, four = (trainer("plain_net", sam_rho=0.2, accumulation=parts) for parts in (1, 4))
    for step in range(4):
        assert float(one.step(batch(step))[0]) == pytest.approx(float(four.step(batch(step))[0]), rel=1e-5)
    for a, b in zip(one.model.parameters(), four.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_weights_themselves():
    sharp, plain = trainer("dropout_net", sam_rho=5.0), trainer("dropout_net")
    for one in (sharp, plain):
        one.step(batch(0))
    for a, b in zip(sharp.model.buffers(), plain.model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert any(
        not torch.equal(a, b) for a, b in zip(sharp.model.parameters(), plain.model.parameters(), strict=True)
    )


def test_a_loss_scale_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    """The scaler multiplies both losses by 65,536; in float32 that is exact."""
    plain, scaled = (
        trainer("plain_net", sam_rho=0.2, clipping=0.1),
        trainer("plain_net", sam_rho=0.2, clipping=0.1),
    )
    scaled.scaler = torch.amp.GradScaler("cpu")
    for step in range(4):
        for one in (plain, scaled):
            one.step(batch(step))
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_an_overflow_skips_the_step_and_moves_nothing(rho: float):
    one = trainer("plain_net", sam_rho=rho, clipping=0.1)
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = [p.detach().clone() for p in one.model.parameters()]
    huge = batch(0)
    one.step(Batch(huge.images * 100, huge.labels, huge.index))
    assert all(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))
    assert one.scaler.get_scale() == 2.0**125
    one.scaler = torch.amp.GradScaler("cpu")
    one.step(batch(1))
    assert not any(torch.equal(a, b) for a, b in zip(before, one.model.parameters(), strict=True))
    assert all(p.isfinite().all() for p in one.model.parameters())


def test_clipping_sees_unscaled_whole_gradients():
    """fp16 with a scaler and accumulation: the same fraction is clipped as in float32, not nearly all."""
    fields = {"clipping": 0.05, "batch_size": 24}
    half = trainer("plain_net", precision="fp16", accumulation=3, **fields)
    full = trainer("plain_net", **fields)
    assert half.scaler.is_enabled()
    for step in range(3):
        clipped = [one.step(batch(step))[1] for one in (half, full)]
        assert clipped[0] is not None
        assert clipped[1] is not None
        assert 0 < float(clipped[1]) < 1
        assert float(clipped[0]) == pytest.approx(float(clipped[1]), abs=0.06)
    for a, b in zip(half.model.parameters(), full.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)
