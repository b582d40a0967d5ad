"""What fedsim says when something is wrong: one line a person can act on, and an exit code.

Exit codes: 2 is bad input (nothing was run, nothing was written), 1 is a run that failed.
"""

from collections.abc import Sequence
from difflib import get_close_matches


class FedsimError(Exception):
    """Base of every error that the command line prints without a traceback."""

    exit_code = 1


class ConfigError(FedsimError):
    """Bad input. Carries every problem found, since fixing them one by one wastes a person's time."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DataError(ConfigError):
    """A data set that is missing, broken, or that cannot be partitioned as asked."""


class ResumeError(ConfigError):
    """A checkpoint that is absent, damaged, or that belongs to another experiment."""


class ClientError(FedsimError):
    """One client's work failed. The round, the client and the seed are enough to repeat it."""

    def __init__(self, client: int, round: int, seed: int, reason: str) -> None:
        self.client, self.round, self.seed, self.reason = client, round, seed, reason
        super().__init__(f"client {client} failed in round {round} (seed {seed}): {reason}")


class Terminated(KeyboardInterrupt):
    """SIGTERM: a run stops as it does for Ctrl-C."""


class Stopped(FedsimError):
    """A run that a person or the system has stopped. The exit codes are those that a shell expects."""

    def __init__(self, message: str, cause: KeyboardInterrupt) -> None:
        self.exit_code = 143 if isinstance(cause, Terminated) else 130
        super().__init__(message)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint naming the nearest known word, or nothing."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
