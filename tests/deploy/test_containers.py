"""The containers: what they may do, read from the files, and what they really do where there is an engine."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()

KEYS = {
    "image", "build", "user", "read_only", "init", "cap_drop", "security_opt", "tmpfs", "stop_grace_period",
    "pids_limit", "mem_limit", "cpus", "network_mode", "logging", "restart", "healthcheck", "depends_on", "command",
    "environment", "volumes", "ports", "profiles", "shm_size",
}  # fmt: skip


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_no_more_than_it_must(name: str) -> None:
    s = SERVICES[name]
    assert not s.keys() - KEYS, "a key that the policy does not know: privileged, cap_add, pid, devices …"
    assert s["user"] == "10001:10001"
    assert s["read_only"] is True
    assert s["cap_drop"] == ["ALL"]
    assert s["security_opt"] == ["no-new-privileges:true"]
    assert s["init"] is True  # else a process with number 1 does not hear SIGTERM
    assert all("nosuid" in mount and "nodev" in mount and "size=" in mount for mount in s["tmpfs"])
    assert s["pids_limit"] <= 256 and s["mem_limit"] and s["cpus"] <= 2
    assert s.get("network_mode") in (None, "none")
    assert "healthcheck" in s
    for port in s.get("ports", []):
        assert port.startswith("127.0.0.1:")
    for volume in s.get("volumes", []):
        assert volume.split(":")[0] in COMPOSE["volumes"], "a folder of the host"
    assert not s["image"].endswith(":latest") and ":" in s["image"]


def test_services_depend_on_services_that_are_there() -> None:
    for s in SERVICES.values():
        for other, how in s.get("depends_on", {}).items():
            assert how["condition"] in ("service_healthy", "service_completed_successfully")
            if how["condition"] == "service_healthy":
                assert SERVICES[other]["healthcheck"].get("test")
            else:
                assert SERVICES[other]["restart"] == "no"


def test_only_one_who_makes_keys_writes_them() -> None:
    writers = [name for name, s in SERVICES.items() if "certs:/certs" in s.get("volumes", [])]
    assert writers == ["certificates"]
    assert SERVICES["certificates"]["network_mode"] == "none"


def test_the_superlink_has_tls_and_knows_its_nodes() -> None:
    command = SERVICES["superlink"]["command"]
    assert "--enable-supernode-auth" in command and "--insecure" not in command
    assert any(part.startswith("--ssl-certfile") for part in command)


def test_ray_has_a_token_and_no_dashboard() -> None:
    head = SERVICES["ray-head"]
    assert head["profiles"] == ["ray"] and "ports" not in head
    assert "--include-dashboard=false" in head["command"]
    assert head["environment"]["RAY_AUTH_MODE"] == "token"
    for token in ("", "short"):
        done = subprocess.run(
            [sys.executable, *head["command"][1:]],
            env=os.environ | {"RAY_AUTH_TOKEN": token},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and "RAY_AUTH_TOKEN" in done.stderr


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    final = DOCKERFILE.split("\nFROM ")[-1]
    assert len(re.findall(r"^FROM ", DOCKERFILE, re.M)) == 2
    assert re.search(r"^ARG BASE=python:\d+\.\d+\.\d+-slim-\w+$", DOCKERFILE, re.M)
    assert re.search(r"^USER 10001:10001$", final, re.M)
    assert "HEALTHCHECK" in final and "pip" not in final and "apt" not in final
    assert "--constraint constraints.txt" in DOCKERFILE


def test_hadolint_finds_nothing() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_file_is_of_the_compose_format() -> None:
    """By the engine's own reading: it knows the whole schema."""
    from fedsim.deploy import engine
    from fedsim.errors import ConfigError

    try:
        call = engine()
    except ConfigError as e:
        pytest.skip(str(e))
    done = subprocess.run([*call, "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_containers_start_run_and_stop(tmp_path: Path) -> None:
    """Two rounds in containers; inside: no capabilities, no root, nothing to write; and a quick stop."""
    from fedsim.deploy import Compose
    from fedsim.errors import ConfigError

    try:
        compose = Compose(ROOT)
    except ConfigError as e:
        pytest.skip(str(e))
    if subprocess.run([*compose.engine, "ps"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip(f"{' '.join(compose.engine)} is installed, but has no engine that answers")
    from runs import experiment

    compose.up(3)
    try:
        inside = "grep -E 'CapEff|NoNewPrivs' /proc/self/status; id -u; touch /x 2>&1"
        call = [*compose.engine, "exec", "-T", "superlink", "sh", "-c", inside]
        said = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        assert re.search(r"CapEff:\s+0+$", said, re.M) and re.search(r"NoNewPrivs:\s+1", said)
        assert "10001" in said and "Read-only file system" in said
        e = experiment("rounds=2", "data.partition.clients=3", "strategy.cohort=2")
        assert compose.run(e, tmp_path / "out", timeout=300, wait=120)["status"] == "completed"
    finally:
        compose.down()
