"""The containers: what they may do, read from the files, and what they really do where there is an engine."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from podman import PREFIX, ROOT, SERVICES, Podman, options, podman

from fedsim import config, deploy
from fedsim.errors import FedsimError
from fedsim.run import run
from runs import experiment

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
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
    assert s["pids_limit"] <= (2048 if name.startswith("ray-") else 256)  # threads count, and Ray has many
    assert s["mem_limit"] and s["cpus"] <= 2
    assert s.get("network_mode") in (None, "none", f"service:{name.replace('clientapp', 'supernode')}")
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


def test_a_container_sees_its_own_keys_and_what_runs_apps_sees_none_of_a_node() -> None:
    seen = {name: [v for v in s.get("volumes", []) if v.startswith("keys-")] for name, s in SERVICES.items()}
    makers = seen.pop("certificates")
    assert len(makers) == 7 and not any(v.endswith(":ro") for v in makers)
    assert SERVICES["certificates"]["network_mode"] == "none"
    for name, keys in seen.items():
        mine = {"register": "superlink"}.get(name, name.removeprefix("supernode-"))
        assert keys == ([] if name.startswith(("clientapp-", "ray-")) else [f"keys-{mine}:/certs:ro"])


def test_apps_run_apart_from_superlink_and_supernodes() -> None:
    for node in range(5):
        client = SERVICES[f"clientapp-{node}"]
        assert client["network_mode"] == f"service:supernode-{node}"
        assert client["volumes"] == [f"node-{node}:/state"]
        assert client.get("profiles") == SERVICES[f"supernode-{node}"].get("profiles")
    link = deploy.superlink(Path("/certs"), "0.0.0.0", 8000, Path("/state/link.db"))
    node = deploy.supernode(Path("/certs"), Path("/state/own"), "superlink:8000", 9094, "")
    for command in (link, node):
        assert command[command.index("--isolation") + 1] == "process"
        assert "--superexec-auth-secret-file" in command and "--ssl-certfile" in command
        assert "--insecure" not in command
    assert "--enable-supernode-auth" in link and "--auth-supernode-private-key" in node
    assert node[node.index("--host") + 1] == "127.0.0.1"


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
    assert len(re.findall(r"^FROM ", DOCKERFILE, re.M)) == 3
    assert (base := re.search(r"^ARG BASE=(python:\d+\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64})$", DOCKERFILE, re.M))
    assert base[1] in SERVICES["certificates"]["build"]["args"]["BASE"]
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


TOKEN = "0123456789abcdef" * 4
RUNNING = ["superlink", "serverapp", *(f"{kind}-{node}" for node in range(3) for kind in ("supernode", "clientapp"))]
SMALL = ("data.partition.clients=3", "strategy.cohort=3", "data.holdout=0.0", "engine.block=1")


@pytest.fixture(scope="module")
def containers() -> Iterator[Podman]:
    """The image as it is built here, and every service of the usual profile, healthy."""
    engine = podman(RAY_AUTH_TOKEN=TOKEN)
    engine.remove()
    began = time.monotonic()
    engine.build()
    print(f"build {time.monotonic() - began:.0f} s")
    engine.network()
    try:
        print({name: round(engine.start(name), 1) for name in RUNNING})
        yield engine
    finally:
        engine.remove()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RUNNING)
def test_inside_there_is_nothing_to_gain(name: str, containers: Podman) -> None:
    shown = containers.inside(name, "sh", "-c", "cat /proc/[0-9]*/status").split("Name:")[1:]
    assert len(shown) > 1
    for process in shown:
        status = dict(line.split(":\t", 1) for line in process.splitlines() if ":\t" in line)
        for kind in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
            assert int(status[kind], 16) == 0, kind
        assert status["Uid"].split() == ["10001"] * 4 and status["Gid"].split() == ["10001"] * 4
        assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    for place in ("/x", "/etc/x", "/opt/fedsim/x", "/home/fedsim/x", "/var/tmp/x", "/certs/x"):
        tried = containers.inside(name, "sh", "-c", f"touch {place} 2>&1", check=False)
        assert "Read-only file system" in tried, f"{place}: {tried}"
    keys = containers.inside(name, "ls", "/certs").split()
    own = {"superlink": "server.key", "serverapp": "exec.key"}.get(name, "node.key")
    assert (own in keys) is not name.startswith("clientapp")
    threads = containers.inside(name, "sh", "-c", "ls -d /proc/[0-9]*/task/* | wc -l")
    assert int(threads) < SERVICES[name]["pids_limit"] / 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_over_containers_stops_at_once_and_goes_on_to_the_bits_of_one_process(
    containers: Podman, tmp_path: Path
) -> None:
    e, out = experiment(*SMALL, "rounds=3", "strategy.name=scaffold"), tmp_path / "out"
    saved = f"test -d /state/runs/out/checkpoint/round-{1:08d}"

    def stop() -> None:
        until = time.monotonic() + 200
        while containers.podman("exec", f"{PREFIX}serverapp", "sh", "-c", saved, check=False).returncode:
            assert time.monotonic() < until
            time.sleep(0.2)
        seconds.update({name: containers.stop(name) for name in order})

    seconds: dict[str, float] = {}
    order = ["serverapp", *(name for name in reversed(RUNNING) if name != "serverapp")]
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(stop)
        with pytest.raises(FedsimError):
            containers.run(e, out, timeout=240, wait=150)
        stopped.result()
    print("stop", {name: round(s, 2) for name, s in seconds.items()})
    assert max(seconds.values()) <= 2
    for name in RUNNING:
        containers.podman("start", PREFIX + name)
    there = containers.run(e, out, resume=True, timeout=240, wait=150)
    assert there["status"] == "completed"
    assert there["params_sha256"] == run(e, tmp_path / "here")["params_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_process_in_a_container_has_the_same_bits_and_stops_at_once(containers: Podman, tmp_path: Path) -> None:
    hardened = options(
        {k: v for k, v in SERVICES["serverapp"].items() if k not in ("volumes", "environment", "healthcheck")}, {}
    )

    def start(name: str, *command: str) -> None:
        alone = ["--network=none", f"--volume={PREFIX}alone:/state", "--restart=no", f"--name={PREFIX}{name}"]
        containers.podman("run", "--detach", *hardened, *alone, SERVICES["serverapp"]["image"], *command)

    def said(name: str, *command: str) -> str:
        start(name, *command)
        assert containers.podman("wait", f"{PREFIX}{name}").stdout.strip() == "0", containers.logs(name)
        return containers.logs(name)

    quickstart = ["fedsim", "run", "/opt/experiments/quickstart.toml", "--out"]
    said("two", *quickstart, "/state/two", "rounds=2")
    e = config.parse(config.override(config.read(ROOT / "experiments" / "quickstart.toml"), ["rounds=2"]))
    assert str(run(e, tmp_path / "here")["params_sha256"]) in said("look-two", "cat", "/state/two/summary.json")
    start("long", *quickstart, "/state/long", "rounds=100000")
    until = time.monotonic() + 120
    while "round-" not in containers.inside("long", "ls", "/state/long/checkpoint", check=False):
        assert time.monotonic() < until, containers.logs("long")
        time.sleep(0.2)
    seconds = containers.stop("long")
    print(f"stop {seconds:.2f} s")
    assert seconds <= 2
    left = said("look-long", "sh", "-c", "ls /state/long/checkpoint; cat /state/long/summary.json")
    assert "round-" in left and '"stopped"' in left


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ray_in_containers_has_the_same_bits_and_knows_no_stranger(containers: Podman, tmp_path: Path) -> None:
    print({name: round(containers.start(name), 1) for name in ("ray-head", "ray-worker")})
    call = ["fedsim", "run", "/opt/experiments/quickstart.toml", "rounds=2", "engine.kind=ray", "engine.workers=2"]
    joined = ["exec", "--env=RAY_ADDRESS=127.0.0.1:6379", f"{PREFIX}ray-head"]
    containers.podman(*joined, *call, "--out", "/state/runs/two")
    e = config.parse(config.override(config.read(ROOT / "experiments" / "quickstart.toml"), ["rounds=2"]))
    assert str(run(e, tmp_path / "here")["params_sha256"]) in containers.inside(
        "ray-head", "cat", "/state/runs/two/summary.json"
    )
    for strange in (["RAY_AUTH_MODE=disabled", "RAY_AUTH_TOKEN="], ["RAY_AUTH_TOKEN=" + "f" * 64]):
        env = [f"--env={each}" for each in ("RAY_ADDRESS=127.0.0.1:6379", *strange)]
        stranger = ["exec", *env, f"{PREFIX}ray-worker"]
        code = "import ray; ray.init(address='auto', log_to_driver=False); print('inside')"
        tried = containers.podman(*stranger, "timeout", "60", "python", "-c", code, check=False)
        assert tried.returncode and "inside" not in tried.stdout
    threads = containers.inside("ray-head", "sh", "-c", "ls -d /proc/[0-9]*/task/* | wc -l")
    assert int(threads) < SERVICES["ray-head"]["pids_limit"] / 2
    print("threads", threads)
    status = containers.inside("ray-head", "cat", "/proc/1/status")
    assert re.search(r"CapEff:\t0+\n", status)
    print("stop", {name: round(containers.stop(name), 2) for name in ("ray-worker", "ray-head")})
