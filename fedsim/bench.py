"""``fedsim bench``: how fast the engine is here, against a bare loop and against peers.

What is compared is *steady CPU seconds a round*: those of the whole process tree from the end of the first round to
the end of the last, divided by the rounds between. They depend little on what else the machine does; wall time does.
Every run is a process of its own; arms take turns, so that a busy minute hits all of them; medians and ratios are taken
over turns. The first round, the start and the peak memory are told apart. Losses are shown like wins.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedsim import files
from fedsim.benches import gpu, lora, proc
from fedsim.errors import ConfigError, FedsimError, did_you_mean

HERE = Path(__file__).parent / "benches"
TIMEOUT = 1800.0


class Arm(NamedTuple):
    """One way to run a workload. ``overrides`` are those of the experiment; ``script`` is a peer's."""

    name: str
    overrides: tuple[str, ...] = ()
    script: str | None = None


class Workload(NamedTuple):
    """An experiment, the arms that are measured on it, and what is asked of them."""

    name: str
    title: str
    experiment: Mapping[str, Any]
    arms: tuple[Arm, ...]
    peers: tuple[str, ...] = ()
    reference: str = ""  # the arm that ratios are taken over; the first one where there is none
    clock: Literal["cpu", "wall"] = "cpu"  # of which seconds


class Figures(NamedTuple):
    """What one run took."""

    arm: str
    cpu_round: float
    wall_round: float
    start_seconds: float  # from the start of the process to the end of round 1
    peak_mb: float
    accuracy: float | None


class Edit(NamedTuple):
    """A change to one installed file of a peer, for a Python older than it asks for."""

    file: str  # below site-packages
    old: str
    new: str


class Peer(NamedTuple):
    """A peer's own environment: what is installed into it, with ``--no-deps``; torch is always ours."""

    script: str
    install: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = ()


# blazefl asks for Python 3.14, and uses of it annotations that nobody evaluates and the brackets of generic functions.
LATER = "from __future__ import annotations\n"
BACKPORT = (
    Edit("blazefl/core/utils.py", "from copy import copy\n", f"{LATER}from copy import copy\n"),
    Edit("blazefl/core/utils.py", "def process_tensors_in_object[T](", "def process_tensors_in_object("),
    Edit("blazefl/core/utils.py", "def reconstruct_from_shared_memory[T](", "def reconstruct_from_shared_memory("),
    Edit("blazefl/reproducibility/snapshot.py", "import os\n", f"{LATER}import os\n"),
)
FLUKE = ("fluke-fl==0.8.1", "cerberus==1.3.8", "diskcache==5.6.3", "omegaconf==2.4.0", "psutil==7.2.2")
METRICS = ("torchmetrics==1.9.0", "lightning-utilities==0.15.3")
PEERS = {
    "flwr": Peer("peer_flwr.py"),
    "pfl": Peer("peer_pfl.py", ("pfl==0.6.0", "prv-accountant==0.2.0", "multiprocess==0.70.19", "dill==0.4.1")),
    "fluke": Peer("peer_fluke.py", (*FLUKE, *METRICS)),
    "blazefl": Peer("peer_blazefl.py", ("blazefl==3.0.0",), BACKPORT),
}

FEMNIST_LIKE = {"name": "dirichlet", "clients": 1000, "alpha": 0.3}
CNN = {"model": "cnn", "channels": [16, 32], "hidden": 64, "padding": "valid"}
MLP = {"model": "mlp", "hidden": [128]}
OURS, PLAIN, LOOP = Arm("fedsim"), Arm("fedsim, one by one", ("engine.execution=plain",)), Arm("plain loop")
RAY = Arm("fedsim, Ray 2", ("engine.kind=ray", "engine.workers=2"))


