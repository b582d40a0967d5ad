"""The language of claims against numbers worked out by hand, and a reproduction from a file to its results."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedsim import claims, reproduce
from fedsim.claims import Grid, Result
from fedsim.errors import ConfigError


def result(*accuracies: float | None, up: int = 10) -> Result:
    lines = [{"round": i, "accuracy": a, "bytes_up": up} for i, a in enumerate(accuracies, 1)]
    return Result(lines, {"total_bytes_up": up * len(lines)})


# Two cells and two seeds: means of the last two rounds are 0.3 and 0.5 at lr=0.1, 0.7 and 0.8 at lr=0.2.
SLOW = Grid(
    {"lr": (0.1, 0.2)},
    [[result(0.1, 0.2, 0.4), result(0.2, 0.4, 0.6)], [result(0.5, 0.6, 0.8), result(0.5, 0.7, 0.9)]],
)
FAST = Grid({}, [[result(0.6, 0.8, 1.0), result(0.8, 0.9, 0.9)]])
GRIDS = {"slow": SLOW, "fast": FAST}


def values(text: str) -> list[list[float]]:
    return claims.table(text, GRIDS).values.tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("final(slow, last=2)", [[0.3, 0.5], [0.7, 0.8]]),
        ("final(slow, lr=0.2, last=2)", [[0.7, 0.8]]),
        ("at(fast, 2)", [[0.8, 0.9]]),
        ("best(fast)", [[1.0, 0.9]]),
        ("reach(slow, 0.6)", [[4, 3], [2, 2]]),  # never, within three rounds: 4 is a lower bound
        ("fall(slow, 0.2, key='accuracy', lr=0.1)", [[1, 1]]),
        ("total(fast)", [[30, 30]]),
        ("summary(fast)", [[30, 30]]),
        ("below(slow, 0.9)", [[1, 1], [1, 0]]),
        ("mean(below(slow, 0.5, last=2))", [[0.5, 0]]),
        ("max(final(slow, last=2))", [[0.7, 0.8]]),
        ("min(final(slow, last=2))", [[0.3, 0.5]]),
        ("spread(final(slow, last=2))", [[0.4, 0.3]]),
        ("mean(final(slow, last=2))", [[0.5, 0.65]]),
        ("sd(final(slow, last=2, lr=0.1))", [[math.sqrt(0.02)]]),
        ("reach(slow, 0.6) / reach(fast, 0.6)", [[4, 3], [2, 2]]),
        ("2 * at(fast, 2) - 1", [[0.6, 0.8]]),
    ],
)
def test_figures_by_hand(text: str, expected: list[list[float]]) -> None:
    np.testing.assert_allclose(values(text), expected, rtol=1e-12)


def test_a_comparison_is_of_means_and_holds_in_every_cell() -> None:
    assert claims.judge("final(fast) > final(slow)", GRIDS).holds
    assert claims.judge("final(slow, last=2) >= 0.4", GRIDS).holds  # the mean of 0.3 and 0.5, though one is below
    assert not claims.judge("final(slow, last=2) >= 0.41", GRIDS).holds  # only one cell of two
    assert claims.judge("final(fast) > final(slow, lr=0.2) > final(slow, lr=0.1)", GRIDS).holds
    assert not claims.judge("final(fast) > final(slow, lr=0.1) > final(slow, lr=0.2)", GRIDS).holds


def test_what_is_missing_makes_a_claim_false() -> None:
    grids = {"gone": Grid({}, [[result(0.9, None, last) for last in (None, 0.8)]])}
    assert not claims.judge("final(gone) > 0", grids).holds
    assert not claims.judge("best(gone) > 0", grids).holds
    assert not claims.judge("final(gone) < 1", grids).holds
    assert not claims.judge("max(final(gone)) < 1", grids).holds
    assert not claims.judge("at(gone, 9) < 1", grids).holds
    assert claims.table("below(gone, 0.5)", grids).values.tolist() == [[1, 0]]


def test_rounds_that_measured_nothing_are_passed_over() -> None:
    """Accuracy in rounds 2 and 4 of five; a round without it is not a number, and not the next one's."""
    lines = [{"round": r, "loss": 1.0} | ({"accuracy": r / 10} if r % 2 == 0 else {}) for r in range(1, 6)]
    grids = {"every": Grid({}, [[Result(lines, {})]])}
    for text, expected in {
        "at(every, 4)": 0.4,
        "final(every)": 0.3,
        "reach(every, 0.3)": 4,
        "reach(every, 0.5)": 6,
    }.items():
        assert claims.table(text, grids).values.item() == pytest.approx(expected)
    assert np.isnan(claims.table("at(every, 3)", grids).values.item())


