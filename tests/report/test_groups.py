"""Groups over seeds, with the statistics worked by hand."""

import math
from pathlib import Path
from typing import Any

import pytest

from fedsim import record, report
from fedsim.errors import ConfigError
from fedsim.report.groups import stat


def make(folder: Path, seed: int, scores: list[float], status: Any = "completed", **strategy: Any) -> Path:
    config = {"name": folder.name, "seed": seed, "rounds": 3, "strategy": {"name": "fedavg", "lr": 0.1} | strategy}
    with record.create(folder, config, events=False) as r:
        for at, score in enumerate(scores, 1):
            r.append(
                {
                    "round": at,
                    "accuracy": score,
                    "loss": 1 - score,
                    "bytes_down": 10 * seed,
                    "bytes_up": 5,
                    "seconds": 1.0,
                }
            )
        if status:
            r.finish(status, params_sha256=None)
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
        report.compare([tmp_path / "absent", good, tmp_path / "empty", tmp_path / "file"])
    assert [p.removeprefix(str(tmp_path)) for p in e.value.problems] == [
        "/absent: no such folder",
        "/empty/config.toml: no such file",
        "/file: no such folder",
    ]
    with pytest.raises(ConfigError, match="at least one"):
        report.compare([])
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