def workloads(data: str) -> dict[str, Workload]:
    """All of them, on this data set."""

    def experiment(
        task: Mapping[str, Any], partition: Mapping[str, Any], rounds: int, **strategy: Any
    ) -> dict[str, Any]:
        return {
            "name": "bench",
            "seed": 1,
            "rounds": rounds,
            "data": {"name": data, "partition": dict(partition)},
            "task": dict(task),
            "strategy": {"name": "fedavg", "lr": 0.05, "epochs": 1} | strategy,
        }

    def populated(clients: int) -> dict[str, Any]:
        return {"name": "sampled", "clients": clients, "size": 20}

    def echo(task: Mapping[str, Any], partition: Mapping[str, Any], cohort: int) -> dict[str, Any]:
        out = experiment(task, partition, 10)
        out["strategy"] = {"name": "fedsim.benches.plugins:echo", "cohort": cohort}
        return out

    cross_device: dict[str, Any] = {"cohort": 100, "batch_size": 10}
    silo = experiment(CNN, {"name": "iid", "clients": 10}, 3, cohort=10, batch_size=32)
    small = experiment(MLP, populated(1000), 20, cohort=50, batch_size=10)
    populations = (1000, 10_000, 100_000, 1_000_000)
    megabytes = (0.1, 1.0, 10.0, 44.0)
    remembering = experiment(
        {"model": "mlp", "hidden": [32]}, populated(100), 2, name="hyperfl", epochs=2, hidden=4, embedding=4096
    )
    remembering["engine"] = {"execution": "batched"}
    resident = ((100, 16), (1000, 16), (10_000, 16), (10_000, 1024))

    def sized(mb: float) -> Mapping[str, Any]:
        return {"model": "fedsim.benches.plugins:sized", "megabytes": mb}

    found = [
        Workload(
            "w1",
            "W1: CNN, 100 of 1000 clients, Dirichlet(0.3), batch 10",
            experiment(CNN, FEMNIST_LIKE, 10, **cross_device),
            (OURS, PLAIN, LOOP, RAY),
            tuple(PEERS),
            LOOP.name,
        ),
        Workload(
            "w2",
            "W2: MLP, 100 of 1000 clients, Dirichlet(0.3), batch 10",
            experiment(MLP, FEMNIST_LIKE, 10, **cross_device),
            (OURS, PLAIN, LOOP, RAY),
            tuple(PEERS),
            LOOP.name,
        ),
        Workload(
            "w3",
            "W3: CNN, 10 clients of 6000 examples, batch 32",
            silo,
            (OURS, PLAIN, LOOP, RAY),
            tuple(PEERS),
            LOOP.name,
        ),
        Workload(
            "noop",
            "no-op: 100 of 1000 clients send an MLP back",
            echo(MLP, populated(1000), 100),
            (OURS, RAY),
            ("flwr",),
        ),
        Workload(
            "population",
            "MLP, 50 clients of 20 examples out of 1e3 … 1e6",
            small,
            tuple(Arm(f"{n:.0e} clients", (f"data.partition.clients={n}",)) for n in populations),
        ),
        Workload(
            "size",
            "50 no-op clients, 0.1 … 44 MB of parameters",
            echo(sized(0.1), populated(1000), 50),
            tuple(Arm(f"{mb:g} MB", (f"task.megabytes={mb}",)) for mb in megabytes),
        ),
        Workload(
            "memory",
            "HyperFL, all clients in both rounds, 18 kB remembered by each: 16 MB or 1 GB of that in the process",
            remembering,
            tuple(
                Arm(
                    f"{n:.0e} clients, {mb} MB",
                    (f"data.partition.clients={n}", f"strategy.cohort={n}", f"engine.memory_mb={mb}"),
                )
                for n, mb in resident
            ),
        ),
        Workload(
            "dp",
            "DP-SGD, MLP, 20 clients of 60 examples, batch 10: ours, Opacus's engine, and without privacy",
            experiment(MLP, populated(1000) | {"size": 60}, 4, cohort=20, batch_size=10)
            | {"privacy": {"mode": "example", "noise_multiplier": 1.0, "delta": 1e-6, "max_grad_norm": 1.0}},
            (OURS, Arm("Opacus's engine"), Arm("without privacy", ("-privacy",))),
            (),
            "Opacus's engine",
        ),
        Workload(
            "dp_cnn",
            "DP-SGD, CNN, 20 clients of 60 examples, batch 10: ours, Opacus's engine, and without privacy",
            experiment(CNN, populated(1000) | {"size": 60}, 4, cohort=20, batch_size=10)
            | {"privacy": {"mode": "example", "noise_multiplier": 1.0, "delta": 1e-6, "max_grad_norm": 1.0}},
            (OURS, Arm("Opacus's engine"), Arm("without privacy", ("-privacy",))),
            (),
            "Opacus's engine",
        ),
    ]
    steps = ("fedsim", "scikit-learn", "kernel given", "kernel given, at once")
    found.append(
        Workload(
            "fzoos",
            "FZooS beside its queries: ten local steps, d = 300, 500 points, 10,000 features",
            {},
            tuple(Arm(name, script="fzoos.py") for name in steps),
            (),
            "scikit-learn",
        )
    )
    found += [
        Workload(s.name, s.title, s.experiment, tuple(Arm(*arm) for arm in s.arms), clock=s.clock)
        for s in (*lora.specs(), *gpu.specs(dict(found[0].experiment)))
    ]
    return {w.name: w for w in found}