def test_figures_are_named_by_their_text() -> None:
    found = claims.judge("reach(slow, 0.6) / reach(fast, 0.6) >= 2", GRIDS).figures
    assert list(found) == ["reach(slow, 0.6)", "reach(fast, 0.6)", "reach(slow, 0.6) / reach(fast, 0.6)"]
    assert found["reach(slow, 0.6)"].cells == ("lr=0.1", "lr=0.2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("final(slwo) > 0", "did you mean 'slow'"),
        ("finl(slow) > 0", "did you mean 'final'"),
        ("final(slow, lr=0.3) > 0", "was not run"),
        ("final(slow, alpha=1) > 0", "no axis 'alpha'"),
        ("final(slow)", "a claim compares"),
        ("final(slow) > (", "closed"),
        ("__import__('os') > 0", "no figure '__import__'"),
        ("final(slow).values > 0", "cannot be read"),
        ("reach(slow) > 0", "is not called so"),
        ("final(slow) != 1", "compare with"),
    ],
)
def test_a_mistake_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=None) as e:
        claims.judge(text, GRIDS)
    assert says in str(e.value)


EXPERIMENT = """
name = "tiny"
rounds = 3
data = { name = "digits", partition = { name = "iid", clients = 4 } }
task = { model = "logistic" }
strategy = { name = "fedavg", cohort = 2, lr = 0.1 }
"""
CLAIMS = """
title = "Tiny"
seeds = [1, 2]
[runs.avg]
file = "tiny.toml"
grid = { lr = "strategy.lr=0.001,0.5" }
[[claims]]
name = "a larger rate learns faster"
paper = "obvious"
holds = ["final(avg, lr=0.5) > final(avg, lr=0.001)"]
[[claims]]
name = "and the smallest learns best"
paper = "nowhere"
holds = ["final(avg, lr=0.001) > final(avg, lr=0.5)"]
[[pictures]]
file = "picture.svg"
title = "Accuracy"
curves = { FedAvg = "avg(lr=0.5)" }
[[tables]]
file = "table.md"
title = "Side by side"
columns = ["accuracy", "bytes"]
rows = { slow = ["final(avg, lr=0.001)", ""], fast = ["final(avg, lr=0.5)", "total(avg, lr=0.5) / 1e6"] }
[quick]
seeds = [1]
set = ["rounds=1"]
"""


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(EXPERIMENT)
    (tmp_path / "claims.toml").write_text(CLAIMS)
    return tmp_path


