"""The benchmark compares the same work: both arms have the same gradients."""

import pytest
import torch

from fedsim.benches import fzoos


@pytest.mark.parametrize("way", ["kernel given", "kernel given, at once"])
def test_both_arms_have_the_same_gradients(way: str) -> None:
    of = fzoos.world(100, 6, 40)
    seen = 0
    for mine, other in zip(fzoos.ours(of), fzoos.theirs(of, way), strict=True):
        # They choose other points to learn, each by its own doubt, of a function that both know well by then.
        torch.testing.assert_close(mine[0], other[0], rtol=0.02, atol=0.02)
        torch.testing.assert_close(mine[1], other[1], rtol=1e-9, atol=1e-9)
        seen += 1
    assert seen == fzoos.STEPS
