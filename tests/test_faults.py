"""What goes wrong is named, stopped or dropped by the policy, and never silent."""

import errno
import os
import re
import resource
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runs
from fedsim import checkpoint
from fedsim import run as running
from fedsim.checkpoint import Store
from fedsim.errors import ClientError, ConfigError, FedsimError, ResumeError
from fedsim.memory import Memory
from fedsim.run import run


def store(folder: Path, rounds: int, keep: int = 2) -> Store:
    """Some checkpoints: a state that tells its round, and two clients of which one changes each round."""
    made, memory = Store(folder, keep), Memory()
    for number in range(1, rounds + 1):
        memory.update({number % 2: {"w": {"x": torch.full((3,), float(number))}}})
        made.save(number, {"seed": 1}, {"w": torch.full((4,), float(number))}, memory, {})
    return made


def loaded(folder: Path) -> tuple[int, float, dict[int, float]]:
    found = Store(folder, 2).load({})
    return found.round, float(found.state["w"][0]), {c: float(m["w"]["x"][0]) for c, m in found.memory.items()}


WHOLE = {4: (4, 4.0, {0: 4.0, 1: 3.0}), 3: (3, 3.0, {0: 2.0, 1: 3.0})}


# Damage


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flipped(data: bytes, at: float = 0.5) -> bytes:
    i = int(at * (len(data) - 1))
    return data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": truncated,
    "empty": lambda data: b"",
    "first byte": lambda data: flipped(data, 0.0),
    "early": lambda data: flipped(data, 0.2),
    "middle": flipped,
    "late": lambda data: flipped(data, 0.8),
    "last byte": lambda data: flipped(data, 1.0),
    "zeros": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"\0",
    "foreign": lambda data: b"\x80\x04\x95pickle",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file", ["round-00000004/manifest.json", "round-00000004/state.safetensors", "clients/0-4.safetensors"]
)
def test_damaged_checkpoint(tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """The older checkpoint is used, and the damage is said."""
    store(tmp_path, 4)
    assert loaded(tmp_path) == WHOLE[4]
    path = tmp_path / file
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert loaded(tmp_path) == WHOLE[3]
    assert str(path) in caplog.text and "older" in caplog.text


@pytest.mark.parametrize(
    "file", ["round-00000004/manifest.json", "round-00000004/state.safetensors", "clients/0-4.safetensors"]
)
def test_missing_file(tmp_path: Path, file: str) -> None:
    store(tmp_path, 4)
    (tmp_path / file).unlink()
    assert loaded(tmp_path) == WHOLE[3]


def test_all_checkpoints_damaged(tmp_path: Path) -> None:
    store(tmp_path, 4)
    for path in tmp_path.glob("round-*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ResumeError, match="damaged") as e:
        loaded(tmp_path)
    assert e.value.exit_code == 2 and len(str(e.value).splitlines()) == 1


def test_checkpoint_of_a_later_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 3)
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    store(tmp_path, 4, keep=1)
    monkeypatch.undo()
    with pytest.raises(ResumeError, match=f"written in format {checkpoint.FORMAT + 1}, this version reads"):
        loaded(tmp_path)


def test_a_damaged_newer_checkpoint_is_no_obstacle(tmp_path: Path) -> None:
    """It is overwritten when its round comes again, and never counts among those that are kept."""
    made = store(tmp_path, 4)
    (tmp_path / "round-00000004/manifest.json").write_bytes(b"{")
    found = made.load({})
    memory = Memory(found.memory)
    memory.changed.clear()
    memory.update({0: {"w": {"x": torch.full((3,), 4.0)}}})
    made.save(4, {}, {"w": torch.full((4,), 4.0)}, memory, {})
    assert loaded(tmp_path) == WHOLE[4]


def test_run_resumes_from_the_older_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    digest = run(runs.experiment("rounds=5"), tmp_path / "straight")["params_sha256"]
    run(runs.experiment("rounds=3"), tmp_path / "out")
    path = tmp_path / "out" / "checkpoint" / "round-00000003" / "state.safetensors"
    path.write_bytes(flipped(path.read_bytes()))
    assert run(runs.experiment("rounds=5"), tmp_path / "out", resume=True)["params_sha256"] == digest
    assert "trying an older checkpoint" in caplog.text
    assert runs.lines(tmp_path / "out") == runs.lines(tmp_path / "straight")


# Crashes and full disks


class Crash(BaseException):
    """The process dies here."""


@pytest.mark.parametrize("kind", ["crash", "no space", "input/output error"])
def test_every_point_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Fail at each call by which a checkpoint is written: what is found afterwards is the old one or the new one."""
    error = {"crash": None, "no space": errno.ENOSPC, "input/output error": errno.EIO}[kind]
    places = [
        (os, "open"),
        (os, "fsync"),
        (os, "replace"),
        (os, "rename"),
        (os, "mkdir"),
        (os, "unlink"),
        (os, "rmdir"),
    ]
    points, k = 0, 0
    while True:
        folder = tmp_path / str(k)
        made = store(folder, 3)
        memory = Memory(made.load({}).memory)
        memory.changed.clear()
        memory.update({0: {"w": {"x": torch.full((3,), 4.0)}}})
        calls = 0

        def tripped(true: Callable[..., Any], at: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > at:  # everything after a crash is dead as well; a full disk stays full
                    raise Crash if error is None else OSError(error, os.strerror(error))
                return true(*args, **kwargs)

            return call

        with monkeypatch.context() as m:
            for module, name in places:
                m.setattr(module, name, tripped(getattr(module, name), k))
            try:
                made.save(4, {"seed": 1}, {"w": torch.full((4,), 4.0)}, memory, {})
                done = True
            except (Crash, OSError):
                done = False
        found = loaded(folder)
        assert found in (WHOLE[3], WHOLE[4])
        if done:
            assert found == WHOLE[4]
            break
        points, k = points + 1, k + 1
    assert points >= 10, "the points of failure were not reached"


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """A limit on the size of files: the disk is full for whoever writes more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk(tmp_path: Path, small_files: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops with one line and exit code 1; the last good checkpoint stands, and the run goes on from it."""
    digest = run(runs.experiment("rounds=6"), tmp_path / "straight")["params_sha256"]
    out = tmp_path / "out"
    run(runs.experiment("rounds=3"), out)
    small_files(max(p.stat().st_size for p in out.rglob("*.safetensors")) - 1)
    with pytest.raises(FedsimError, match="round 4 cannot be written") as e:
        run(runs.experiment("rounds=6"), out, resume=True)
    assert e.value.exit_code == 1
    small_files(resource.RLIM_INFINITY)
    assert Store(out / "checkpoint", 2).peek()["rounds"] == 3
    assert run(runs.experiment("rounds=6"), out, resume=True)["params_sha256"] == digest


def test_real_full_disk(tmp_path: Path, small_files: Callable[[int], None]) -> None:
    """The same through the command, on a file system of its own where one can be mounted, else by a limit."""
    file = runs.write(tmp_path / "e.toml", "rounds=50", "task.model='mlp'")
    out = tmp_path / "out"
    answer = runs.command(
        "run", file, "--out", out, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    assert answer.code == 1, answer.err
    assert "Traceback" not in answer.err
    assert any(line.startswith("error: round 1 cannot be written") for line in answer.err.splitlines())


# Clients

ENGINES = [("plain", "fast"), ("batched", "fast"), ("plain", "messages")]


def spoiled(monkeypatch: pytest.MonkeyPatch, client: int, value: float) -> None:
    """One client's inputs are ``value`` (past the check of the data set, as a bug in a transform would do it)."""
    from fedsim import data

    true = data.federation

    def federation(*args: Any) -> Any:
        made = true(*args)
        made.dataset.train.x[np.asarray(made.partition[client])] = value
        return made

    monkeypatch.setattr(data, "federation", federation)


@pytest.mark.parametrize(("execution", "paths"), ENGINES)
@pytest.mark.parametrize("name", ["fedavg", "scaffold", "local", "flwr.serverapp.strategy:FedAvg"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float, execution: str, paths: str
) -> None:
    spoiled(monkeypatch, 7, value)
    settings = [
        f"strategy.name='{name}'",
        "strategy.cohort=12",
        f"engine.execution={execution}",
        f"engine.paths={paths}",
    ]
    with pytest.raises(ClientError, match=r"^client 7 failed in round 1 \(seed 3\): .*(NaN|nan|inf)") as e:
        run(runs.experiment(*settings), tmp_path / "raise")
    assert e.value.exit_code == 1
    assert runs.summary(tmp_path / "raise")["status"] == "failed"

    done = run(runs.experiment(*settings, "engine.on_error=drop"), tmp_path / "drop")
    assert done["status"] == "completed" and done["total_failures"] == 4
    for line in runs.lines(tmp_path / "drop"):
        assert [f["client"] for f in line["failures"]] == [7]
        assert line["clients"] == 11


def test_both_paths_drop_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping a client leaves the same bits on both paths, memories included."""
    spoiled(monkeypatch, 7, float("nan"))
    settings = ["strategy.cohort=12", "engine.on_error=drop", "engine.execution=plain"]
    done = [
        run(runs.experiment(*settings, f"engine.paths={p}"), tmp_path / p)["params_sha256"]
        for p in ("fast", "messages")
    ]
    assert done[0] == done[1]
    assert [[f["reason"] for f in line["failures"]] for line in runs.lines(tmp_path / "fast")] == [
        [f["reason"] for f in line["failures"]] for line in runs.lines(tmp_path / "messages")
    ]


@pytest.mark.parametrize("name", ["scaffold", "fzoos", "flwr.serverapp.strategy:FedAvg"])
@pytest.mark.parametrize("paths", ["fast", "messages"])
def test_everybody_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, paths: str) -> None:
    """A round in which nobody is left ends the run, whatever the policy, with the first reason."""
    from fedsim import data

    true = data.federation

    def federation(*args: Any) -> Any:
        made = true(*args)
        made.dataset.train.x.fill_(float("nan"))
        return made

    monkeypatch.setattr(data, "federation", federation)
    setup = runs.experiment(f"strategy={{name='{name}',cohort=4}}", "engine.on_error=drop", f"engine.paths={paths}")
    with pytest.raises(
        FedsimError, match=r"^all clients of round 1 failed; the first of them, client \d+: .*(NaN|nan)"
    ) as e:
        run(setup, tmp_path / "out")
    assert e.value.exit_code == 1
    assert runs.summary(tmp_path / "out")["status"] == "failed" and runs.lines(tmp_path / "out") == []


def test_everybody_fails_under_client_level_privacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was there is nobody's business: a round of nobody is noise, and a round all the same."""
    from fedsim import block

    def fail(*args: Any) -> Any:
        raise RuntimeError("no luck")

    monkeypatch.setattr(block, "one", fail)
    setup = runs.experiment(
        "strategy={name='fedavg',cohort=4,weighting='uniform'}", "engine.on_error=drop", "engine.execution=plain",
        "data.holdout=0.0", "privacy={mode='client',clip=0.5,noise_multiplier=1.0,delta=1e-3}",
    )  # fmt: skip
    assert run(setup, tmp_path / "out")["status"] == "completed"


# What fails by chance


@pytest.mark.parametrize("name", ["scaffold", "flwr.serverapp.strategy:FedAvg"])
@pytest.mark.parametrize(("execution", "paths"), ENGINES)
def test_retry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, execution: str, paths: str) -> None:
    """Work that fails once is done again, to the same bits; what fails twice ends the run."""
    from fedsim import block

    settings = [
        f"strategy.name='{name}'",
        "strategy.cohort=12",
        f"engine.execution={execution}",
        f"engine.paths={paths}",
    ]
    digest = run(runs.experiment(*settings), tmp_path / "straight")["params_sha256"]
    one, left = block.one, {7: 1}

    def out_of_memory(*args: Any) -> Any:
        raise MemoryError("for a moment")

    def unlucky(work: Any, federation: Any, guest: Any) -> Any:
        if left.get(guest.client, 0):
            left[guest.client] -= 1
            out_of_memory()
        return one(work, federation, guest)

    monkeypatch.setattr(block, "one", unlucky)
    if execution == "batched":
        monkeypatch.setattr(block, "stacked", out_of_memory)
    done = run(runs.experiment(*settings, "engine.on_error=retry"), tmp_path / "retry")
    assert left == {7: 0} and "failures" not in runs.lines(tmp_path / "retry")[0]
    if execution == "plain":
        assert done["params_sha256"] == digest
    left[7] = 2
    with pytest.raises(ClientError, match=r"^client 7 failed in round 1 \(seed 3\): MemoryError: for a moment"):
        run(runs.experiment(*settings, "engine.on_error=retry"), tmp_path / "twice")
    assert left == {7: 0}
    left[7] = 1
    with pytest.raises(ClientError, match=r"^client 7 failed in round 1"):
        run(runs.experiment(*settings), tmp_path / "raise")


MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = x.flatten(1)
        if self.training and x.shape[0] > 1 and {trouble}
        return self.linear(x)
"""


def test_client_that_raises_through_the_command(tmp_path: Path) -> None:
    """Exit code 1, one line that names client, round and seed, and how to go on; no traceback."""
    trouble = "x.sum() > 1e9: raise KeyError('broken transform')"
    (tmp_path / "mine.py").write_text(MODEL.replace("{trouble}", trouble.replace("> 1e9", "> 0")))
    file = runs.write(tmp_path / "e.toml", "task.model='mine:Model'", "engine.block=4")
    answer = runs.command("run", file, "--out", "out", cwd=tmp_path)
    assert answer.code == 1, answer.err
    assert "Traceback" not in answer.err
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(r"failed in round 1 \(seed 3\): KeyError: 'broken transform' \(mine.py:\d+\)$", errors[0])
    assert runs.summary(tmp_path / "out")["status"] == "failed"
    # Whoever wants to know more asks for it.
    answer = runs.command("--debug", "run", file, "--out", "again", cwd=tmp_path)
    assert answer.code == 1 and [line for line in answer.err.splitlines() if line.startswith("error: ")] == errors
    assert "Traceback" in answer.err and 'mine.py", line' in answer.err


# The server's half


@pytest.mark.parametrize("paths", ["fast", "messages"])
def test_sends_is_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: str) -> None:
    from strategies import fedavg

    build = fedavg.build
    monkeypatch.setattr(fedavg, "build", lambda *of: build(*of)._replace(sends=(frozenset({"x"}),)))
    sent = r"^the strategy's sends: must be what clients send in exchange 1, \['delta'\] \(got \['x'\]\)$"
    with pytest.raises(FedsimError, match=sent):
        run(runs.experiment("strategy={name='fedavg',cohort=4}", f"engine.paths={paths}"), tmp_path / "out")


def test_a_state_that_no_checkpoint_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from strategies import fedavg

    build = fedavg.build

    def counting(*of: Any) -> Any:
        made = build(*of)
        phase = made.phases[0]._replace(finish=lambda state, mean: state._replace(w=OrderedDict(state.w)))
        return made._replace(phases=(phase,))

    monkeypatch.setattr(fedavg, "build", counting)
    with pytest.raises(
        FedsimError, match=r"^strategy 'fedavg': its state of round 1: a collections\.OrderedDict cannot"
    ):
        run(runs.experiment("strategy={name='fedavg',cohort=4}"), tmp_path / "out")


BROKEN = """
from typing import NamedTuple
import torch
from clients.sgd import sgd
from fedsim import Phase, Strategy, tree
from server.reduce import weighted_mean
from strategies.fedavg import Config, State

class broken:
    '''Goes wrong in round 3.'''
    Config = Config

    @staticmethod
    def build(config, task):
        class Counted(NamedTuple):
            w: dict
            round: int

        def finish(state, mean):
            w = tree.add(state.w, mean.value["delta"])
            if state.round == 2:
                {trouble}
            return Counted(w, state.round + 1)

        phase = Phase(lambda s: {"params": s.w}, sgd(task, config), weighted_mean(), finish)
        return Strategy(lambda g: Counted(task.init(g), 0), (phase,), lambda s: s.w, (frozenset({"delta"}),))
"""

TROUBLES = {
    "raise ValueError('no luck\\nat all')": r"failed in round 3 on the server: ValueError: no luck \(mine.py:\d+\)",
    "w = {n: x * float('nan') for n, x in w.items()}": "made a model with NaN or Inf in round 3",
    "w = {n: x[:1] for n, x in w.items()}": "changed the shape or type of linear.bias, linear.weight in round 3",
    "w = {n: x.double() for n, x in w.items()}": "changed the shape or type of linear.bias, linear.weight in round 3",
    "return None": "failed in round 3 on the server: AttributeError",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_strategy_that_goes_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    """It is named with the round; what was saved is the round before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"mine{abs(hash(trouble))}"
    (tmp_path / f"{name}.py").write_text(BROKEN.replace("{trouble}", trouble))
    expected = TROUBLES[trouble].replace("mine", name)
    with pytest.raises(FedsimError, match=rf"^(the strategy|strategy '{name}:broken') {expected}") as e:
        run(runs.experiment(f"strategy.name='{name}:broken'", "rounds=5"), tmp_path / "out")
    assert e.value.exit_code == 1 and len(str(e.value).splitlines()) == 1
    assert len(runs.lines(tmp_path / "out")) == 2
    assert runs.summary(tmp_path / "out")["status"] == "failed"


def test_a_run_that_ended_while_another_was_built_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found an empty folder; the second one gets it when the first has finished, and must not begin over it."""
    out, build, setup = tmp_path / "out", running.build, runs.experiment("rounds=1")

    def slow(*args: Any) -> Any:
        monkeypatch.setattr(running, "build", build)
        running.run(setup, out)
        return build(*args)

    monkeypatch.setattr(running, "build", slow)
    with pytest.raises(ConfigError, match="is not empty"):
        running.run(runs.experiment("rounds=3", "seed=9"), out)
    assert runs.summary(out)["status"] == "completed" and len(runs.lines(out)) == 1
