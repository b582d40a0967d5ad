"""``fedsim deploy``: a SuperLink and SuperNodes, with TLS and node authentication, and an experiment run over them.

Two ways to the same thing: containers (``docker-compose.yml``), or, with ``--local``, processes of this machine on
loopback. Certificates and node keys are made on first use; a node whose key is not registered is refused.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import tomli_w

from fedsim import certificates, config, files, offline, registry
from fedsim.config import Experiment
from fedsim.errors import ConfigError, FedsimError

CONNECTION = "deployment"
PIDS, PLACE = "processes.json", "place.json"
START = 90.0  # seconds for a SuperLink to answer
CERTS, STATE = Path("/certs"), Path("/state")  # of a container
RUNTIME = 9094  # the port at which a SuperNode, number 0, gives out work on its own loopback
LOOK = "0.25"  # seconds between two looks for work; Flower's own default is 1


def superlink(certs: Path, host: str, port: int, database: Path) -> list[str]:
    """The command of a SuperLink: it knows its nodes, and runs nobody's code itself."""
    return [
        "flower-superlink", "--host", host, "--port", str(port), "--database", str(database),
        "--isolation", "process", "--superexec-auth-secret-file", str(certs / "exec.key"),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation", *_tls(certs),
    ]  # fmt: skip


def supernode(certs: Path, own: Path, address: str, port: int, node_config: str) -> list[str]:
    """The command of a SuperNode, which runs nobody's code itself; ``own`` holds what its executor knows, too."""
    return [
        "flower-supernode", "--superlink", address, "--root-certificates", str(certs / "ca.crt"),
        "--host", "127.0.0.1", "--port", str(port), "--auth-supernode-private-key", str(certs / "node.key"),
        "--isolation", "process", "--superexec-auth-secret-file", str(own / "exec.key"),
        "--node-config", node_config, *_tls(own),
    ]  # fmt: skip


def executor(certs: Path, address: str) -> list[str]:
    """The command of a process that takes the work of a SuperLink, or of a SuperNode, at ``address``."""
    return [
        sys.executable, "-c", "from fedsim.grids.executor import superexec; superexec()",
        "--runtime-api-address", address, "--root-certificates", str(certs / "ca.crt"),
        "--superexec-auth-secret-file", str(certs / "exec.key"),
    ]  # fmt: skip


def _tls(certs: Path) -> list[str]:
    given = {"certfile": "server.crt", "keyfile": "server.key", "ca-certfile": "ca.crt"}
    return [part for name, file in given.items() for part in (f"--ssl-{name}", str(certs / file))]


def connection(home: Path, address: str, ca: Path) -> None:
    """Tell Flower's commands how to reach the SuperLink."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    tables = {
        "superlink": {
            "default": CONNECTION,
            CONNECTION: {"address": address, "root-certificates": str(ca.absolute())},
        }
    }
    files.write(home / "config.toml", tomli_w.dumps(tables).encode(), mode=0o600)


def environment(home: Path) -> dict[str, str]:
    """What Flower's processes get: their home, our interpreter's commands, and nothing that calls home."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": LOOK}
    return os.environ | offline.QUIET | settings | {"FLWR_HOME": str(home.absolute()), "PATH": path}


