"""What the README shows must work as it stands there."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from fedsim import check, config

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_experiment_in_the_readme_is_an_experiment() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.S)
    assert config.parse(tomllib.loads(block)).strategy.name == "fedavg"


def test_the_strategy_in_the_readme_keeps_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"<!-- fednova.py -->\n```python\n(.*?)```", README, re.S)
    assert len(code.splitlines()) <= 45
    (tmp_path / "fednova.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "fednova", raising=False)
    broken = [(title, problem) for title, problem in check.run("fednova.py") if problem]
    assert broken == []
