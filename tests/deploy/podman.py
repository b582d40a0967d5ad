"""The services of ``docker-compose.yml``, started by podman alone, for an ordinary user and without a daemon.

Containers share a network that has a loopback and nothing else, on which every service's name is known: a network
between a user's containers needs what not every machine has. All else is as the compose file says; a key of it that is
not known here is an error.
"""

import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedsim.deploy import Compose

ROOT = Path(__file__).parent.parent.parent
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PREFIX = "fedsim-test-"
START = 120.0  # seconds for a service to be healthy
ELSEWHERE = {"build", "depends_on", "profiles", "network_mode", "ports", "logging", "command", "image", "healthcheck"}


def interpolated(text: str, variables: dict[str, str]) -> str:
    """``${NAME:-default}`` as compose reads it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: variables.get(m[1]) or m[2], text)


def options(service: dict[str, Any], variables: dict[str, str]) -> list[str]:
    """A service's keys as options of ``podman run``."""
    found: list[str] = []
    for key, value in service.items():
        match key:
            case "user" | "init" | "pids_limit" | "cpus" | "restart" | "shm_size":
                found.append(f"--{key.replace('_', '-')}={str(value).lower()}")
            case "mem_limit":
                found.append(f"--memory={value}")
            case "read_only":
                found += [f"--read-only={str(value).lower()}", "--read-only-tmpfs=false"]
            case "stop_grace_period":
                found.append(f"--stop-timeout={value.removesuffix('s')}")
            case "cap_drop" | "tmpfs":
                found += [f"--{key.replace('_', '-')}={each}" for each in value]
            case "security_opt":
                found += [f"--security-opt={each.removesuffix(':true')}" for each in value]
            case "volumes":
                found += [f"--volume={PREFIX}{each}" for each in value]
            case "environment":
                found += [f"--env={name}={interpolated(str(text), variables)}" for name, text in value.items()]
            case _:
                assert key in ELSEWHERE, f"{key}: not known here"
    return found


class Podman(Compose):
    """A deployment whose engine is podman: ``run`` is that of ``fedsim deploy run``."""

    def __init__(self, **variables: str) -> None:
        self.project, self.variables = ROOT, variables
        self.engine = ["podman"]

    def _command(self, *args: str) -> list[str]:
        assert args[:2] == ("exec", "-T")  # all that a run asks of compose
        return ["podman", "exec", "-i", PREFIX + args[2], *args[3:]]

    def podman(self, *args: str, check: bool = True, timeout: float = 600) -> "subprocess.CompletedProcess[str]":
        """Call podman; its output goes through a file, since what it leaves behind would hold a pipe open."""
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
            done = subprocess.run(
                ["podman", *args], stdin=subprocess.DEVNULL, stdout=said, stderr=wrong, timeout=timeout, check=False
            )
            said.seek(0), wrong.seek(0)
            found = subprocess.CompletedProcess(done.args, done.returncode, said.read(), wrong.read())
        assert not check or not found.returncode, f"podman {shlex.join(args)}: {found.stderr or found.stdout}"
        return found

    def build(self) -> None:
        """Build the image. ``FEDSIM_BUILD`` holds what a build needs in this place: ``--build-arg BASE=…`` …"""
        image, more = SERVICES["certificates"]["image"], shlex.split(os.environ.get("FEDSIM_BUILD", ""))
        self.podman("build", "--format=docker", f"--tag={image}", *more, str(ROOT), timeout=1800)

    def network(self) -> None:
        """A container that holds the loopback, and the names on it."""
        self._hosts = tempfile.NamedTemporaryFile("w", prefix=PREFIX)  # noqa: SIM115 — it goes when this object does
        self._hosts.writelines(f"127.0.0.1 {name}\n" for name in ("localhost", *SERVICES))
        self._hosts.flush()
        Path(self._hosts.name).chmod(0o644)
        image = SERVICES["superlink"]["image"]
        self.podman(
            "run", "--detach", "--no-healthcheck", "--network=none", f"--name={PREFIX}net", image, "sleep", "infinity"
        )

    def start(self, name: str) -> float:
        """Start a service and, before it, what it depends on; the seconds from its start until it is healthy."""
        if self.podman("container", "exists", PREFIX + name, check=False).returncode == 0:
            return 0.0
        service = SERVICES[name]
        for other in service.get("depends_on", {}):
            self.start(other)
        command = [interpolated(part, self.variables) for part in service["command"]]
        # Health is asked by hand: the timers of podman's own checks are systemd's.
        where = ["--no-healthcheck", f"--network=container:{PREFIX}net", f"--volume={self._hosts.name}:/etc/hosts:ro"]
        of = [f"--name={PREFIX}{name}", *where, *options(service, self.variables)]
        began = time.monotonic()
        self.podman("run", "--detach", *of, service["image"], *command)
        if service["restart"] == "no":
            assert self.podman("wait", PREFIX + name).stdout.strip() == "0", self.logs(name)
        kind, *test = service["healthcheck"].get("test", ["CMD", "true"])
        assert kind == "CMD"
        while service["restart"] != "no" and self.podman("exec", PREFIX + name, *test, check=False).returncode:
            assert time.monotonic() < began + START, f"{name} is not healthy: {self.logs(name)}"
            time.sleep(0.2)
        return time.monotonic() - began

    def inside(self, name: str, *command: str, check: bool = True) -> str:
        """What a command says in a service's container."""
        return self.podman("exec", PREFIX + name, *command, check=check).stdout

    def stop(self, name: str) -> float:
        """The seconds that a service takes to end after SIGTERM; it is killed after its grace period."""
        began = time.monotonic()
        self.podman("stop", PREFIX + name)
        return time.monotonic() - began

    def logs(self, name: str) -> str:
        done = self.podman("logs", PREFIX + name, check=False)
        return (done.stdout + done.stderr)[-3000:]

    def remove(self) -> None:
        """Containers and volumes of this test, also those of one that was killed."""
        names = self.podman("ps", "--all", "--format={{.Names}}", f"--filter=name=^{PREFIX}").stdout.split()
        for name in sorted(names, key=lambda name: name == f"{PREFIX}net"):  # others depend on the network's
            self.podman("rm", "--force", "--time=0", name)
        for volume in self.podman("volume", "ls", "--quiet", f"--filter=name={PREFIX}").stdout.split():
            self.podman("volume", "rm", volume)


def podman(**variables: str) -> Podman:
    """A podman of this user's. Skips the test, with the reason, where there is none."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    asked = ["podman", "info", "--format={{.Host.Security.Rootless}}"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode or done.stdout.strip() != "true":
        pytest.skip(
            f"podman is installed, but not rootless for this user: {done.stderr.strip()[-200:] or 'it is root'}"
        )
    return Podman(**variables)
