"""The files of a run folder: what a run leaves behind, line by line, and safe against a kill at any instant.

``metrics.jsonl`` is the truth; the rest follows from it. A line is on the disk before ``append`` returns, so a caller
that appends first and commits its checkpoint second never has a checkpoint without its line. ``reopen`` cuts away
whatever came after the checkpoint. All JSON is strict: a number that is not finite is written as ``null``.

A key that was not measured in a round is left out of its line; ``null`` says that it was measured and was not a number.
"""

import json
import math
import os
import platform
import resource
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import tomli_w

from fedsim.errors import ConfigError, ResumeError
from fedsim.files import append, write

METRICS, SUMMARY, CLIENTS, CONFIG = "metrics.jsonl", "summary.json", "clients.jsonl", "config.toml"

Line = Mapping[str, Any]
"""One round: ``round`` and what was measured in it."""

Status = Literal["completed", "failed", "stopped"]

SUMMED = ("clients", "examples", "bytes_down", "bytes_up", "seconds", "failures")
"""Keys that the summary adds up; of every other key it keeps the final value."""

TAGS = {
    "accuracy": "eval/accuracy",
    "loss": "eval/loss",
    "macro_f1": "eval/macro_f1",
    "train_loss": "train/loss",
    "clients": "train/clients",
    "examples": "train/examples",
    "failures": "train/failures",
    "bytes_down": "comm/bytes_down",
    "bytes_up": "comm/bytes_up",
    "seconds": "time/seconds",
    "epsilon": "privacy/epsilon",
    "epsilon_if_secret": "privacy/epsilon_if_secret",
}
"""TensorBoard's name of each key; per-client results are ``eval/…``, and any other number is a gauge, ``server/…``."""

PER_CLIENT = ("client_", "personal_")
PACKAGES = ("fedsim-engine", "torch", "flwr", "numpy", "flwr-datasets", "ray", "opacus")


