"""What clients' work costs, fitted to what it took: who places work longest first has to know how long it is.

    seconds of a message  ≈  a · examples + b · clients        examples: those that the clients' steps go over

Until something was measured, a client costs what ten examples do. Measurements are of one phase and grow old, so that a
model that becomes slower, or a machine that becomes busy, is followed. Numbers of the run do not depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedsim.types import Local

GUESS = np.array([1.0, 10.0])  # a client's fixed cost in examples, before anything is known
TRUST = 4.0  # messages that the guess counts for
OLD = 0.95  # what a measurement counts for after the next one


def examples(local: Local, held: Callable[[str], Sequence[int]]) -> int:
    """How many examples the steps of some clients go over; ``held`` says how many each of them has in a split."""
    total = 0
    for s in (each.schedule for each in local.passes):
        sizes = held(s.split)
        total += s.epochs * sum(sizes) if s.steps is None else s.steps * sum(min(s.batch_size, n) for n in sizes)
    return total


@dataclass
class Cost:
    """The cost of a phase's work: (a, b), by least squares over what was seen."""

    rates: npt.NDArray[np.float64] = field(default_factory=GUESS.copy)
    _squares: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2)))
    _seconds: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    _seen: float = 0.0

    def of(self, examples: int, clients: int) -> float:
        """Of clients whose steps go over so many examples; in seconds once something was seen."""
        return float(self.rates @ (examples, clients))

    def saw(self, examples: int, clients: int, seconds: float) -> None:
        """A message with these clients took so long."""
        x = np.array([examples, clients], dtype=np.float64)
        self._squares = OLD * self._squares + np.outer(x, x)
        self._seconds = OLD * self._seconds + x * seconds
        self._seen = OLD * self._seen + 1
        # The guess says how a and b relate. How fast this machine is, is measured: the best multiple of the guess.
        prior = GUESS * (GUESS @ self._seconds) / max(GUESS @ self._squares @ GUESS, 1e-30)
        # It counts as TRUST messages do, each rate by itself, so that messages that are all alike leave the guess.
        ridge = np.diag(np.diag(self._squares)) * TRUST / (self._seen * (self._seen + TRUST)) + 1e-30 * np.eye(2)
        fitted = np.linalg.solve(self._squares + ridge, self._seconds + ridge @ prior)
        if fitted.min() < 0:  # all of it is the other one's
            kept = int(fitted.argmax())
            fitted = np.zeros(2)
            fitted[kept] = self._seconds[kept] / self._squares[kept, kept]
        self.rates = fitted