class Local:
    """A deployment of processes on loopback, described by a folder. ``up`` and ``down`` may be different commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.certs, self.home = self.folder / "certs", self.folder / "home"

    @property
    def ca(self) -> Path:
        """Whom everybody believes."""
        return self.certs / "superlink" / "ca.crt"

    @property
    def place(self) -> dict[str, Any]:
        """Ports and number of nodes. Raises ``ConfigError`` where nothing was started."""
        try:
            return dict(json.loads((self.folder / PLACE).read_bytes()))
        except FileNotFoundError:
            raise ConfigError(f"{self.folder}: holds no deployment; start one with fedsim deploy up --local") from None

    def up(self, nodes: int, say: Callable[[str], None] = print) -> None:
        """Start the SuperLink and ``nodes`` SuperNodes. Raises ``FedsimError`` where they do not come up."""
        if self.running():
            raise ConfigError(f"{self.folder}: a deployment is running; end it with fedsim deploy down")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        certificates.make(self.certs, nodes)
        place = {"port": free_port(), "nodes": nodes, "ports": [free_port() for _ in range(nodes)]}
        files.write(self.folder / PLACE, json.dumps(place).encode())
        connection(self.home, f"127.0.0.1:{place['port']}", self.ca)
        try:
            self.start_link()
            say(f"SuperLink on https://127.0.0.1:{place['port']}")
            register(self.home, self.certs / "superlink", range(nodes))
            for node in range(nodes):
                self.start_node(node)
            say(f"{nodes} SuperNodes; logs in {self.folder / 'logs'}")
        except BaseException:
            self.down()
            raise

    def start_link(self) -> None:
        """Start the SuperLink on the database that is there, and wait until it answers."""
        port = self.place["port"]
        link = superlink(self.certs / "superlink", "127.0.0.1", port, self.folder / "link.db")
        pid = self.spawn("superlink", link, self.home)
        self.spawn("superlink-executor", executor(self.certs / "serverapp", f"127.0.0.1:{port}"), self.home)
        wait_for(f"https://127.0.0.1:{port}/health", self.ca, lambda: alive(pid))

    def start_node(self, node: int, certs: Path | None = None) -> int:
        """Start the SuperNode of client ``node``, with the keys in ``certs``; returns its process id."""
        place, state = self.place, self.folder / "nodes" / str(node)
        own = state / "own"
        certificates.own(own)
        node_config = f'partition-id={node} num-partitions={place["nodes"]} state="{state}"'
        address, port = f"127.0.0.1:{place['port']}", place["ports"][node]
        call = supernode(certs or self.certs / f"node-{node}", own, address, port, node_config)
        pid = self.spawn(f"supernode-{node}", call, state)
        self.spawn(f"supernode-{node}-executor", executor(own, f"127.0.0.1:{port}"), state)
        return pid

    def spawn(self, name: str, call: list[str], home: Path) -> int:
        """Start a process in a session of its own, with its output in ``logs``, and note it, unless it runs already."""
        if (there := self.running().get(name)) is not None:
            return there
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                call,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=environment(home),
                start_new_session=True,
            )
        _children.append(process)
        noted = self.processes() | {name: [process.pid, started(process.pid)]}
        files.write(self.folder / PIDS, json.dumps(noted).encode())
        return process.pid

    def processes(self) -> dict[str, list[int]]:
        """By name, the processes that were started: each one's id and when it began."""
        try:
            return dict(json.loads((self.folder / PIDS).read_bytes()))
        except FileNotFoundError:
            return {}

    def running(self) -> dict[str, int]:
        """The processes that live, by name. An id that now belongs to another process is not one of them."""
        return {name: pid for name, (pid, began) in self.processes().items() if alive(pid) and started(pid) == began}

    def kill(self, name: str) -> None:
        """Kill a process, what takes its work, and what they have started."""
        for part in (name, f"{name}-executor"):
            if (pid := self.running().get(part)) is not None:
                os.killpg(pid, signal.SIGKILL)
                while alive(pid):
                    time.sleep(0.01)

    def down(self, patience: float = 10.0) -> None:
        """End every process of the deployment, nodes first; those that stay are killed."""
        groups = [pid for _, pid in sorted(self.running().items(), reverse=True)]
        for pid in groups:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + patience
        while self.running() and time.monotonic() < end:
            time.sleep(0.1)
        for group in groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in list(_children):  # those that were killed before are waited for, too
            if process.pid in groups:
                process.wait()
            if process.poll() is not None:
                _children.remove(process)
        (self.folder / PIDS).unlink(missing_ok=True)

    def run(self, experiment: Experiment, out: Path, **settings: Any) -> dict[str, Any]:
        """Run an experiment over the nodes, and return its summary. Raises ``FedsimError`` where it fails."""
        if "superlink" not in self.running():
            raise ConfigError(f"{self.folder}: no SuperLink is running; start one with fedsim deploy up --local")
        app = write_app(self.folder / "app", experiment, {"out": str(out.absolute())} | settings)
        return submit(app, self.home, out, settings.get("echo"))


