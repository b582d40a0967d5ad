"""What docs/python-api.md shows must work as it stands there."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
PAGE = (HERE / "docs" / "python-api.md").read_text()


def test_the_script_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"<!-- script.py -->\n```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "script.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(HERE)}
    call = [sys.executable, "script.py"]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[-1] == "12" and (tmp_path / "compare.html").exists()  # the rounds of the run that went on
    assert [line.split()[0] for line in said if "(1, 2) Stat(" in line] == ["fedavg", "fedprox", "local"]


def test_every_call_in_the_table_is_there() -> None:
    calls = re.findall(r"^\| `(?:fedsim\.)?(\w+)\.(\w+)\(", PAGE, re.M)
    assert len(calls) == 10
    assert [(m, name) for m, name in calls if not hasattr(importlib.import_module(f"fedsim.{m}"), name)] == []
    assert "(docs/python-api.md)" in (HERE / "README.md").read_text()
