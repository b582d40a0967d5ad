"""How alike two pictures are. Pictures are (N, C, H, W) or (N, H, W) with values in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW = 7  # side of SSIM's windows
K1, K2 = 0.01, 0.03


def coloured(x: Tensor) -> Tensor:
    """(N, H, W) as (N, 1, H, W); others as they are."""
    return x[:, None] if x.ndim == 3 else x


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """10 log₁₀(1/MSE) in dB, (N,); infinite for equal pictures."""
    return -10 * (x - y).square().flatten(1).mean(1).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (N,): uniform 7×7 windows, sample covariances, mean over windows.

    The same windows and constants as scikit-image's ``structural_similarity`` with ``data_range = 1``, over whole
    windows only. Raises ``ValueError`` for pictures smaller than a window.
    """
    x, y = coloured(x), coloured(y)
    if min(x.shape[-2:]) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}×{WINDOW} (got {x.shape[-2]}×{x.shape[-1]})")

    def mean(z: Tensor) -> Tensor:
        return F.avg_pool2d(z, WINDOW, stride=1)

    n = WINDOW**2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = (
        (mean(a * b) - ma * mb) * n / (n - 1) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my))
    )
    s = (2 * mx * my + K1**2) * (2 * vxy + K2**2) / ((mx**2 + my**2 + K1**2) * (vx + vy + K2**2))
    return s.flatten(1).mean(1)


def total_variation(x: Tensor) -> Tensor:
    """mean |right − left| + mean |below − above|, shape ()."""
    x = coloured(x)
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def matched(guess: Tensor, truth: Tensor) -> Tensor:
    """The guesses in the order of the originals that they are nearest to, one to one, with the least total MSE."""
    from scipy.optimize import linear_sum_assignment  # a third of a second, which only an attack should wait for

    cost = (guess[None] - truth[:, None]).square().flatten(2).mean(2)
    _, columns = linear_sum_assignment(cost.numpy())
    return guess[torch.from_numpy(columns)]
