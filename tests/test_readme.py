"""What the README and the pages it links to show must work as it stands there."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fedsim import check, config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


def test_the_script_of_the_python_api_runs(tmp_path: Path) -> None:
    assert "(docs/python-api.md)" in README
    page = (ROOT / "docs" / "python-api.md").read_text()
    (code,) = re.findall(r"<!-- script.py -->\n```python\n(.*?)```", page, re.S)
    (tmp_path / "script.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    call = [sys.executable, "script.py"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "12" and (tmp_path / "compare.html").exists() and "failed" not in done.stdout
    assert [line.split()[0] for line in said if "(1, 2) Stat(" in line] == ["fedavg", "fedprox", "local"]
    for name in re.findall(r"^\| `(?:fedsim\.)?(\w+\.\w+)\(", page, re.M):
        module, _, attribute = name.partition(".")
        assert hasattr(importlib.import_module(f"fedsim.{module}"), attribute), name
