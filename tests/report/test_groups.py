"""Groups over seeds, with the statistics worked by hand."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from fedsim import record, report
from fedsim.errors import ConfigError
from fedsim.report.groups import stat


def make(
    folder: Path,
    seed: int,
    scores: list[float],
    status: Any = "completed",
    *,
    digest: str | None = None,
    failures: int = 0,
    key: str = "accuracy",
    **strategy: Any,
) -> Path:
    config = {"name": folder.name, "seed": seed, "rounds": 3, "strategy": {"name": "fedavg", "lr": 0.1} | strategy}
    with record.create(folder, config, events=False) as r:
        for at, score in enumerate(scores, 1):
            r.append(
                {
                    "round": at,
                    key: score,
                    "loss": 1 - score,
                    "bytes_down": 10 * seed,
                    "bytes_up": 5,
                    "seconds": 1.0,
                    "failures": [{"client": c, "reason": "NaN"} for c in range(failures)],
                }
            )
        if status:
            r.finish(status, params_sha256=digest)
    return folder


def test_statistics_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make(tmp_path / "a3", 3, [0.2, 0.9, 0.8]),
        make(tmp_path / "a1", 1, [0.1, 0.2, 0.6]),
        make(tmp_path / "a2", 2, [0.1, 0.3, 0.7]),
        make(tmp_path / "b1", 1, [0.1, 0.1, 0.5], lr=0.01),
    ]
    first, second = report.compare(runs, target=0.7)
    assert first.strategy == "fedavg" and first.changed == {"strategy.lr": 0.1} and first.seeds == (1, 2, 3)
    assert first.final == (pytest.approx(0.7), pytest.approx(0.1))  # 0.6 0.7 0.8: variance (0.01 + 0 + 0.01) / 2
    assert first.best == (pytest.approx(2.2 / 3), pytest.approx(math.sqrt(0.07 / 3)))  # 0.6 0.7 0.9
    assert first.rounds_to_target == (pytest.approx(2.5), pytest.approx(math.sqrt(0.5))) and first.reached == 2
    assert first.bytes.mean == pytest.approx((45 + 75 + 105) / 3)
    assert second.final == (0.5, None) and second.reached == 0
    shown = capsys.readouterr().out
    for words in ("strategy.lr", "0.7000 ± 0.1000", "2.5 (2 of 3)", "rounds to 0.7", "75 B"):
        assert words in shown
    assert "\x1b" not in shown and "…" not in shown


def test_stat() -> None:
    assert stat([]) == (None, None) and stat([2.0]) == (2.0, None) and stat([1.0, 3.0]) == (2.0, math.sqrt(2))
    assert stat([1.0, None]) == (None, None)  # a diverged seed is not left out of its group's mean


def test_names_do_not_matter_and_other_strategies_keys_are_not_listed(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / "x", 1, [0.5]),
        make(tmp_path / "y", 2, [0.5]),
        make(tmp_path / "z", 1, [0.5], name="fedprox", mu=1.0),
    ]
    plain, prox = report.compare(runs)
    assert plain.changed == {"strategy.name": "fedavg"} and plain.label == "fedavg"
    assert prox.changed == {"strategy.name": "fedprox", "strategy.mu": 1.0} and prox.label == "fedprox strategy.mu=1.0"


def test_unfinished_runs_are_shown_but_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        make(tmp_path / "a", 1, [0.5, 0.9]),
        make(tmp_path / "b", 2, [0.1], "failed"),
        make(tmp_path / "c", 3, [0.1], None),
    ]
    (row,) = report.compare(runs, tmp_path / "out.html")
    assert row.seeds == (1,) and row.runs == 3 and row.final == (0.9, None)
    shown = capsys.readouterr()
    assert "1 of 3" in shown.out
    assert f"{runs[1]}: failed; not counted" in shown.err and f"{runs[2]}: unfinished; not counted" in shown.err


def test_a_spent_privacy_budget_is_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unlike an interruption, which has the same status: what tells them apart is that there is a model."""
    runs = [
        make(tmp_path / "a", 1, [0.5, 0.9], "stopped", digest="ab"),
        make(tmp_path / "b", 2, [0.7], "stopped"),
    ]
    (row,) = report.compare(runs)
    assert row.seeds == (1,) and row.runs == 2 and row.final == (0.9, None)
    said = capsys.readouterr().err
    assert f"note: {runs[0]}: its privacy budget was spent after 2 of 3 rounds\n" in said
    assert f"note: {runs[1]}: stopped; not counted\n" in said


