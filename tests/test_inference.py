import pytest
import torch

from timm_poolattn.inference import calibration_error


def test_calibration_error_is_the_papers_equation():
    """Eq. 3 of Guo et al. (2017) written out bin by bin: sum of |B_m| / n * |acc(B_m) - conf(B_m)|."""
    confidence = torch.rand(500, dtype=torch.float64).clamp(0.1)
    confidence[:3] = torch.tensor([1 / 15, 2 / 15, 1.0])  # the edges belong to the bin below them
    hit = torch.rand(500) < confidence
    total = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            gap = hit[inside].double().mean() - confidence[inside].mean()
            total += inside.sum().item() / 500 * gap.abs().item()
    assert calibration_error(confidence, hit) == pytest.approx(100 * total, rel=1e-9)


def test_calibration_error_extremes():
    sure = torch.ones(10)
    assert calibration_error(sure, torch.ones(10, dtype=torch.bool)) == 0
    assert calibration_error(sure, torch.zeros(10, dtype=torch.bool)) == 100
    half = torch.arange(10) % 2 == 0
    assert calibration_error(torch.full((10,), 0.5), half) == 0  # right as often as it says
    assert calibration_error(torch.full((10,), 0.9), half) == pytest.approx(40, rel=1e-6)