def run(name: str | None, turns: int, against: Sequence[str] = (), out: Path = Path("bench")) -> None:
    """Measure one workload, or all; print a table for each and write ``out/NAME.json``.

    Raises ``ConfigError`` for an unknown name, ``FedsimError`` where an arm of ours fails. A peer that fails is told.
    """
    data = _data_set()
    known = workloads(data)
    if name is not None and name not in known:
        raise ConfigError(f"'{name}' is not a benchmark{did_you_mean(name, list(known))} (known: {', '.join(known)})")
    for peer in against:
        if peer not in PEERS:
            raise ConfigError(
                f"--against: no peer '{peer}'{did_you_mean(peer, list(PEERS))} (known: {', '.join(PEERS)})"
            )
    pythons = {peer: environment(peer) for peer in against}
    for workload in [known[name]] if name else known.values():
        runs = measure(workload, turns, {peer: pythons[peer] for peer in workload.peers if peer in against})
        print(table(workload, runs), flush=True)
        write(workload, runs, data, out)


def _data_set() -> str:
    from fedsim.data import fetch

    try:
        fetch.load("fashion_mnist")
    except FedsimError:
        print("fashion_mnist is not here (fedsim data get fashion_mnist): measuring on mnist_small", file=sys.stderr)
        return "mnist_small"
    return "fashion_mnist"


def environment(peer: str) -> str:
    """The interpreter of a peer's own environment, made where there is none; its torch is this one's."""
    wanted = PEERS[peer]
    if not wanted.install:
        return sys.executable
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "fedsim" / "bench" / "-".join([peer, *(p.partition("==")[2] for p in wanted.install)])
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"{peer}: installing {', '.join(wanted.install)} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ours = next(path for path in map(Path, sys.path) if path.name == "site-packages")
        theirs = folder / "lib" / version / "site-packages"
        (theirs / "ours.pth").write_text(f"{ours}\n")
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        install += ["--ignore-requires-python"] * bool(wanted.edits)
        done = subprocess.run([*install, *wanted.install], capture_output=True, text=True, check=False)
        if done.returncode:
            raise FedsimError(f"{peer} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        edit(theirs, wanted.edits)
        (folder / "ready").touch()
    return str(python)


def edit(packages: Path, edits: Sequence[Edit]) -> None:
    """Change installed files. Raises ``FedsimError`` where a text to be replaced does not stand there just once."""
    for file, old, new in edits:
        text = (packages / file).read_text()
        if (n := text.count(old)) != 1:
            raise FedsimError(f"{file} has {old!r} {n} times, not once: our edits are for another release")
        (packages / file).write_text(text.replace(old, new))


def measure(workload: Workload, turns: int, peers: Mapping[str, str]) -> list[Figures]:
    """All arms in turn, ``turns`` times."""
    runs: list[Figures] = []
    with tempfile.TemporaryDirectory(prefix="fedsim-bench-") as scratch:
        folder = Path(scratch)
        arms = [*workload.arms, *(Arm(peer, script=PEERS[peer].script) for peer in peers)]
        if peers:
            _child(workload, Arm("export"), folder, sys.executable)
        for turn in range(turns):
            # Every other turn backwards, so that nobody always follows the same neighbour.
            for arm in arms if turn % 2 == 0 else arms[::-1]:
                try:
                    figures = _child(workload, arm, folder, peers.get(arm.name, sys.executable))
                except FedsimError as e:
                    if arm.script is None:
                        raise
                    print(f"{arm.name} failed: {e}", file=sys.stderr)
                    continue
                if figures:
                    runs.append(figures)
                    print(
                        f"  {workload.name} {turn + 1}/{turns} {arm.name}: {figures.cpu_round:.4f} CPU s a round",
                        file=sys.stderr,
                    )
    return runs


def _child(workload: Workload, arm: Arm, folder: Path, python: str) -> Figures | None:
    """One run in a process of its own."""
    from fedsim import config

    tables = config.override(workload.experiment, [o for o in arm.overrides if not o.startswith("-")])
    tables = {key: value for key, value in tables.items() if f"-{key}" not in arm.overrides}
    kinds = {"export": "export", "plain loop": "loop", "Opacus's engine": "opacus"}
    kind = kinds.get(arm.name, "ours") if arm.script is None else f"{arm.name}-{workload.name}"
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"arm": kind, "world": str(folder), "experiment": tables}))
    command = [python, "-m", "fedsim.benches.arms"] if arm.script is None else [python, str(HERE / arm.script)]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            [*command, str(spec)], stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | quiet
        )
        peak = proc.Peak(child.pid)
        killer = threading.Timer(TIMEOUT, child.kill)
        killer.start()
        assert child.stdout is not None
        with child.stdout:
            events = [json.loads(line) for line in child.stdout if line.startswith('{"event"')]
        code = child.wait()
        killer.cancel()
        memory = peak.stop()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    rounds = [e for e in events if e["event"] == "round"]
    if code or not events or events[-1]["event"] != "end":
        raise FedsimError(f"{workload.name}: {arm.name} failed: {said[-1] if said else f'exit code {code}'}")
    if not rounds:
        return None
    steady = len(rounds) - 1
    first, last = rounds[0], rounds[-1]
    return Figures(
        arm.name,
        (last["cpu"] - first["cpu"]) / steady,
        statistics.median(b["time"] - a["time"] for a, b in pairwise(rounds)),
        first["time"] - began,
        memory / 1e6,
        events[-1]["accuracy"],
    )


