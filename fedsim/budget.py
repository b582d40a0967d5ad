"""What a node's examples may cost: a budget of the node's own, over all runs and whatever their servers say.

At example level a server says with each message how much noise protects the answer, and how often it asks. A node with
``max-epsilon`` and ``delta`` in its node config counts for itself, with its own number of examples, and answers nothing
that would cost more. What was spent lies in its state folder, a line a visit; a visit that is repeated with the same
broadcast is the same answer, and costs nothing.

A node runs the code of its app. This protects its examples from a config, not from other code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim import files
from fedsim.config import Experiment
from fedsim.data.dataset import Federation
from fedsim.errors import FedsimError
from fedsim.privacy import of_batches
from fedsim.types import Strategy
from server import ledger
from server.ledger import Entry, History

FILE = "spent"


class Budget:
    """ε at δ in all, and what was spent of it; ``folder`` is the node's state folder."""

    def __init__(self, folder: Path, epsilon: float, delta: float) -> None:
        self._lines, self._epsilon, self._delta = files.Lines(folder / FILE), epsilon, delta
        self._spent: dict[str, History] = {}
        for line in self._lines.read():
            try:
                visit, *numbers = line.split()
                parts = (numbers[i : i + 3] for i in range(0, len(numbers), 3))
                self._spent[visit] = tuple(Entry(float(s), float(q), int(n)) for s, q, n in parts)
            except ValueError:
                raise FedsimError(f"{folder / FILE}: damaged; what was spent is unknown, so nothing more is") from None

    def spend(self, visit: str, cost: History) -> None:
        """Put a visit's cost on disk, before it is answered. Raises ``FedsimError`` for one that costs too much."""
        if visit in self._spent:
            return
        known = ledger.merge(entry for history in self._spent.values() for entry in history)
        after = ledger.epsilon(ledger.merge((*known, *cost)), self._delta, "rdp")
        if after > self._epsilon:
            raise FedsimError(
                f"this node's examples may cost epsilon {self._epsilon:g} at delta {self._delta:g}; with this visit "
                f"they would have cost {after:.4g}"
            )
        self._lines.add(" ".join([visit, *(f"{e.sigma!r} {e.q!r} {e.steps}" for e in cost)]))
        self._spent[visit] = cost


def of_node(node_config: Mapping[str, Any], folder: Path) -> Budget:
    """The budget of a node's config. Raises ``FedsimError`` for one that is none."""
    epsilon, delta = node_config.get("max-epsilon"), node_config.get("delta")
    try:
        budget = Budget(folder, float(epsilon), float(delta))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise FedsimError("a node with 'max-epsilon' needs a 'delta' in its node config, both numbers") from None
    if not (float(epsilon) > 0 and 0 < float(delta) < 1):  # type: ignore[arg-type]
        raise FedsimError("a node's 'max-epsilon' must be positive, and its 'delta' between 0 and 1")
    return budget


def cost(strategy: Strategy[Any], phase: int, sigma: float, federation: Federation, client: int) -> History:
    """What a client's visit in a phase costs its examples."""
    schedules = [each.schedule for each in strategy.phases[phase].local.passes]
    sizes = [federation.size(client, s.split) for s in schedules]
    return ledger.merge(e for s, n in zip(schedules, sizes, strict=True) for e in of_batches(s, n, sigma))


def check(experiment: Experiment, phase: int) -> None:
    """Refuse, of a node with a budget, what it could not count. Raises ``FedsimError``."""
    level = experiment.privacy
    if level is None or level.mode != "example" or level.noise != "os":
        raise FedsimError(
            "this node has a budget (max-epsilon) and answers only with secret noise of its own: privacy.mode = "
            "'example', privacy.noise = 'os'"
        )
    if phase < 0:
        raise FedsimError("this node has a budget (max-epsilon), and scores have no noise: set data.holdout = 0")
