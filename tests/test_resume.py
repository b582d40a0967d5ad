"""Nothing is lost: a run goes on to the same bits after any kill, and says so when it cannot."""

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from fedsim.config import Experiment
from fedsim.errors import ClientError, FedsimError, ResumeError
from fedsim.run import run

ROUNDS = 8


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be had: runs flush every file to the disk, and a kill does not cut the power."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def reference(path: Path, experiment: Experiment) -> tuple[str, list[dict[str, object]]]:
    done = run(experiment, path)
    return done["params_sha256"], runs.lines(path)


def in_a_child(experiment: Experiment, out: Path, seconds: float) -> bool:
    """Resume in a forked process and kill it after so many seconds; whether it was done before."""
    child = os.fork()
    if child == 0:
        try:
            run(experiment, out, resume=True)
            os._exit(0)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
        finally:
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize(("name", "least"), [("scaffold", 20), ("flwr.serverapp.strategy:FedAdam", 5)])
def test_killed_at_random_instants(tmp_path: Path, name: str, least: int) -> None:
    """The parameters, what clients remember and every number of metrics.jsonl end the same."""
    experiment = runs.experiment(f"strategy.name='{name}'", f"rounds={ROUNDS}")
    digest, lines = reference(tmp_path / "straight", experiment)
    began = time.monotonic()
    reference(tmp_path / "again", experiment)
    whole = time.monotonic() - began
    kills, attempts = 0, 0
    while kills < least:
        out = tmp_path / f"killed-{attempts}"
        attempts += 1
        assert attempts <= least, "the runs end before they can be killed"
        for turn in range(100):
            # A little longer each time, since the machine may have become slower than it was for ``whole``.
            if in_a_child(experiment, out, random.uniform(0, 0.5 * whole * 1.1**turn)):
                break
            kills += 1
        else:
            pytest.fail("no progress between kills")
        assert runs.summary(out)["params_sha256"] == digest
        assert runs.lines(out) == lines