def test_from_a_file_to_its_results(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = paper / "cache"
    reproduce.reproduce(paper / "claims.toml", cache=cache, accept=True)
    assert "4 runs, 0 of them done before" in capsys.readouterr().out
    results = json.loads((paper / "results.json").read_text())
    assert list(results) == ["commit", "machine", "minutes", "seeds", "claims"]
    assert results["seeds"] == [1, 2] and results["commit"] and results["machine"]
    first, second = results["claims"]
    assert list(first) == ["name", "paper", "holds", "figures"]
    assert (first["holds"], second["holds"]) == (True, False)
    figure = first["figures"]["final(avg, lr=0.5)"]
    curves = [
        [json.loads(line)["accuracy"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in cache.iterdir()
        if tomllib.loads((folder / "config.toml").read_text())["strategy"]["lr"] == 0.5
    ]
    assert len(curves) == figure["n"] == 2
    assert figure["mean"] == pytest.approx(np.mean(curves), rel=1e-5)
    assert figure["sd"] == pytest.approx(np.std(np.mean(curves, axis=1), ddof=1), rel=1e-5)
    assert (paper / "picture.svg").read_text().startswith("<?xml")
    heading, _, head, rule, slow, fast = (paper / "table.md").read_text().splitlines()
    assert (heading, head, rule) == ("# Side by side", "|  | accuracy | bytes |", "| --- | --- | --- |")
    assert slow.startswith("| slow | 0.") and slow.endswith(" |  |")
    assert fast.startswith(f"| fast | {figure['mean']:.4g} ± {figure['sd']:.2g} | 0.0")

    # Again: nothing is run, and the figures are as expected. A run that is gone is run again, to the same numbers.
    expected = tomllib.loads((paper / "expected.toml").read_text())["figures"]
    assert expected["final(avg, lr=0.5)"]["mean"] == figure["mean"]
    (next(cache.iterdir()) / "summary.json").unlink()
    reproduce.reproduce(paper / "claims.toml", cache=cache, workers=1)
    out = capsys.readouterr().out
    assert "4 runs, 3 of them done before" in out and "2 of 2 expected figures" in out
    assert json.loads((paper / "results.json").read_text())["claims"] == results["claims"]


def test_how_embeddings_moved_is_drawn_and_measured(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(
        """
        name = "tiny"
        rounds = 2
        data = { name = "digits", partition = { name = "dominant_groups", clients = 5, size = 30 } }
        task = { model = "mlp", hidden = [8] }
        strategy = { name = "hyperfl", cohort = 5, hidden = 4, embedding = 3 }
        """
    )
    text = """
        title = "Tiny"
        seeds = [1]
        [runs.hyper]
        file = "tiny.toml"
        [[claims]]
        name = "measured"
        paper = "nowhere"
        holds = ['summary(hyper, key="embedding_separation") > 0']
        [[pictures]]
        file = "embeddings.svg"
        embeddings = "hyper"
        """
    (tmp_path / "claims.toml").write_text(text)
    (tmp_path / "wrong.toml").write_text(text.replace('embeddings = "hyper"', 'embeddings = "hypr"'))
    with pytest.raises(ConfigError, match="no run 'hypr'"):
        reproduce.reproduce(tmp_path / "wrong.toml", cache=tmp_path / "cache", workers=1)
    # Each client is alone in its group, so that there is a picture and no separation.
    (claim,) = reproduce.reproduce(tmp_path / "claims.toml", cache=tmp_path / "cache", workers=1)
    assert not claim["holds"]
    assert "Moves of the clients" in (tmp_path / "embeddings.svg").read_text()
    (tmp_path / "tiny.toml").write_text((tmp_path / "tiny.toml").read_text().replace("clients = 5", "clients = 10"))
    (claim,) = reproduce.reproduce(tmp_path / "claims.toml", cache=tmp_path / "cache", workers=1)
    assert claim["holds"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('curves = { FedAvg = "avg(lr=0.5)" }', "", "a picture has curves or embeddings"),
        ('["final(avg, lr=0.001)", ""]', '["final(avg, lr=0.001)"]', r"rows\.slow: needs 2 figures \(got 1\)"),
        ('["final(avg, lr=0.001)", ""]', '["final(avg)", ""]', "a cell of a table is one figure, and this is 2"),
    ],
)
def test_pictures_and_tables_are_checked_before_anything_runs(paper: Path, old: str, new: str, says: str) -> None:
    text = (paper / "claims.toml").read_text()
    assert old in text
    (paper / "claims.toml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        reproduce.reproduce(paper / "claims.toml", cache=paper / "cache")
    assert not (paper / "cache").exists()


def test_quick_writes_nothing_beside_the_file(paper: Path) -> None:
    reproduce.reproduce(paper / "claims.toml", quick=True, cache=paper / "cache", workers=1)
    assert not (paper / "results.json").exists() and not (paper / "picture.svg").exists()
    assert {len((f / "metrics.jsonl").read_text().splitlines()) for f in (paper / "cache").iterdir()} == {1}


def test_a_figure_that_has_moved_is_named(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (paper / "expected.toml").write_text('[figures."f"]\nmean = 0.5\nsd = 0.1\ntolerance = 0.1\n')
    stat = {"mean": 0.65, "sd": 0.1, "n": 3}
    reproduce._compare(paper / "expected.toml", [{"figures": {"f": stat}}])
    assert "0 of 1" in (out := capsys.readouterr().out) and "f: 0.65 ± 0.1, expected 0.5 ± 0.1" in out


def test_a_curve_over_cells_is_their_mean_for_each_seed() -> None:
    def result(*values: float) -> Result:
        return Result([{"round": r, "loss": v, "note": "x"} for r, v in enumerate(values, 1)], {})

    grids = {"run": Grid({"image": (0, 1)}, [[result(1, 2), result(3, 4)], [result(5, 6), result(7, 9)]])}
    assert reproduce._curve("run(image=1)", grids) == grids["run"].results[1]
    first, second = reproduce._curve("mean(run)", grids)
    assert [line["loss"] for line in first.lines] == [3, 4] and [line["loss"] for line in second.lines] == [5, 6.5]
    assert [line["round"] for line in first.lines] == [1, 2] and "note" not in first.lines[0]
    for wrong in ("mean(run, run)", "mean()"):
        with pytest.raises(ConfigError, match="cannot be read"):
            reproduce._curve(wrong, grids)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("strategy.lr=0.001", "strategy.rate=0.001"), "runs.avg: strategy.rate: unknown key"),
        (("final(avg, lr=0.5) >", "final(avg, lr=0.7) >"), "was not run"),
        (("avg(lr=0.5)", "avg"), "a curve is one cell"),
        (('paper = "nowhere"', ""), "claims.1.paper: missing"),
    ],
)
def test_a_wrong_file_runs_nothing(paper: Path, change: tuple[str, str], says: str) -> None:
    (paper / "claims.toml").write_text(CLAIMS.replace(*change))
    with pytest.raises(ConfigError) as e:
        reproduce.reproduce(paper / "claims.toml", cache=paper / "cache")
    assert says in str(e.value) and not (paper / "cache").exists()


@pytest.mark.slow
def test_a_stopped_reproduction_leaves_nobody_behind(paper: Path) -> None:
    """SIGTERM: the workers end too. A run of 20,000 rounds takes minutes, so there is time to hit it."""
    (paper / "tiny.toml").write_text(EXPERIMENT.replace("rounds = 3", "rounds = 20000"))
    command = [sys.executable, "-m", "fedsim.cli", "reproduce", "claims.toml"]
    child = subprocess.Popen(command, cwd=paper, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cache = paper / "runs" / "reproduce" / paper.name
    for _ in range(600):
        if len(list(cache.glob("*/metrics.jsonl"))) == 2:
            break
        time.sleep(0.1)
    workers = [int(p) for p in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()]
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) != 0 and len(workers) >= 2
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            break
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert not any(json.loads(f.read_text())["status"] == "completed" for f in cache.glob("*/summary.json"))


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_is_dirty_by_what_decides_numbers(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        own = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *own, *command], check=True, capture_output=True)

    folder = tmp_path / "experiments" / "one"
    folder.mkdir(parents=True)
    assert reproduce.commit(tmp_path) == "unknown"
    for file in ("results.json", "curve.svg", "claims.toml"):
        (folder / file).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = reproduce.commit(folder)
    assert len(clean) == 40
    (folder / "results.json").write_text("2")
    (folder / "curve.svg").write_text("2")
    (folder / "untracked.py").write_text("2")
    assert reproduce.commit(folder) == clean
    (folder / "claims.toml").write_text("2")
    assert reproduce.commit(folder) == f"{clean}-dirty"
