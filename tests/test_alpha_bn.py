"""Evaluation by mixed statistics, against torch's batch norm in both modes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from conversion_nets import NETS
from torch import Tensor, nn

from nfnets.alpha_bn import batch_statistics
from nfnets.errors import UserError


def net() -> tuple[nn.Module, Tensor]:
    """In evaluation mode, with statistics and parameters that show."""
    torch.manual_seed(0)
    model = NETS["pre-activation"]().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.data.normal_()
            module.running_var.data.uniform_(0.5, 1.5)
    return model.eval(), torch.randn(6, 3, 12, 12).double()


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 5, 4), (6, 3, 2, 3, 2)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_one_layer(shape: tuple[int, ...], share: float) -> None:
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2](3).double().eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.data.normal_()
    x = 3 * torch.randn(shape).double() + 1
    over = [0, *range(2, len(shape))]
    mean = (1 - share) * norm.running_mean + share * x.mean(over)
    variance = (1 - share) * norm.running_var + share * x.var(over, correction=0)
    before = copy.deepcopy(norm.state_dict())
    with batch_statistics(norm, share):
        found = norm(x)
    torch.testing.assert_close(found, F.batch_norm(x, mean, variance, norm.weight, norm.bias, eps=norm.eps))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    assert [name for name, _ in norm.named_buffers()] == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]


def test_nothing_of_the_batch_is_evaluation_and_all_of_it_is_training() -> None:
    model, x = net()
    expected = model(x)
    trained = copy.deepcopy(model).train()(x)
    with batch_statistics(model, 0.0):
        torch.testing.assert_close(model(x), expected)
    with batch_statistics(model):
        torch.testing.assert_close(model(x), trained)
        assert not torch.allclose(model(x[:2]), trained[:2])  # the images beside it count
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_training_mode_and_errors_are_left_alone() -> None:
    model, x = net()
    with batch_statistics(model, 0.5), pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 8, 8).double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected 4D"), batch_statistics(model, 0.5):
        model.last(torch.randn(16).double())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    twin = copy.deepcopy(model).train()
    with batch_statistics(twin, 0.5):
        found = twin(x)
    expected = copy.deepcopy(model).train()
    torch.testing.assert_close(found, expected(x))
    torch.testing.assert_close(twin.state_dict(), expected.state_dict())


@pytest.mark.parametrize(
    ("model", "share", "says"),
    [
        (nn.BatchNorm1d(2), 1.5, "share_of_batch=1.5"),
        (nn.BatchNorm1d(2), True, "share_of_batch=True"),
        (nn.Linear(2, 2), 0.5, "no BatchNorm layer"),
        (nn.BatchNorm1d(2, track_running_stats=False), 0.5, "no BatchNorm layer"),
    ],
)
def test_what_is_refused(model: nn.Module, share: float, says: str) -> None:
    with pytest.raises(UserError, match=says), batch_statistics(model, share):
        pass