def test_the_real_command_is_killed_and_goes_on(tmp_path: Path) -> None:
    file = runs.write(tmp_path / "e.toml", "rounds=30", "checkpoint.every=3")
    digest, lines = reference(tmp_path / "straight", runs.experiment("rounds=30", "checkpoint.every=3"))
    out = tmp_path / "killed"
    process = runs.start("run", file, "--out", out, cwd=tmp_path)
    runs.wait_for(out / "checkpoint" / "round-00000006", process)
    process.kill()
    process.communicate()
    answer = runs.command("run", file, "--out", out, "--resume", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert runs.summary(out)["params_sha256"] == digest
    assert runs.lines(out) == lines


@pytest.mark.parametrize(("signal", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(tmp_path: Path, signal: signal.Signals, code: int) -> None:
    file = runs.write(tmp_path / "e.toml", "rounds=1000000")
    out = tmp_path / "out"
    process = runs.start("run", file, "--out", out, cwd=tmp_path)
    runs.wait_for(out / "checkpoint" / "round-00000002", process)
    process.send_signal(signal)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(f"fedsim run {file} --out {out} --resume")
    assert runs.summary(out)["status"] == "stopped"
    assert any((out / "checkpoint").glob("round-*"))


def test_a_run_that_failed_goes_on_where_it_failed(tmp_path: Path) -> None:
    """The summary names the failure; once its cause is gone, the run ends as if it had never been there."""
    experiment = runs.experiment("rounds=6")
    digest, _ = reference(tmp_path / "straight", experiment)

    def trip(starts: list[int]) -> list[int]:
        trip.calls += 1  # type: ignore[attr-defined]
        if trip.calls == 8:  # type: ignore[attr-defined]
            raise ClientError(5, 4, 3, "tripped")
        return starts

    trip.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(ClientError):
        run(experiment, tmp_path / "out", order=trip)
    assert runs.summary(tmp_path / "out")["status"] == "failed"
    assert "client 5" in runs.summary(tmp_path / "out")["error"]
    assert run(experiment, tmp_path / "out", resume=True)["params_sha256"] == digest


def test_more_rounds_may_be_asked_for(tmp_path: Path) -> None:
    digest, lines = reference(tmp_path / "long", runs.experiment("rounds=6"))
    reference(tmp_path / "out", runs.experiment("rounds=4"))
    assert run(runs.experiment("rounds=6"), tmp_path / "out", resume=True)["params_sha256"] == digest
    assert runs.lines(tmp_path / "out") == lines
    assert "rounds = 6" in (tmp_path / "out" / "config.toml").read_text()


def test_fewer_rounds_than_are_done_are_refused(tmp_path: Path) -> None:
    reference(tmp_path / "out", runs.experiment("rounds=4"))
    before = runs.listing(tmp_path)
    with pytest.raises(ResumeError, match=r"^rounds: must be at least 4, the round of the last checkpoint \(got 3\)"):
        run(runs.experiment("rounds=3"), tmp_path / "out", resume=True)
    assert runs.listing(tmp_path) == before


def test_a_finished_run_stays_finished(tmp_path: Path) -> None:
    digest, lines = reference(tmp_path / "out", runs.experiment())
    assert run(runs.experiment(), tmp_path / "out", resume=True)["params_sha256"] == digest
    assert runs.lines(tmp_path / "out") == lines


@pytest.mark.parametrize("change", ["seed=4", "strategy.lr=0.2", "data.partition.clients=13", "engine.block=4"])
def test_another_config_is_refused(tmp_path: Path, change: str) -> None:
    reference(tmp_path / "out", runs.experiment())
    before = runs.listing(tmp_path)
    with pytest.raises(ResumeError, match=f"differs.* {change.partition('=')[0]}"):
        run(runs.experiment(change), tmp_path / "out", resume=True)
    assert runs.listing(tmp_path) == before


def test_a_record_that_is_gone_is_missed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    reference(out, runs.experiment("rounds=2"))
    (out / "metrics.jsonl").unlink()
    before = runs.listing(tmp_path)
    with pytest.raises(ResumeError, match=r"metrics\.jsonl: missing, though the checkpoint is that of round 2$"):
        run(runs.experiment("rounds=4"), out, resume=True)
    assert runs.listing(tmp_path) == before


def test_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config names a data set; whether it still holds the same bytes is another question."""
    reference(tmp_path / "out", runs.experiment("rounds=2"))
    from fedsim.data import digits

    build = digits.build

    def other(config: digits.Config) -> object:
        dataset = build(config)
        x = dataset.train.x.clone()
        x[7, 0, 3, 3] += 0.25
        return dataset._replace(train=dataset.train._replace(x=x))

    monkeypatch.setattr(digits, "build", other)
    with pytest.raises(ResumeError, match="data"):
        run(runs.experiment("rounds=4"), tmp_path / "out", resume=True)


def test_other_versions_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new version may give other numbers; that is for a person to judge, so it is said and not refused."""
    from fedsim import record

    true = record.environment()
    monkeypatch.setattr(record, "environment", lambda: true | {"torch": "1.0"})
    reference(tmp_path / "out", runs.experiment("rounds=2"))
    monkeypatch.undo()
    run(runs.experiment("rounds=4"), tmp_path / "out", resume=True)
    assert any("torch" in r.message and "1.0" in r.message for r in caplog.records)


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    file = runs.write(tmp_path / "e.toml", "rounds=1000000")
    out = tmp_path / "out"
    process = runs.start("run", file, "--out", out, cwd=tmp_path)
    try:
        runs.wait_for(out / "checkpoint" / "round-00000001", process)
        with pytest.raises(FedsimError, match="in use by another fedsim process") as e:
            run(runs.experiment("rounds=1000000"), out, resume=True)
        assert e.value.exit_code == 2
    finally:
        process.kill()
        process.communicate()