class Record:
    """A run folder, open for writing; made by ``create`` or ``reopen``, and used as a context manager."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], lines: Sequence[Line], events: bool, clock: float | None
    ) -> None:
        self.folder, self.config = folder, config
        self._started = time.perf_counter() if clock is None else clock
        self._spent = math.fsum(line.get("seconds") or 0.0 for line in lines)
        self._last: int | None = lines[-1]["round"] if lines else None
        self._metrics = (folder / METRICS).open("ab", buffering=0)
        self._events = Events(folder, lines) if events else None

    def append(self, line: Line) -> None:
        """Write one round, and return when it is on the disk. Commit the round's checkpoint after this."""
        if line["round"] not in _next(self._last):
            raise ValueError(f"round {line['round']} does not follow round {self._last}")
        append(self._metrics.fileno(), encode(line) + b"\n")
        self._last = line["round"]
        if self._events:
            self._events.write(line, time.time())

    def clients(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace ``clients.jsonl``: client, examples, accuracy, and personal_accuracy where clients have models."""
        write(self.folder / CLIENTS, b"".join(encode(row) + b"\n" for row in rows))

    def finish(
        self,
        status: Status,
        *,
        params_sha256: str | None,
        error: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Write ``summary.json``, and return it. ``more`` adds keys of the caller's own."""
        spent = self._spent + time.perf_counter() - self._started
        summary = {
            "name": self.config["name"],
            "strategy": self.config["strategy"]["name"],
            "seed": self.config["seed"],
            "status": status,
            **summarise(read_lines(self.folder)),
            "wall_seconds": spent,
            "peak_rss_mb": peak_rss_mb(),
            "params_sha256": params_sha256,
            **({"error": error} if error is not None else {}),
            "environment": environment(),
            **(more or {}),
        }
        write(self.folder / SUMMARY, json.dumps(strict(summary), indent=2, allow_nan=False).encode() + b"\n")
        return summary

    def close(self) -> None:
        self._metrics.close()
        if self._events:
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def create(folder: Path, config: Mapping[str, Any], *, events: bool = True, clock: float | None = None) -> Record:
    """Begin a run in a folder that has none: writes ``config.toml`` (the resolved config) and an empty record.

    ``clock`` is the ``time.perf_counter()`` from which wall time counts; without it, wall time counts from here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / METRICS).exists():
        raise ConfigError(f"{folder}: holds a run already; --resume continues it")
    write(folder / CONFIG, tomli_w.dumps(dict(config)).encode())
    write(folder / METRICS, b"")
    return Record(folder, config, [], events, clock)


def reopen(folder: Path, round: int, *, events: bool = True, clock: float | None = None) -> Record:
    """Go on after ``round``, the one of the checkpoint. Later lines, whole or torn, are cut away in one step."""
    config = read_config(folder)
    data = _read(folder / METRICS)
    lines: list[dict[str, Any]] = []
    end = 0
    for number, text in enumerate(data.splitlines(keepends=True), 1):
        if lines and lines[-1]["round"] == round:
            break
        line = _decode(text)
        if line is None or line.get("round") not in _next(lines[-1]["round"] if lines else None):
            if round == 0:
                break  # nothing was committed: a line of round 1, or half of it, is no loss
            raise ResumeError(f"{folder / METRICS}: line {number} is damaged, or is not the round that follows")
        if line["round"] > round:
            break
        lines.append(line)
        end += len(text)
    last = lines[-1]["round"] if lines else 0
    if last != round:
        raise ResumeError(f"{folder / METRICS}: ends at round {last}, before the checkpoint's round {round}")
    (folder / SUMMARY).unlink(missing_ok=True)  # it would speak of a run that is over
    if end < len(data):
        write(folder / METRICS, data[:end])
    return Record(folder, config, lines, events, clock)


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The rounds of a run, also of one that is running or was killed: a torn last line is left out."""
    path = folder / METRICS
    lines = []
    for number, text in enumerate(_read(path).splitlines(keepends=True), 1):
        line = _decode(text)
        if line is not None and isinstance(line.get("round"), int):
            lines.append(line)
        elif text.endswith(b"\n"):
            raise ConfigError(f"{path}: line {number} is damaged")
    return lines


def read_clients(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``clients.jsonl``; none where no client was evaluated."""
    path = folder / CLIENTS
    if not path.exists():
        return []
    rows = []
    for number, text in enumerate(_read(path).splitlines(keepends=True), 1):
        row = _decode(text)
        if row is None:
            raise ConfigError(f"{path}: line {number} is damaged")
        rows.append(row)
    return rows


def read_config(folder: Path) -> dict[str, Any]:
    """The tables of ``config.toml``."""
    try:
        return tomllib.loads(_read(folder / CONFIG).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{folder / CONFIG}: not valid TOML: {e}") from None


def read_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json``, or None for a run that has not ended."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary = _decode(_read(path))
    if summary is None:
        raise ConfigError(f"{path}: not a JSON object")
    return summary


def ended(summary: Mapping[str, Any]) -> bool:
    """Whether a run came to its end: all of its rounds, or all that its privacy budget pays for. Both have a model."""
    return summary.get("status") == "completed" or (
        summary.get("status") == "stopped" and summary.get("params_sha256") is not None
    )


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """What a run came to. The final value of a key is that of the last round that measured it, be it null."""
    final: dict[str, Any] = {}
    for line in lines:
        final |= line
    total = {key: sum(line.get(key) or 0 for line in lines) for key in SUMMED if key != "failures"}
    scored = [(line["accuracy"], line["round"]) for line in lines if line.get("accuracy") is not None]
    best, best_round = max(scored, key=lambda pair: (pair[0], -pair[1])) if scored else (None, None)
    return {
        "rounds": final.pop("round", 0),
        "final_accuracy": final.get("accuracy"),
        "best_accuracy": best,
        "best_round": best_round,
        "final_loss": final.get("loss"),
        **{key: value for key, value in final.items() if key not in SUMMED},
        "total_seconds": total["seconds"],
        "client_updates": total["clients"],
        "client_updates_per_second": total["clients"] / total["seconds"] if total["seconds"] > 0 else None,
        "total_examples": total["examples"],
        "total_bytes_down": total["bytes_down"],
        "total_bytes_up": total["bytes_up"],
        "total_failures": sum(len(line.get("failures") or ()) for line in lines),
    }


def gauges(lines: Iterable[Line]) -> list[str]:
    """The keys that a strategy logs of its own, in order of appearance."""
    keys = {key: None for line in lines for key, value in line.items() if _is_number(value)}
    return [key for key in keys if key != "round" and tag(key).startswith("server/")]


def tag(key: str) -> str:
    """TensorBoard's name of a key."""
    return TAGS.get(key) or (f"eval/{key}" if key.startswith(PER_CLIENT) else f"server/{key.removeprefix('server_')}")


class Events:
    """TensorBoard's file: the same numbers, x-axis = round.

    Written by ``tensorboard`` itself, without ``torch.utils`` and without its thread. A resumed run writes its whole
    history into a new file and drops the old one, so no round appears twice and none is missing after a kill.
    """

    def __init__(self, folder: Path, lines: Sequence[Line]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Callable[..., Any] = Event
        self._summary: Callable[..., Any] = Summary
        old = list(folder.glob("events.out.tfevents.*"))
        now = time.time()
        # A running TensorBoard goes from file to file in the order of names; START makes it forget what it has read.
        self._writer: Any = RecordWriter((folder / f"events.out.tfevents.{time.time_ns():020d}.fedsim").open("xb"))
        self._put(Event(wall_time=now, file_version="brain.Event:2"))
        self._put(Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)))
        age = math.fsum(line.get("seconds") or 0.0 for line in lines)
        for line in lines:
            age -= line.get("seconds") or 0.0
            self._scalars(line, now - age)
        self._writer.flush()
        for path in old:
            path.unlink()

    def write(self, line: Line, wall_time: float) -> None:
        self._scalars(line, wall_time)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, line: Line, wall_time: float) -> None:
        numbers = {key: len(value) if key == "failures" else value for key, value in line.items() if key != "round"}
        values = [{"tag": tag(k), "simple_value": v} for k, v in numbers.items() if _is_number(v)]
        self._put(self._event(wall_time=wall_time, step=line["round"], summary=self._summary(value=values)))

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def strict(value: Any) -> Any:
    """A value that JSON can hold: numbers that are not finite become None."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def encode(row: Mapping[str, Any]) -> bytes:
    """One object as one line of strict JSON, without its newline."""
    return json.dumps(strict(row), allow_nan=False).encode()


def peak_rss_mb() -> float:
    """The most memory that this process has held, in MB (1e6 bytes); workers in other processes are not in it."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def environment() -> dict[str, str]:
    """What a run depended on, read without importing any of it."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed, or a bare checkout
    return found | {"platform": platform.platform(), "machine": platform.machine(), "cpus": str(os.cpu_count())}


def _next(last: int | None) -> tuple[int, ...]:
    """The rounds that may follow; a record begins at 1, or at 0 where the model was evaluated before training."""
    return (0, 1) if last is None else (last + 1,)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _decode(text: bytes) -> dict[str, Any] | None:
    """A JSON object from a whole line, or None."""
    if not text.endswith(b"\n"):
        return None
    try:
        row = json.loads(text, parse_constant=_refuse)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except NotADirectoryError:
        raise ConfigError(f"{path.parent}: is not a folder") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory") from None
    except PermissionError:
        raise ConfigError(f"{path}: cannot be read") from None