class Compose:
    """A deployment of containers, as ``docker-compose.yml`` describes it."""

    def __init__(self, project: Path) -> None:
        self.project = project
        if not (project / "docker-compose.yml").exists():
            raise ConfigError(
                f"{project}: has no docker-compose.yml; call fedsim deploy in the source, or with --local"
            )
        self.engine = engine()

    def _command(self, *args: str) -> list[str]:
        return [*self.engine, *args]

    def _call(self, *args: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(self._command(*args), cwd=self.project, text=True, check=False, **kwargs)

    def up(self, nodes: int) -> None:
        """Build the image and start the services. Raises ``FedsimError`` where the engine fails."""
        if nodes not in (3, 5):
            raise ConfigError(f"--nodes: docker-compose.yml describes 3 or 5 SuperNodes (got {nodes})")
        profiles = ["--profile", "five"] if nodes == 5 else []
        counted = os.environ | {"FEDSIM_NODES": str(nodes)}
        if self._call(*profiles, "up", "--build", "--detach", env=counted).returncode:
            raise FedsimError("the containers did not start; what the engine says is above")

    def down(self) -> None:
        """Stop and remove the containers; their volumes stay."""
        self._call("--profile", "five", "--profile", "ray", "down", "--timeout", "10")

    def run(self, experiment: Experiment, out: Path, **settings: Any) -> dict[str, Any]:
        """Run an experiment over the nodes; its folder is inside, beside the ServerApp, and copied out to ``out``."""
        from fedsim.run import check_folder

        echo = settings.pop("echo", None)
        check_folder(out, bool(settings.get("resume")))
        # Folders of one name are runs of their own.
        inside = f"/state/runs/{out.name}-{sha256(str(out.resolve()).encode()).hexdigest()[:12]}"
        sent = json.dumps(
            {"experiment": tomli_w.dumps(config.dump(experiment)), "settings": {"out": inside} | settings}
        )
        call = ["exec", "-T", "serverapp", "python", "-m", "fedsim.deploy", "submit"]
        done = self._call(*call, input=sent, stdout=None if echo else subprocess.PIPE)
        self._fetch(inside, out)
        if done.returncode:
            raise FedsimError("the run failed; what it said is above")
        return dict(json.loads((out / "summary.json").read_bytes()))

    def _fetch(self, inside: str, out: Path) -> None:
        """Copy a run's folder out, by way of tar: not every engine's compose has ``cp``."""
        with tempfile.TemporaryFile() as packed:
            call = self._command("exec", "-T", "serverapp", "tar", "-C", inside, "-c", ".")
            subprocess.run(call, cwd=self.project, stdin=subprocess.DEVNULL, stdout=packed, check=False)
            packed.seek(0)
            with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=packed) as found:
                for member in found:  # files alone, and none beside the folder: apps' code may have written there
                    path = (out / member.name).resolve()
                    if member.isfile() and path.is_relative_to(out.resolve()):
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_bytes(found.extractfile(member).read())  # type: ignore[union-attr]


def engine() -> list[str]:
    """The compose command that is installed here. Raises ``ConfigError`` where there is none."""
    for call in (["docker", "compose"], ["podman-compose"], ["docker-compose"]):
        if (
            shutil.which(call[0])
            and not subprocess.run(
                [*call, "version"], capture_output=True, check=False, stdin=subprocess.DEVNULL
            ).returncode
        ):
            return call
    raise ConfigError("no container engine with compose was found here; --local starts processes on loopback instead")


_children: list["subprocess.Popen[bytes]"] = []  # of this process: they are waited for when they end


@contextlib.contextmanager
def local(folder: Path, nodes: int) -> Iterator[Local]:
    """A local deployment that ends with the block, whatever happens in it."""
    deployment = Local(folder)
    deployment.up(nodes, say=lambda line: None)
    try:
        yield deployment
    finally:
        deployment.down()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    for process in _children:
        if process.pid == pid:
            return process.poll() is None
    return started(pid) != 0