def test_clients_that_were_dropped_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.compare([make(tmp_path / "a", 1, [0.5, 0.9], failures=2), make(tmp_path / "b", 2, [0.7])])
    assert capsys.readouterr().err == f"note: {tmp_path / 'a'}: 4 updates of failing clients dropped\n"


def test_own_models_are_compared_where_there_is_no_global_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "personal_accuracy_mean"
    runs = [
        make(tmp_path / "local", 1, [0.4, 0.8], name="local", key=own),
        make(tmp_path / "fedavg", 1, [0.5, 0.6, 0.9]),
    ]
    local, fedavg = report.compare(runs, tmp_path / "out.svg", target=0.8)
    assert local.personal == (0.8, None) and local.final == (None, None) and fedavg.personal == (None, None)
    assert local.rounds_to_target == (2, None) and fedavg.rounds_to_target == (3, None)
    assert re.search(r"local .* +- +- +0\.8000 +2 ", capsys.readouterr().out)
    svg = (tmp_path / "out.svg").read_text()
    assert "local (clients' own models)" in svg and svg.count("own models") == 1
    report.compare(runs[1:])
    assert "personal" not in capsys.readouterr().out


def test_time_is_that_of_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first run of a process imports what the others find imported: its wall time says nothing of its strategy."""
    run = make(tmp_path / "a", 1, [0.5, 0.9])
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"wall_seconds": 100.0}) + "\n")
    (row,) = report.compare([run])
    assert row.seconds == (2.0, None)
    shown = capsys.readouterr().out
    assert "time in rounds" in shown and "2.0 s" in shown and "1 min 40 s" not in shown


def test_a_repetition_is_not_a_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path / "a", 1, [0.1], "failed"), make(tmp_path / "b", 1, [0.5]), make(tmp_path / "c", 1, [0.5])]
    (row,) = report.compare(runs)
    assert row.seeds == (1,) and row.runs == 1 and row.final == (0.5, None)
    assert capsys.readouterr().err.count("counted once") == 2


def test_bad_folders_are_named_all_at_once(tmp_path: Path) -> None:
    good = make(tmp_path / "good", 1, [0.5])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as e:
        report.compare([tmp_path / "absent", good, tmp_path / "empty"])
    assert [p.removeprefix(str(tmp_path)) for p in e.value.problems] == [
        "/absent: no such folder",
        "/empty/config.toml: no such file",
    ]
    for nothing in ([], [tmp_path / "file"]):
        with pytest.raises(ConfigError, match="at least one"):
            report.compare(nothing)
    with pytest.raises(ConfigError, match=r"must end in \.html or \.svg"):
        report.compare([good], tmp_path / "x.png")


@pytest.mark.parametrize("name", ["<b>&", "$x$"])
def test_the_pictures_stand_alone(tmp_path: Path, name: str) -> None:
    import xml.etree.ElementTree as ET

    runs = [
        make(tmp_path / f"r{s}-{lr}", s, [0.2, 0.5 + s / 10, 0.9], name=name, lr=lr)
        for s in (1, 2)
        for lr in (0.1, 0.2)
    ]
    report.compare(runs, tmp_path / "new" / "out.html")
    page = (tmp_path / "new" / "out.html").read_text()
    assert "<b>&" not in page and "http" not in page.replace("http-equiv", "") and page.count("<svg") == 3
    report.compare(runs, tmp_path / "out.svg")
    svg = (tmp_path / "out.svg").read_text()
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg" and "var(--" not in svg
    assert "fill-opacity: 0.16" in svg or "opacity: 0.16" in svg  # the band over seeds


def test_a_chart_with_nothing_in_it(tmp_path: Path) -> None:
    report.compare([make(tmp_path / "a", 1, [0.5], "failed")], tmp_path / "out.svg")
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")
