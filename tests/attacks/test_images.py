"""How alike two pictures are, by numbers that can be worked out."""

import math

import pytest
import torch

from fedsim.attacks.images import K1, K2, matched, psnr, ssim, total_variation
from fedsim.rng import Key


def noise(*size: int) -> torch.Tensor:
    return torch.rand(size, generator=Key.root(1).at("images").torch(), dtype=torch.float64)


def test_psnr_by_hand() -> None:
    x = torch.zeros(2, 1, 8, 8)
    y = torch.stack([torch.full((1, 8, 8), 0.1), torch.full((1, 8, 8), 1.0)])
    assert psnr(x, y).tolist() == pytest.approx([20.0, 0.0], abs=1e-5)
    assert psnr(x, x).tolist() == [math.inf, math.inf]


def test_ssim_of_one_window_by_hand() -> None:
    x, y = noise(1, 7, 7), noise(1, 1, 7, 14)[:, 0, :, 7:]
    mx, my = x.mean(), y.mean()
    cov = ((x - mx) * (y - my)).sum() / 48
    c1, c2 = K1**2, K2**2
    want = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (x.var() + y.var() + c2))
    assert float(ssim(x, y)) == pytest.approx(float(want), rel=1e-12)


def test_ssim_of_equal_pictures_and_of_flat_ones() -> None:
    x = noise(3, 2, 12, 9)
    assert ssim(x, x).tolist() == pytest.approx([1, 1, 1])
    a, b = (torch.full((1, 8, 8), level, dtype=torch.float64) for level in (0.2, 0.6))
    assert float(ssim(a, b)) == pytest.approx((2 * 0.12 + K1**2) / (0.04 + 0.36 + K1**2), rel=1e-4)
    with pytest.raises(ValueError, match="at least 7×7"):
        ssim(noise(1, 6, 9), noise(1, 6, 9))


def test_total_variation_by_hand() -> None:
    x = torch.tensor([[[0.0, 1.0, 1.0], [0.0, 0.0, 0.5]]])  # across: 1, 0, 0, ½; down: 0, 1, ½
    assert float(total_variation(x)) == pytest.approx(1.5 / 4 + 1.5 / 3)


def test_pictures_are_matched_one_to_one() -> None:
    truth = noise(5, 1, 8, 8)
    guess = (truth + 0.01).flip(0)
    assert torch.equal(matched(guess, truth), truth + 0.01)
    # Nearest alone would give both to the first picture.
    truth = torch.tensor([0.0, 1.0]).view(2, 1, 1).expand(2, 8, 8)
    guess = torch.tensor([0.2, 0.1]).view(2, 1, 1).expand(2, 8, 8)
    assert matched(guess, truth)[:, 0, 0].tolist() == pytest.approx([0.1, 0.2])
