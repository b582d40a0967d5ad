"""What fedsim says when something is wrong: one line a person can act on, and an exit code.

Exit codes: 2 is bad input (nothing was run, nothing was written), 1 is a run that failed.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path


class FedsimError(Exception):
    """Base of every error that the command line prints without a traceback."""

    exit_code = 1


class ConfigError(FedsimError):
    """Bad input. Carries every problem found, since fixing them one by one wastes a person's time.

    A problem is one line, whatever stood in the input: what cannot be printed is escaped.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_printable(problem) for problem in problems)
        super().__init__("\n".join(self.problems))


class DataError(ConfigError):
    """A data set that is missing, broken, or that cannot be partitioned as asked."""


class ResumeError(ConfigError):
    """A checkpoint that is absent, damaged, or that belongs to another experiment."""


class BudgetSpent(ConfigError):
    """A run that was asked to go on, and whose privacy budget pays for no more rounds."""


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


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint naming the nearest known word, or nothing. One slip of the finger is nearest, however short the word."""
    slips = [k for k in known if _one_slip(word.lower(), k.lower())]
    near = get_close_matches(word, slips or known, n=1, cutoff=0.0 if slips else 0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter more, less or other, or two letters in the other order, make ``a`` into ``b``."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    c, d = a[start:], b[start:]
    return c[1:] == d[1:] or c[1:] == d or c == d[1:] or (c[:2] == d[1::-1] and c[2:] == d[2:])


def where(e: BaseException) -> str:
    """The file and line in which an exception was raised: the innermost that is no installed package's, if any."""
    at, installed, tb = "?", True, e.__traceback__
    while tb is not None:
        path = Path(tb.tb_frame.f_code.co_filename)
        if "site-packages" not in path.parts:
            at, installed = f"{path.name}:{tb.tb_lineno}", False
        elif installed:
            at = f"{path.name}:{tb.tb_lineno}"
        tb = tb.tb_next
    return at
