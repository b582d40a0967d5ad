"""The Ray cluster of the compose file, as processes of this machine: it can be joined with the token, and only so."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from podman import ROOT, SERVICES

from fedsim import config
from fedsim.benches import proc
from fedsim.deploy import free_port
from fedsim.run import run

QUICKSTART = ROOT / "experiments" / "quickstart.toml"
PIECES = ["rounds=2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[dict[str, str], int]]:
    """The head's command with its environment, but for places and ports: what joins it needs, and its process id."""
    home = Path(tempfile.mkdtemp(prefix="fs-"))  # short: paths of sockets have 107 bytes
    given = SERVICES["ray-head"]["environment"] | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    port = free_port()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    places = {"HOME": str(home), "RAY_TMPDIR": str(home / "ray"), "PATH": path, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | given | places
    command = [part.replace("6379", str(port)) for part in SERVICES["ray-head"]["command"][1:]]
    # A cluster listens where others can reach it: its network is the fence, and the token the lock.
    more = ["--node-ip-address=127.0.0.1", "--num-cpus=2", f"--object-store-memory={1 << 28}"]
    with (home / "log").open("wb") as log:
        head = subprocess.Popen(
            [sys.executable, *command, *more],
            env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            until = time.monotonic() + 120
            while "Ray runtime started" not in (home / "log").read_text():
                assert head.poll() is None and time.monotonic() < until, (home / "log").read_text()
                time.sleep(0.2)
            yield env, head.pid
        finally:
            children = set(proc.tree(head.pid)) - {head.pid}
            head.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                head.wait(20)
            for pid in (head.pid, *children):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.wait()
            shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_that_joins_it_has_the_bits_of_one_process(cluster: tuple[dict[str, str], int], tmp_path: Path) -> None:
    env, _ = cluster
    call = [sys.executable, "-m", "fedsim.cli", "run", str(QUICKSTART), *PIECES, "--engine", "ray", "--workers", "2"]
    done = subprocess.run(
        [*call, "--out", str(tmp_path / "there")], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    e = config.parse(config.override(config.read(QUICKSTART), PIECES))
    here = run(e, tmp_path / "here")["params_sha256"]
    assert f'"params_sha256": "{here}"' in (tmp_path / "there" / "summary.json").read_text()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("way", ["without a token", "with another token"])
def test_a_stranger_is_refused(way: str, cluster: tuple[dict[str, str], int]) -> None:
    env, _ = cluster
    code = "import ray; ray.init(address='auto', log_to_driver=False); print('inside')"
    strange = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""} if way == "without a token" else {}
    strange = strange or {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    call = ["timeout", "90", sys.executable, "-c", code]
    done = subprocess.run(call, env=env | strange, capture_output=True, text=True, check=False)
    assert done.returncode and "inside" not in done.stdout
    assert re.search(r"(?i)unauthenticated|token", done.stdout + done.stderr), done.stderr  # refused, and not lost
