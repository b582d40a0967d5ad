"""Quiet in a pipe, alive on a terminal."""

import io
import os
import pty
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from fedsim import progress

SUMMARY: dict[str, Any] = {
    "strategy": "fedavg",
    "status": "completed",
    "rounds": 40,
    "final_accuracy": 0.95125,
    "best_accuracy": 0.96,
    "final_loss": 0.125,
    "client_updates_per_second": 1234.56,
    "total_bytes_down": 2_500_000,
    "total_bytes_up": 999,
    "total_failures": 0,
    "wall_seconds": 75.2,
    "total_seconds": 63.0,
    "params_sha256": "0123456789abcdef" * 4,
}

SCRIPT = """
from fedsim import progress
with progress.live(3) as show:
    for r in (1, 2, 3):
        show({"round": r, "loss": 0.5 / r, "accuracy": 0.75, "clients": 10, "seconds": 0.1, "epsilon": 1.5})
    progress.warn("careful")
"""


def test_a_pipe_gets_nothing_but_warnings_on_stderr() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == "warning: careful\n"


def test_a_terminal_gets_a_bar() -> None:
    parent, child = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=child, stderr=child, env=env)
    os.close(child)
    shown = b""
    try:
        while part := os.read(parent, 65536):
            shown += part
    except OSError:
        pass  # Linux's way to say that the other end was closed
    finally:
        os.close(parent)
    assert process.wait() == 0
    text = shown.decode()
    for words in ("round 3/3", "loss 0.1667", "accuracy 0.7500", "100 clients/s", "ε 1.50", "warning: careful"):
        assert words in text


def test_a_resumed_run_takes_its_time_left_from_its_own_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ninety rounds that were done before must not look like ninety rounds in the first second."""
    from rich.progress import Progress, TaskID

    shown: list[Progress] = []
    real = Progress.update

    def update(self: Progress, task: TaskID, **fields: Any) -> None:
        shown.append(self)
        real(self, task, **fields)

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(Progress, "update", update)
    with progress.live(100) as show:
        for at in (91, 92, 93):
            time.sleep(0.02)
            show({"round": at, "clients": 1, "seconds": 0.02})
    speed = shown[0].tasks[0].speed
    assert shown[0].tasks[0].completed == 93 and speed is not None and 5 < speed < 60


def test_the_bar_keeps_the_last_evaluation_and_shows_training_loss_without_one() -> None:
    assert progress.state({"train_loss": 2.0, "round": 1}, None) == "loss 2.0000"
    assert progress.state({"train_loss": 2.0, "loss": 1.0, "accuracy": None}, 12345.6) == (
        "loss 1.0000  accuracy -  12,346 clients/s"
    )


def test_rate_is_over_the_whole_window() -> None:
    assert progress.rate(deque([(10, 1.0), (20, 0.5)])) == 20.0
    assert progress.rate(deque([(10, 0.0)])) is None


def test_the_table_and_the_path_at_the_end(tmp_path: Path) -> None:
    out = io.StringIO()
    report = tmp_path / ("long/" * 40) / "report.html"
    progress.closing(SUMMARY, report, file=out)
    text = out.getvalue()
    assert f"report: {report}\n" in text  # in one piece, so that it can be clicked and copied
    for words in (
        "fedavg",
        "0.9513 (best 0.9600)",
        "0.1250",
        "1,234.6",
        "2.5 MB down, 999 B up",
        "1 min 15 s, 1 min 03 s of",
    ):
        assert words in text
    assert "0123456789ab" in text and "0123456789abc" not in text
    assert "\x1b" not in text and "failures" not in text


def test_a_run_that_failed_early_has_a_table_too() -> None:
    nothing = dict.fromkeys(("final_accuracy", "best_accuracy", "final_loss", "client_updates_per_second"))
    rows = dict(progress.rows(SUMMARY | nothing | {"status": "failed", "rounds": 0, "params_sha256": None}))
    assert rows["rounds"] == "0 (failed)" and rows["accuracy"] == "- (best -)" and rows["params"] == "-"


def test_a_function_to_be_minimised_has_no_accuracy() -> None:
    rows = dict(progress.rows(SUMMARY | {"final_accuracy": None, "best_accuracy": None}))
    assert "accuracy" not in rows and rows["loss"] == "0.1250"


def test_clients_that_share_no_model_have_an_accuracy_of_their_own() -> None:
    none = {"final_accuracy": None, "best_accuracy": None, "final_loss": None, "personal_accuracy_mean": 0.75}
    rows = dict(progress.rows(SUMMARY | none))
    assert "accuracy" not in rows and rows["personal"] == "0.7500 (mean of clients' own models)"
    assert list(dict(progress.rows(SUMMARY | {"personal_accuracy_mean": 0.75})))[2:4] == ["accuracy", "personal"]
    assert progress.state({"personal_accuracy_mean": 0.75}, None) == "personal 0.7500"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_960, "100 kB"), (999_600, "1.0 MB"), (5e18, "5000 PB")],
)
def test_size(count: float, text: str) -> None:
    assert progress.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.04 s"), (0.996, "1.0 s"), (59.97, "1 min 00 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
