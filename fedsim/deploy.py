"""``fedsim deploy``: a SuperLink and SuperNodes, with TLS and node authentication, and an experiment run over them.

Two ways to the same thing: containers (``docker-compose.yml``), or, with ``--local``, processes of this machine on
loopback. Certificates and node keys are made on first use; a node whose key is not registered is refused.
"""

import datetime
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import tomli_w

from fedsim import config, files
from fedsim.config import Experiment
from fedsim.errors import ConfigError, FedsimError
from fedsim.offline import QUIET

CONNECTION = "deployment"
PIDS, PLACE = "processes.json", "place.json"
START = 90.0  # seconds for a SuperLink to answer
YEARS = 2


def certificates(folder: Path, nodes: int, hosts: tuple[str, ...] = ("localhost",)) -> None:
    """A certificate authority, a server certificate for ``hosts`` and 127.0.0.1, and a key pair for each node.

    What is there already stays, so that nodes can be added; private keys are 0600.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    now = datetime.datetime.now(datetime.UTC)
    end = now + datetime.timedelta(days=365 * YEARS)

    def private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
        form = serialization.PrivateFormat
        kind = form.OpenSSH if path.suffix == "" else form.PKCS8
        files.write(path, key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()), mode=0o600)

    def named(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    if not (folder / "ca.crt").exists():
        ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
        usage = dict.fromkeys(
            (
                "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                "encipher_only", "decipher_only", "key_cert_sign", "crl_sign",
            ),
            False,
        )  # fmt: skip

        def certificate(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
            subject = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named("fedsim deployment"))
            subject = subject.public_key(key.public_key()).serial_number(x509.random_serial_number())
            subject = subject.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(end)
            issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())
            return subject.add_extension(issuer, critical=False).add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )

        root = certificate("fedsim deployment", ca).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        signing = usage | {"key_cert_sign": True, "crl_sign": True}
        root_signed = root.add_extension(x509.KeyUsage(**signing), critical=True).sign(ca, hashes.SHA384())
        names: list[x509.GeneralName] = [x509.DNSName(host) for host in hosts]
        names.append(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        leaf = certificate(hosts[0], server).add_extension(x509.BasicConstraints(False, None), critical=True)
        leaf = leaf.add_extension(x509.SubjectAlternativeName(names), critical=False)
        leaf = leaf.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        leaf_signed = leaf.sign(ca, hashes.SHA384())
        private(folder / "server.key", server)
        files.write(folder / "server.pem", leaf_signed.public_bytes(serialization.Encoding.PEM))
        # The authority's key is used once and not kept: nobody can sign a second server.
        files.write(folder / "ca.crt", root_signed.public_bytes(serialization.Encoding.PEM))
    for node in range(nodes):
        if not (folder / f"node-{node}.pub").exists():
            key = ec.generate_private_key(ec.SECP384R1())
            private(folder / f"node-{node}", key)
            public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
            files.write(folder / f"node-{node}.pub", public)


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
    threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | QUIET | threads | {"FLWR_HOME": str(home.absolute()), "PATH": path}


class Local:
    """A deployment of processes on loopback, described by a folder. ``up`` and ``down`` may be different commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.certs, self.home = self.folder / "certs", self.folder / "home"

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
        certificates(self.certs, nodes)
        place = {"port": free_port(), "nodes": nodes, "ports": [free_port() for _ in range(nodes)]}
        files.write(self.folder / PLACE, json.dumps(place).encode())
        connection(self.home, f"127.0.0.1:{place['port']}", self.certs / "ca.crt")
        try:
            self.start_link()
            say(f"SuperLink on https://127.0.0.1:{place['port']}")
            register(self.home, self.certs, range(nodes))
            for node in range(nodes):
                self.start_node(node)
            say(f"{nodes} SuperNodes; logs in {self.folder / 'logs'}")
        except BaseException:
            self.down()
            raise

    def start_link(self) -> None:
        """Start the SuperLink on the database that is there, and wait until it answers."""
        port = self.place["port"]
        call = [
            "flower-superlink", "--host", "127.0.0.1", "--port", str(port), "--database", str(self.folder / "link.db"),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation", *self._tls(),
        ]  # fmt: skip
        pid = self.spawn("superlink", call, self.home)
        wait_for(f"https://127.0.0.1:{port}/health", self.certs / "ca.crt", lambda: alive(pid))

    def start_node(self, node: int, key: Path | None = None, ca: Path | None = None, settings: str = "") -> int:
        """Start the SuperNode of client ``node``; returns its process id."""
        place = self.place
        state = self.folder / "nodes" / str(node)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        node_config = f'partition-id={node} num-partitions={place["nodes"]} state="{state}" {settings}'
        call = [
            "flower-supernode", "--superlink", f"127.0.0.1:{place['port']}", "--root-certificates",
            str(ca or self.certs / "ca.crt"), "--host", "127.0.0.1", "--port", str(place["ports"][node]),
            "--auth-supernode-private-key", str(key or self.certs / f"node-{node}"),
            "--node-config", node_config.strip(), *self._tls(),
        ]  # fmt: skip
        return self.spawn(f"supernode-{node}", call, state)

    def _tls(self) -> list[str]:
        at = self.certs
        given = {"certfile": at / "server.pem", "keyfile": at / "server.key", "ca-certfile": at / "ca.crt"}
        return [part for name, path in given.items() for part in (f"--ssl-{name}", str(path))]

    def spawn(self, name: str, call: list[str], home: Path) -> int:
        """Start a process in a session of its own, with its output in ``logs``, and note it."""
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(Path(sys.executable).parent / call[0]), *call[1:]],
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

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a process and to what it has started."""
        pid = self.running().get(name)
        if pid is not None:
            os.killpg(pid, number)

    def down(self, patience: float = 10.0) -> None:
        """End every process of the deployment, nodes first; those that stay are killed."""
        names = sorted(self.running(), reverse=True)
        groups = [self.running()[name] for name in names]
        for name in names:
            self.kill(name, signal.SIGTERM)
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

    def _call(self, *args: str, **kwargs: Any) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*self.engine, *args], cwd=self.project, text=True, check=False, **kwargs)

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
        """Run an experiment over the nodes: inside at the SuperLink, with its folder copied out to ``out``."""
        echo = settings.pop("echo", None)
        inside = f"/state/runs/{out.name}"
        sent = json.dumps(
            {"experiment": tomli_w.dumps(config.dump(experiment)), "settings": {"out": inside} | settings}
        )
        call = ["exec", "-T", "superlink", "python", "-m", "fedsim.deploy", "submit"]
        done = self._call(*call, input=sent, stdout=None if echo else subprocess.PIPE)
        out.parent.mkdir(parents=True, exist_ok=True)
        self._call("cp", f"superlink:{inside}", str(out), capture_output=True)
        if done.returncode:
            raise FedsimError("the run failed; what it said is above")
        return dict(json.loads((out / "summary.json").read_bytes()))


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


@contextmanager
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
    """Let these nodes in: the SuperLink refuses every other."""
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
    for name in (experiment.strategy.name, experiment.task.model, experiment.data.dataset.name):
        if name.endswith(".py"):
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
                if echo and line.startswith(("round ", "run: ", "completed: ", "error: ", "stopped: ")):
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
    """What containers call: ``certificates FOLDER NODES HOST…``, ``register NODES``, ``node K NODES``, ``ray …``, and
    ``submit``, which reads its experiment from stdin."""
    if args[0] == "certificates":
        certificates(Path(args[1]), int(args[2]), tuple(args[3:]))
    elif args[0] == "register":
        home, certs = Path(os.environ["FLWR_HOME"]), Path(os.environ["FEDSIM_CERTS"])
        connection(home, os.environ["FEDSIM_SUPERLINK"], certs / "ca.crt")
        register(home, certs, range(int(args[1])))
    elif args[0] == "node":
        certs, state = Path(os.environ["FEDSIM_CERTS"]), Path("/state")
        call = [
            "flower-supernode", "--superlink", os.environ["FEDSIM_SUPERLINK"], "--host", "127.0.0.1",
            "--root-certificates", str(certs / "ca.crt"),
            "--auth-supernode-private-key", str(certs / f"node-{int(args[1])}"),
            "--ssl-certfile", str(certs / "server.pem"),
            "--ssl-keyfile", str(certs / "server.key"),
            "--ssl-ca-certfile", str(certs / "ca.crt"),
            "--node-config", f'partition-id={int(args[1])} num-partitions={int(args[2])} state="{state}"',
        ]  # fmt: skip
        os.execvp(call[0], call)
    elif args[0] == "ray":
        if len(os.environ.get("RAY_AUTH_TOKEN", "")) < 32:
            raise SystemExit("error: RAY_AUTH_TOKEN: must be a secret of 32 characters or more: openssl rand -hex 32")
        os.execvp("ray", ["ray", "start", "--block", "--disable-usage-stats", *args[1:]])
    elif args[0] == "submit":
        import tomllib

        given = json.load(sys.stdin)
        home, certs = Path(os.environ["FLWR_HOME"]), Path(os.environ["FEDSIM_CERTS"])
        connection(home, os.environ["FEDSIM_SUPERLINK"], certs / "ca.crt")
        experiment = config.parse(tomllib.loads(given["experiment"]))
        app = write_app(home / "app", experiment, given["settings"])
        try:
            submit(app, home, Path(given["settings"]["out"]), sys.stdout)
        except FedsimError as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(e.exit_code)
    else:
        raise SystemExit(f"unknown: {args[0]}")


if __name__ == "__main__":
    _main(sys.argv[1:])
