"""Runs for tests: small experiments on real data, the command here or in a process of its own, folders hashed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tomli_w

from fedsim import cli, config
from fedsim.config import EngineConfig, Experiment
from fedsim.data.dataset import Split
from fedsim.grids import inline
from fedsim.replay import Recorder
from fedsim.types import Local

TABLES: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "rounds": 4,
    "data": {"name": "digits", "partition": {"name": "iid", "clients": 12}, "holdout": 0.2},
    "task": {"model": "logistic"},
    "strategy": {"name": "scaffold", "cohort": 4},
    "engine": {"block": 2},
}


def tables(*assignments: str) -> dict[str, Any]:
    """The small experiment, with overrides as on the command line."""
    return config.override(TABLES, assignments)


def experiment(*assignments: str) -> Experiment:
    return config.parse(tables(*assignments))


def write(path: Path, *assignments: str) -> Path:
    path.write_bytes(tomli_w.dumps(tables(*assignments)).encode())
    return path


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def command(*args: str | Path, cwd: Path, timeout: float = 60, **kwargs: Any) -> Answer:
    """``fedsim`` as a user starts it."""
    done = subprocess.run(
        [sys.executable, "-m", "fedsim.cli", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        **kwargs,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


def inside(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """``fedsim`` in this process, from its entry point on: a start costs milliseconds."""

    def call(*args: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            cli.main()
        out, err = capsys.readouterr()
        return Answer(int(e.value.code or 0), out, err)

    return call


def recording(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> list[bool]:
    """From now on blocks take their steps by this recorder; of each phase that is run, whether it is in blocks."""
    way, stacked = inline.way, []

    def recorded(engine: EngineConfig, data: Split, local: Local) -> inline.Way:
        found = way(engine, data, local)
        stacked.append(found.stacked)
        return found._replace(recorder=recorder) if found.stacked else found

    monkeypatch.setattr(inline, "way", recorded)
    return stacked


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder with the hash of its content."""
    return {
        str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without its times, which are all that may differ between two runs."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_bytes()))


def start(*args: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    """``fedsim`` in the background."""
    call = [sys.executable, "-m", "fedsim.cli", *map(str, args)]
    return subprocess.Popen(call, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: "subprocess.Popen[str]", seconds: float = 60) -> None:
    """Wait until a process has made a file or a folder."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"no {path} after {seconds} s"
        time.sleep(0.01)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def listening(pid: int) -> list[str]:
    """Addresses on which a process listens, from the kernel's own tables."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            cells = row.split()
            if cells[9] in inodes and (cells[3] == "0A" or table.startswith("udp")):
                found.append(cells[1])
    return found
