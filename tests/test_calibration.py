"""Temperature and calibration error, beside scipy's minimizer and the definition written out."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from nfnets import calibration
from nfnets.errors import UserError


def drawn(sharp: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels drawn from what softmax says, then logits made `sharp` times too large."""
    torch.manual_seed(seed)
    logits = torch.randn(4000, 7)
    return logits * sharp, torch.multinomial(logits.softmax(1), 1).flatten()


@pytest.mark.parametrize("sharp", [0.2, 1.0, 5.0, 40.0])
def test_the_temperature_is_what_spoiled_it_and_what_scipy_finds(sharp: float) -> None:
    logits, labels = drawn(sharp)
    found = calibration.temperature(logits, labels)
    best = minimize_scalar(
        lambda t: calibration.nll(logits.double() / 2.718281828459045**t, labels),
        bounds=(-6, 6),
        method="bounded",
    )
    assert found == pytest.approx(2.718281828459045**best.x, rel=1e-3)
    assert found == pytest.approx(sharp, rel=0.1)


def test_calibration_after_and_its_error_written_out() -> None:
    logits, labels = drawn(5.0)
    t = calibration.temperature(logits, labels)
    assert calibration.expected_calibration_error(logits, labels) > 0.2
    assert calibration.expected_calibration_error(logits / t, labels) < 0.03
    confidence, predicted = logits.double().softmax(1).max(1)
    total = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            total += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    assert calibration.expected_calibration_error(logits, labels) == pytest.approx(total, abs=1e-12)


def test_always_right_or_always_wrong_has_an_end() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert calibration.temperature(logits, torch.tensor([0, 1])) == pytest.approx(1e-3)
    assert calibration.temperature(logits, torch.tensor([1, 0])) == pytest.approx(1e3)


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        ([[1.0, 2.0]], torch.tensor([0]), "logits is a list"),
        (torch.zeros(2, 3), [0, 1], "labels is a list"),
        (torch.zeros(2), torch.tensor([0, 1]), "logits of shape"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([0, 1]), "floating-point"),
        (torch.zeros(2, 3), torch.tensor([0]), "a class for each of the 2 rows"),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "at least one"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "labels of shape"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "labels from 0 to 3: expected 0 to 2"),
        (torch.full((1, 3), torch.inf), torch.tensor([0]), "not finite"),
    ],
)
def test_what_cannot_be_calibrated(logits: Tensor, labels: Tensor, said: str) -> None:
    with pytest.raises(UserError, match=said):
        calibration.temperature(logits, labels)
    with pytest.raises(UserError, match=said):
        calibration.expected_calibration_error(logits, labels)


def test_bins() -> None:
    with pytest.raises(UserError, match="bins=0"):
        calibration.expected_calibration_error(*drawn(1.0), bins=0)