def summary(workload: Workload, runs: Sequence[Figures]) -> list[dict[str, Any]]:
    """Medians over turns, an object an arm, with the ratio of CPU to the reference's."""

    def median(mine: Sequence[Figures], of: Callable[[Figures], float]) -> float:
        return statistics.median(of(f) for f in mine)

    names = list(dict.fromkeys(f.arm for f in runs))
    by = {name: [f for f in runs if f.arm == name] for name in names}
    reference = workload.reference if workload.reference in by else names[0]

    def seconds(f: Figures) -> float:
        return f.cpu_round if workload.clock == "cpu" else f.wall_round

    base = median(by[reference], seconds)
    rows = []
    for name in names:
        mine = by[name]
        cpu, taken = median(mine, lambda f: f.cpu_round), median(mine, seconds)
        accuracies = [f.accuracy for f in mine if f.accuracy is not None]
        rows.append(
            {
                "arm": name,
                "cpu_seconds_a_round": cpu,
                "range": [min(f.cpu_round for f in mine), max(f.cpu_round for f in mine)],
                "faster_than_reference": base / taken if taken else None,
                "wall_seconds_a_round": median(mine, lambda f: f.wall_round),
                "start_to_round_1_seconds": median(mine, lambda f: f.start_seconds),
                "peak_mb": median(mine, lambda f: f.peak_mb),
                "accuracy": statistics.median(accuracies) if accuracies else None,
                "runs": len(mine),
            }
        )
    return rows


def table(workload: Workload, runs: Sequence[Figures]) -> str:
    """The medians as a Markdown table."""
    rows = summary(workload, runs)
    reference, by = workload.reference or rows[0]["arm"], "" if workload.clock == "cpu" else " (wall)"
    out = [
        f"\n### {workload.title}\n",
        f"| | CPU s a round (range) | × {reference}{by} | wall s a round | start to round 1, s | peak MB | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        low, high = row["range"]
        ratio = row["faster_than_reference"]
        out.append(
            f"| {row['arm']} | {row['cpu_seconds_a_round']:.4f} ({low:.4f}–{high:.4f}) |"
            f" {'' if ratio is None else f'{ratio:.2f}'} | {row['wall_seconds_a_round']:.4f} |"
            f" {row['start_to_round_1_seconds']:.1f} | {row['peak_mb']:.0f} | {accuracy} |"
        )
    return "\n".join(out)


def write(workload: Workload, runs: Sequence[Figures], data: str, out: Path) -> None:
    """``out/NAME.json``: the machine, the medians, and every run."""
    from importlib.metadata import version

    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    machine: dict[str, Any] = {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    if workload.clock == "wall":
        import torch

        machine["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "name": workload.name,
        "title": workload.title,
        "data": data,
        "machine": machine,
        "load": os.getloadavg(),
        "medians": summary(workload, runs),
        "runs": [f._asdict() for f in runs],
    }
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / f"{workload.name}.json", json.dumps(result, indent=1).encode())