def started(pid: int) -> int:
    """When a process began, in clock ticks since the machine did; 0 for one that is not there."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def wait_for(url: str, ca: Path, running: Callable[[], bool]) -> None:
    """Wait until a SuperLink answers. Raises ``FedsimError`` where it ends, or does not within ``START`` seconds."""
    context = ssl.create_default_context(cafile=str(ca))
    end = time.monotonic() + START
    while time.monotonic() < end:
        if not running():
            raise FedsimError("the SuperLink ended while it started; see logs/superlink.log")
        try:
            with urllib.request.urlopen(url, timeout=5, context=context):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise FedsimError(f"the SuperLink does not answer after {START:g} s; see logs/superlink.log")


def register(home: Path, certs: Path, nodes: range) -> None:
    """Let these nodes in, whose public keys are in ``certs``: the SuperLink refuses every other."""
    keys = [str(certs / f"node-{node}.pub") for node in nodes]
    done = subprocess.run(
        [sys.executable, "-m", "fedsim.grids.flower", CONNECTION, *keys],
        env=environment(home), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode:
        raise FedsimError(f"the nodes could not be registered: {last_line(done.stdout + done.stderr)}")


def write_app(folder: Path, experiment: Experiment, settings: Mapping[str, Any]) -> Path:
    """The Flower app of an experiment: its resolved TOML and nothing else. The code is what is installed at each end.

    Raises ``ConfigError`` for plugins that are files of this machine: nodes do not have them.
    """
    resolved = config.dump(experiment)
    data = experiment.data
    for name in (experiment.strategy.name, experiment.task.model, data.dataset.name, data.partition.name):
        if registry.file_of(name):
            raise ConfigError(f"'{name}': is a file of this machine; nodes need a plugin that is installed there")
    known = ("out", "resume", "timeout", "wait")
    given = {name: settings[name] for name in known if name in settings}
    tables = {
        "project": {"name": "fedsim-run", "version": "1.0.0", "description": experiment.name, "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedsim",
                    "components": {"serverapp": "server.app:app", "clientapp": "clients.app:app"},
                    "config": {"experiment": tomli_w.dumps(resolved)} | given,
                }
            }
        },
    }
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_bytes(tomli_w.dumps(tables).encode())
    (folder / "README.md").write_text(f"The experiment {experiment.name}, as a Flower app.\n")
    return folder


def submit(app: Path, home: Path, out: Path, echo: IO[str] | None = None) -> dict[str, Any]:
    """Hand an app to the SuperLink, follow its log, and return the run's summary. ``FedsimError`` where it failed."""
    call = [str(Path(sys.executable).parent / "flwr"), "run", str(app), CONNECTION, "--stream"]
    summary = out / "summary.json"
    before = summary.stat().st_mtime_ns if summary.exists() else 0
    lines: list[str] = []
    with subprocess.Popen(
        call,
        env=environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if echo and line.startswith(("round ", "run: ", "completed: ", "stopped: ")):  # an error is raised
                    echo.write(line)
                    echo.flush()
        except BaseException:
            process.terminate()
            raise
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    if not summary.exists() or summary.stat().st_mtime_ns == before:
        if not said and any((out / "checkpoint").glob("round-*")):
            said = "the SuperLink went away; the last checkpoint stands, and --resume goes on from it"
        raise FedsimError(said or f"the run did not start: {last_line(chr(10).join(lines))}")
    found: dict[str, Any] = json.loads(summary.read_bytes())
    if found["status"] == "failed":
        raise FedsimError(said or str(found.get("error")))
    return found


def last_line(text: str) -> str:
    """What was said last, without the frames that Flower draws."""
    words = (line.strip(" │╭╮╰╯─") for line in reversed(text.splitlines()))
    return next((line for line in words if line), "nothing was said")


def _main(args: list[str]) -> None:
    """What containers call. A container has what it may know in ``CERTS`` and keeps what it must in ``STATE``."""
    verb, *rest = args
    home, address = Path(os.environ.get("FLWR_HOME", STATE / "flwr")), os.environ.get("FEDSIM_SUPERLINK", "")
    if verb == "certificates":  # NODES HOST…: one folder for each container
        certificates.make(CERTS, int(rest[0]), tuple(rest[1:]))
    elif verb == "superlink":
        _become(superlink(CERTS, "0.0.0.0", 8000, STATE / "link.db"))
    elif verb == "register":  # NODES
        connection(home, address, CERTS / "ca.crt")
        register(home, CERTS, range(int(rest[0])))
    elif verb == "serverapp":
        connection(home, address, CERTS / "ca.crt")  # for submit
        _become([*executor(CERTS, address), "--health-server-address", "127.0.0.1:9193"])
    elif verb == "supernode":  # K NODES
        node = int(rest[0])
        certificates.own(STATE / "own")
        node_config = f'partition-id={node} num-partitions={int(rest[1])} state="{STATE}"'
        _become(supernode(CERTS, STATE / "own", address, RUNTIME + node, node_config))
    elif verb == "clientapp":  # K
        call = executor(STATE / "own", f"127.0.0.1:{RUNTIME + int(rest[0])}")
        _become([*call, "--health-server-address", f"127.0.0.1:{RUNTIME + 100 + int(rest[0])}"])
    elif verb == "ray":
        if len(os.environ.get("RAY_AUTH_TOKEN", "")) < 32:
            raise SystemExit("error: RAY_AUTH_TOKEN: must be a secret of 32 characters or more: openssl rand -hex 32")
        Path.home().joinpath(offline.CLUSTER_FILE).write_text(offline.CLUSTER)
        _become(["ray", "start", "--block", "--disable-usage-stats", *rest])
    elif verb == "submit":  # the experiment comes from stdin
        given = json.load(sys.stdin)
        app = write_app(home / "app", config.parse(tomllib.loads(given["experiment"])), given["settings"])
        submit(app, home, Path(given["settings"]["out"]), sys.stdout)
    else:
        raise SystemExit(f"unknown: {verb}")


def _become(call: list[str]) -> None:
    os.execvp(call[0], call)


if __name__ == "__main__":
    try:
        _main(sys.argv[1:])
    except FedsimError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
