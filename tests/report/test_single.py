"""The page stands alone, escapes everything, and shows whatever there is of a run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedsim import record, report
from fedsim.errors import ConfigError
from fedsim.report import figures

EVIL = "<script>alert('x')</script>\"&"
CONFIG: dict[str, Any] = {
    "name": EVIL,
    "seed": 3,
    "rounds": 9,
    "data": {"name": EVIL, "partition": {"name": "dirichlet", "clients": 4, "alpha": 0.5}},
    "task": {"model": EVIL},
    "strategy": {"name": EVIL, "lr": 0.1},
}


def make(folder: Path, rounds: int = 9, clients: int = 4, finish: bool = True) -> Path:
    with record.create(folder, CONFIG, events=False) as r:
        for at in range(1, rounds + 1):
            row: dict[str, Any] = {
                "round": at,
                "accuracy": at / 10,
                "loss": math.nan if at == 4 else 1 / at,
                "train_loss": 2 / at,
            }
            row |= {"clients": 2, "examples": 9, "bytes_down": 100, "bytes_up": 50, "seconds": 0.5, "epsilon": at / 3}
            row |= {
                "personal_accuracy_mean": 0.5,
                EVIL: 1.0,
                "$_rate": 0.1,
                "failures": [{"client": 2, "reason": EVIL}],
            }
            r.append(row)
        rows = [{"client": c, "examples": 5, "accuracy": c / clients, "personal_accuracy": 0.5} for c in range(clients)]
        r.clients(rows)
        if finish:
            r.finish("failed", params_sha256="ab" * 32, error=EVIL, more={"environment": {EVIL: EVIL}})
    (folder / "privacy.txt").write_text(EVIL)
    (folder / "partition.svg").write_text(f'<svg xmlns="http://www.w3.org/2000/svg">{EVIL}</svg>')
    return folder


class Page(HTMLParser):
    """What a browser would make of it: elements, attributes, and whether the elements nest."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report.write(make(tmp_path_factory.mktemp("run") / "a")).read_text()


def test_nothing_comes_from_outside(text: str) -> None:
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "base", "style"} & {
        tag for tag, _ in page.found if tag != "style"
    }
    for _, attributes in page.found:
        for key in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/svg+xml;base64,"))
        assert not any(key.startswith("on") for key in attributes)
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"url\((?!#)|@import", text)


def test_everything_is_escaped(text: str) -> None:
    assert "<script" not in text and "alert('x')" not in text.replace("&lt;script&gt;alert('x')&lt;/script&gt;", "")
    assert text.count("&lt;script&gt;") > 6


def test_ids_are_unique_and_every_reference_has_its_target(text: str) -> None:
    page = Page(text)
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert wanted and wanted <= set(ids)


def test_the_colours_are_the_pages(text: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) >= 9
    assert not [c for svg in svgs for c in re.findall(r"#[0-9a-f]{6}\b", svg)]
    assert "prefers-color-scheme:dark" in text and "@media print" in text


def test_what_must_be_on_it(text: str) -> None:
    for words in (
        "final accuracy",
        "0.9000",
        "9",
        "ab" * 32,
        "Failures (9)",
        "Resolved config",
        "Privacy",
        "Worst: client 0, 0.000 on 5 examples",
    ):
        assert words in text


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rounds=3)
    first = report.write(folder).read_bytes()
    assert report.write(folder).read_bytes() == first


def test_a_long_run_makes_a_small_page_and_keeps_its_spikes(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", rounds=1, clients=5000)
    lines: list[dict[str, Any]] = [
        {"round": at, "accuracy": 0.5, "loss": 1.0, "seconds": 0.1} for at in range(1, 20_001)
    ]
    lines[12_345]["loss"] = 77.0
    lines[12_346]["failures"] = [{"client": c, "reason": "NaN"} for c in range(5000)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert report.write(folder).stat().st_size < 500_000
    kept = figures._thin([row["loss"] for row in lines])
    assert 12_345 in kept and len(kept) <= figures.POINTS + 2 and kept[0] == 0 and kept[-1] == 19_999


def test_a_run_that_was_killed_before_its_first_round(tmp_path: Path) -> None:
    with record.create(tmp_path / "a", CONFIG, events=False):
        pass
    text = report.write(tmp_path / "a").read_text()
    assert "unfinished" in text and "No round was finished." in text


def test_a_run_that_is_still_going(tmp_path: Path) -> None:
    text = report.write(make(tmp_path / "a", rounds=1, finish=False)).read_text()
    assert "unfinished" in text and "1 of 9" in text


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.toml: no such file"):
        report.write(tmp_path)


def test_quantile_is_numpys() -> None:
    import numpy as np

    values = sorted([0.3, 0.9, 0.1, 0.7, 0.75])
    for q in (0.0, 0.1, 0.5, 0.99, 1.0):
        assert figures.quantile(values, q) == pytest.approx(float(np.quantile(values, q)), abs=1e-15)


def test_loss_is_drawn_against_queries_where_they_are_counted(tmp_path: Path) -> None:
    for name, asked in (("counted", {"queries": 30}), ("not", {})):
        with record.create(tmp_path / name, CONFIG, events=False) as r:
            for at in (1, 2):
                line = {"round": at, "loss": 1 / at, "clients": 1, "examples": 1, "bytes_down": 8, "bytes_up": 8}
                r.append(line | {key: value * at for key, value in asked.items()} | {"seconds": 0.1})
        text = report.write(tmp_path / name).read_text()
        assert ("Loss by queries" in text) == (name == "counted")


@pytest.mark.parametrize("lacking", [{"strategy": {}}, {"strategy": 3}, {"name": None}])
def test_a_config_that_is_no_runs(tmp_path: Path, lacking: dict[str, Any]) -> None:
    make(tmp_path, rounds=1)
    tables = {key: value for key, value in (CONFIG | lacking).items() if value is not None}
    (tmp_path / record.CONFIG).write_text(tomli_w.dumps(tables))
    with pytest.raises(ConfigError, match=r"config\.toml: must be a run's, with a name, a seed and a \[strategy\]$"):
        report.write(tmp_path)
