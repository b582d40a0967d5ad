"""The run folder survives a kill at any byte, holds strict JSON, and tells TensorBoard the same numbers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedsim import files, record
from fedsim.errors import ConfigError, ResumeError

CONFIG: dict[str, Any] = {"name": "tiny", "seed": 3, "rounds": 9, "strategy": {"name": "fedavg", "lr": 0.1}}


def line(at: int, **more: Any) -> dict[str, Any]:
    return {
        "round": at,
        "accuracy": at / 10,
        "loss": 1 / at if at else 1.0,
        "clients": 4,
        "examples": 40,
        "bytes_down": 100,
        "bytes_up": 50,
        "seconds": 0.5,
    } | more


def run(folder: Path, rounds: int, **options: Any) -> None:
    with record.create(folder, CONFIG, events=False, **options) as r:
        for at in range(1, rounds + 1):
            r.append(line(at))


def test_a_line_is_whole_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append((tmp_path / "metrics.jsonl").read_bytes() if (tmp_path / "metrics.jsonl").exists() else b"")

    with record.create(tmp_path, CONFIG, events=False) as r:
        monkeypatch.setattr(os, "fsync", fsync)
        r.append(line(1))
    assert len(synced) == 1
    assert json.loads(synced[0]) == line(1)


def test_resume_at_every_byte_of_a_torn_file(tmp_path: Path) -> None:
    """Whatever a kill leaves after the checkpoint's round 2, resuming gives the file of an undisturbed run."""
    run(tmp_path / "whole", 4)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    committed = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    path = tmp_path / "whole" / "metrics.jsonl"
    for end in range(committed, len(whole) + 1):
        path.write_bytes(whole[:end])
        with record.reopen(path.parent, 2, events=False) as r:
            r.append(line(3))
            r.append(line(4))
        assert path.read_bytes() == whole


def test_resume_refuses_a_record_that_is_behind_its_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 4)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    with pytest.raises(ResumeError, match="ends at round 4, before the checkpoint's round 5"):
        record.reopen(tmp_path, 5)
    for damaged in (whole[:-1], lines[0] + lines[2] + lines[3], lines[0] + b"{}\n" + lines[2], b"\n" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ResumeError, match=r"metrics\.jsonl: line \d is damaged"):
            record.reopen(tmp_path, 4)
        assert path.read_bytes() == damaged


def test_resume_from_the_very_start(tmp_path: Path) -> None:
    run(tmp_path, 1)
    path = tmp_path / "metrics.jsonl"
    for left in (path.read_bytes(), path.read_bytes()[:7], b""):
        path.write_bytes(left)
        with record.reopen(tmp_path, 0, events=False):
            assert path.read_bytes() == b""


def test_a_record_may_begin_with_the_untrained_model(tmp_path: Path) -> None:
    with record.create(tmp_path, CONFIG, events=False) as r:
        r.append(line(0))
        r.append(line(1))
    with record.reopen(tmp_path, 0, events=False) as r:
        assert [row["round"] for row in record.read_lines(tmp_path)] == [0]
        with pytest.raises(ValueError, match="round 2 does not follow round 0"):
            r.append(line(2))


