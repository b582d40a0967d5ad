"""What a GPU would refuse: the tests in ``far``, a process for each file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAR = Path(__file__).parent / "far"


@pytest.mark.parametrize("file", sorted(path.name for path in FAR.glob("test_*.py")))
@pytest.mark.timeout(400)
def test_on_a_device_of_its_own(file: str) -> None:
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(FAR / file)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        call, env=env | {"FEDSIM_FAR": "1"}, capture_output=True, text=True, check=False, cwd=FAR.parent.parent
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
