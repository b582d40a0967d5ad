"""The stand-in for a GPU: it refuses what a GPU refuses, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from accelerator import Far, Machine, accelerator, home
from torch import Tensor

from fedsim.rng import Key

HERE = torch.arange(6.0).view(2, 3)


def test_results_are_those_of_a_cpu() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.vmap(torch.func.grad(lambda row: (row.square() * row.new_full((), 2)).sum()))(x).squeeze_().T

    with accelerator() as device:
        far = f(HERE.to(device))
        assert isinstance(far, Far) and far.device == device and torch.equal(far.cpu(), f(HERE))
        by_autograd = HERE.to(device).requires_grad_()
        by_autograd.square().sum().backward()
        assert by_autograd.grad is not None and torch.equal(home(by_autograd.grad), 2 * HERE)


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "a tensor of the host": lambda far: far + HERE,
    "examples of the host": lambda far: HERE.index_select(0, far[0].long()),
    "numbers of the host": lambda far: torch.where(far > 1, HERE, far),
    "a generator of the host": lambda far: torch.randn(2, generator=Key.root(0).wide(), device=far.device),
    "a generator of the device": lambda far: torch.randn(2, generator=Key.root(0).torch(far.device)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_lies_elsewhere_is_refused(what: str) -> None:
    with accelerator() as device:
        far = HERE.to(device)
        far + torch.tensor(1.0) + 1  # a number is no tensor, wherever it is
        far[torch.tensor([1, 0])]
        with pytest.raises(RuntimeError, match="expected a"):
            REFUSED[what](far)


WAITED: dict[str, Callable[[Tensor], object]] = {
    "float": lambda far: float(far.sum()),
    "if": lambda far: bool((far > 1).all()),
    "a shape": lambda far: far[far > 1],
    "to the host": lambda far: far.cpu(),
    "from the host": lambda far: HERE.to(far.device),
    "a literal": lambda far: torch.tensor([1.0, 2.0], device=far.device),
    "a Cholesky factor": lambda far: torch.linalg.cholesky(far @ far.T + torch.eye(2, device=far.device)),
}


@pytest.mark.parametrize("what", WAITED)
def test_what_cannot_be_recorded_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with accelerator() as device:
        far = HERE.to(device)
        WAITED[what](far)
        monkeypatch.setattr(Machine, "strict", True)
        far.add_(1).sum()
        with pytest.raises(RuntimeError, match="capturing"):
            WAITED[what](far)


def test_draws_are_those_of_a_cpu() -> None:
    key = Key.root(3)
    with accelerator() as device:
        for of in (key.torch, key.wide):
            far = torch.randn(4, generator=of(device), device=device)
            assert torch.equal(far.cpu(), torch.randn(4, generator=of()))