def test_an_interrupted_cut_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 4)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def replace(*_: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="power cut"):
        record.reopen(tmp_path, 2, events=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_failing_replace_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    files.write(path, b"old")

    def replace(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk gone"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with record.create(tmp_path, CONFIG, events=False) as r:
        r.append(line(1))
        before = (tmp_path / "metrics.jsonl").read_bytes()
        real = os.write
        calls = iter([5, 0])

        def full(fd: int, data: Any) -> int:
            count = next(calls)
            if not count:
                raise OSError(28, "No space left on device")
            return real(fd, data[:count])

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            r.append(line(2))
        monkeypatch.undo()
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        r.append(line(2))
    assert [row["round"] for row in record.read_lines(tmp_path)] == [1, 2]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def test_json_is_strict(tmp_path: Path) -> None:
    """NaN and infinities become null at every depth, in every file."""
    bad = {
        "loss": math.nan,
        "server_rate": math.inf,
        "failures": [{"client": 1, "reason": "é\u2028\ud800", "x": -math.inf}],
    }
    with record.create(tmp_path, CONFIG, events=False) as r:
        r.append(line(1, **bad))
        r.clients([{"client": 0, "examples": 1, "accuracy": math.nan}])
        r.finish("completed", params_sha256="0" * 64, more={"extra": {"deep": [math.nan]}})
    for name in ("metrics.jsonl", "clients.jsonl", "summary.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (row,) = record.read_lines(tmp_path)
    assert row["loss"] is None and row["server_rate"] is None and row["failures"][0]["x"] is None
    summary = record.read_summary(tmp_path)
    assert summary is not None and summary["final_loss"] is None and summary["extra"] == {"deep": [None]}


def test_what_is_not_a_value_is_refused_and_not_half_written(tmp_path: Path) -> None:
    with record.create(tmp_path, CONFIG, events=False) as r:
        with pytest.raises(TypeError):
            r.append(line(1, loss=object()))
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_summary_by_hand(tmp_path: Path) -> None:
    with record.create(tmp_path, CONFIG, events=False) as r:
        r.append(line(1, accuracy=0.5, server_rate=1.0))
        r.append(line(2, accuracy=0.9, failures=[{"client": 7, "reason": "NaN"}]))
        r.append(line(3, accuracy=0.9, epsilon=1.5))
        unscored = line(4)
        del unscored["accuracy"]
        r.append(unscored)
        returned = r.finish("stopped", params_sha256="ab" * 32, error="interrupted")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == returned
    expected = {
        "name": "tiny",
        "strategy": "fedavg",
        "seed": 3,
        "status": "stopped",
        "error": "interrupted",
        "rounds": 4,
        "final_accuracy": 0.9,
        "best_accuracy": 0.9,
        "best_round": 2,  # the first of equals
        "final_loss": 0.25,
        "server_rate": 1.0,
        "epsilon": 1.5,
        "total_seconds": 2.0,
        "client_updates": 16,
        "client_updates_per_second": 8.0,
        "total_examples": 160,
        "total_bytes_down": 400,
        "total_bytes_up": 200,
        "total_failures": 1,
        "params_sha256": "ab" * 32,
    }
    assert {key: summary[key] for key in expected} == expected
    assert not {"clients", "seconds", "bytes_up", "failures", "round"} & summary.keys()
    assert 0 < summary["wall_seconds"] < 60 and summary["peak_rss_mb"] > 1
    assert summary["environment"]["python"].startswith("3.")


def test_a_diverged_run_does_not_show_its_last_good_number() -> None:
    summary = record.summarise([line(1, accuracy=0.8), line(2, accuracy=None, loss=None)])
    assert summary["final_accuracy"] is None and summary["final_loss"] is None and summary["best_accuracy"] == 0.8


def test_a_run_of_no_rounds_has_a_summary(tmp_path: Path) -> None:
    with record.create(tmp_path, CONFIG, events=False) as r:
        summary = r.finish("failed", params_sha256=None, error="client 1 failed")
    assert summary["rounds"] == 0 and summary["best_accuracy"] is None and summary["client_updates_per_second"] is None


def test_wall_time_counts_the_rounds_before_an_interruption(tmp_path: Path) -> None:
    run(tmp_path, 3)
    with record.reopen(tmp_path, 2, events=False) as r:
        assert 1.0 < r.finish("completed", params_sha256=None)["wall_seconds"] < 1.4


def test_a_resumed_run_has_no_summary_until_it_ends(tmp_path: Path) -> None:
    with record.create(tmp_path, CONFIG, events=False) as r:
        r.append(line(1))
        r.finish("stopped", params_sha256=None)
    with record.reopen(tmp_path, 1, events=False):
        assert record.read_summary(tmp_path) is None


def test_a_folder_holds_one_run(tmp_path: Path) -> None:
    run(tmp_path, 1)
    with pytest.raises(ConfigError, match="holds a run already; --resume"):
        record.create(tmp_path, CONFIG)


def test_the_config_comes_back(tmp_path: Path) -> None:
    run(tmp_path, 1)
    assert record.read_config(tmp_path) == CONFIG


def test_readers_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml: no such file"):
        record.read_config(tmp_path)
    (tmp_path / "config.toml").write_text("= 1")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML"):
        record.read_config(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": NaN}\n{"round": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is damaged"):
        record.read_lines(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"rou')
    assert record.read_lines(tmp_path) == [{"round": 1}]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_shows_each_round_once_also_after_a_resume(tmp_path: Path) -> None:
    with record.create(tmp_path, CONFIG) as r:
        for at in (1, 2, 3):
            r.append(
                line(at, loss=math.nan if at == 2 else 0.5, server_rate=0.25, failures=[{"client": 1, "reason": ""}])
            )
    with record.reopen(tmp_path, 2) as r:
        r.append(line(3, loss=0.125))
    found = scalars(tmp_path)
    assert found["eval/loss"] == [(1, 0.5), (3, 0.125)]
    assert found["comm/bytes_up"] == [(1, 50.0), (2, 50.0), (3, 50.0)]
    assert found["server/rate"] == [(1, 0.25), (2, 0.25)]
    assert found["train/failures"] == [(1, 1.0), (2, 1.0)]
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_gauges_are_the_numbers_that_are_nobody_elses() -> None:
    assert record.gauges(
        [line(1, client_accuracy_worst=0.1, personal_accuracy_mean=0.2, server_rate=1.0, ok=True)]
    ) == ["server_rate"]


def test_neither_torch_nor_rich_nor_matplotlib_is_imported() -> None:
    code = (
        "import sys, fedsim.record, fedsim.progress, fedsim.report\n"
        "print({m.partition('.')[0] for m in sys.modules} & {'torch', 'rich', 'matplotlib', 'tensorboard', 'numpy'})"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
