"""The command line as a person meets it."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
from fedsim import cli, registry
from fedsim.errors import ConfigError
from fedsim.run import run
from runs import Answer

Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    monkeypatch.chdir(tmp_path)
    return runs.inside(capsys, monkeypatch)


def test_help_is_quick(tmp_path: Path) -> None:
    """Neither torch nor Ray nor Flower is imported to say what there is; nor to say what is wrong with a command."""
    code = (
        "import sys\nfrom fedsim import cli\nsys.argv = ['fedsim', *sys.argv[1:]]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [m for m in ('torch', 'ray', 'flwr', 'numpy', 'matplotlib', 'sklearn') if m in sys.modules])\n"
    )
    for args in (["--help"], ["run", "--help"], ["--version"], ["nonsense"], ["list"], ["new", "strategy", "mine"]):
        began = time.process_time()
        done = subprocess.run(
            [sys.executable, "-c", code, *args], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.splitlines()[-1] == "HEAVY []", args
        assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "command", ["", "run", "list", "show", "check", "compare", "report", "doctor", "cite", "bench", "data", "new"]
)
def test_every_verb_has_help(call: Call, command: str) -> None:
    """Arguments are explained too; click and typer have to agree for that."""
    answer = call(*command.split(), "--help")
    assert answer.code == 0 and answer.out.startswith("Usage: ")
    if command in ("run", "cite"):
        assert re.search(r"FILE +an experiment \(TOML\)", answer.out), answer.out


def test_version(call: Call) -> None:
    assert re.fullmatch(r"fedsim \d+\.\d+\.\d+\n", call("--version").out)


def test_without_a_command(call: Call) -> None:
    answer = call()
    assert answer.code == 2 and answer.err.startswith("Usage: ")


def test_list(call: Call) -> None:
    answer = call("list")
    for group in registry.GROUPS:
        assert f"{group}:\n" in answer.out
        for name in registry.installed(group):
            assert re.search(rf"^  {name} +\S", answer.out, re.MULTILINE)
    assert call("list", "tasks").out.startswith("tasks:\n")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fedprox", ["FedProx (Li et al. 2020", "mu ", "number ≥ 0", "0.01", "the pull towards the global model"]),
        ("cnn", ["two-conv", "model"]),
        ("dirichlet", ["alpha", "number > 0"]),
        ("digits", ["handwritten digits"]),
        ("flwr.serverapp.strategy:FedAdam", ["Adaptive Federated Optimization", "args", "cohort"]),
    ],
)
def test_show(call: Call, name: str, expected: list[str]) -> None:
    answer = call("show", name)
    assert answer.code == 0
    for text in expected:
        assert text in answer.out


def test_cite(call: Call, tmp_path: Path) -> None:
    answer = call("cite", runs.write(tmp_path / "e.toml"))
    assert answer.out.startswith("SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378)")


def test_doctor(call: Call) -> None:
    answer = call("doctor")
    assert answer.code == 0, answer.err
    for what in ("python", "torch", "flwr", "packages", "cores", "GPU", "disk", "telemetry", "strategies", "data here"):
        assert re.search(rf"^{what} +\S", answer.out, re.MULTILINE), what


def test_doctor_names_what_is_wrong(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's package named as ours is on the path before it."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "__init__.py").touch()
    answer = runs.command("doctor", cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert answer.code == 2
    assert re.fullmatch(
        r"error: the package 'server' comes from \S+, not from \S+: a stranger hides ours", answer.err[:-1]
    )
    from fedsim import doctor

    roots = dict.fromkeys(("fedsim", "clients", "server", "strategies"), Path("/a")) | {"server": Path("/b")}
    monkeypatch.setattr(doctor, "roots", lambda: roots)
    assert [f.problem for f in doctor._packages() if f.problem] == ["a stranger hides our package 'server' of /a"]


def test_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stranger:
        origin = "/elsewhere/clients/__init__.py"

    true = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: Stranger if name == "clients" else true(name))
    with pytest.raises(ConfigError, match="'clients' comes from /elsewhere, not from"):
        cli.guard()


def test_new_strategy_works(call: Call, tmp_path: Path) -> None:
    """What is written passes the contract and learns, before anybody changes a line."""
    answer = call("new", "strategy", "my_avg")
    assert answer.code == 0
    assert [Path(line).name for line in answer.out.splitlines()] == ["my_avg.py", "my_avg.toml"]
    checked = call("check", "my_avg.py")
    assert checked.code == 0, checked.out
    assert call("run", "my_avg.toml", "rounds=12", "--out", "out").code == 0
    assert runs.summary(tmp_path / "out")["final_accuracy"] > 0.7
    before = runs.listing(tmp_path)
    again = call("new", "strategy", "my_avg")
    assert again.code == 2 and "exists already" in again.err
    hides = call("new", "strategy", "torch")
    assert hides.code == 2 and "installed module" in hides.err
    assert runs.listing(tmp_path) == before


def test_check_says_what_is_broken(call: Call, tmp_path: Path) -> None:
    (tmp_path / "broken_one.py").write_text(
        "'''Keeps its momentum in a global.'''\nfrom strategies import fedavg\nfrom fedsim import tree\n"
        "Config = fedavg.Config\nkept = []\n\ndef build(config, task):\n    s = fedavg.build(config, task)\n"
        "    def finish(state, mean):\n        kept.append(mean.value['delta'])\n"
        "        return fedavg.State(tree.axpy(0.1 * len(kept), kept[-1], state.w))\n"
        "    return s._replace(phases=(s.phases[0]._replace(finish=finish),))\n"
    )
    answer = call("check", "broken_one.py")
    assert answer.code == 1
    failed = [line for line in answer.out.splitlines() if line.startswith("FAILED")]
    assert any("resume is bitwise" in line for line in failed) and any("equal seeds" in line for line in failed)
    assert re.fullmatch(rf"error: broken_one\.py breaks {len(failed)} rules of the contract\n", answer.err)


def test_run_is_quiet_in_a_pipe_and_says_where_the_report_is(tmp_path: Path) -> None:
    file = runs.write(tmp_path / "e.toml", "rounds=2")
    answer = runs.command("run", file, "--out", "out", cwd=tmp_path)
    assert answer.code == 0
    assert "\x1b" not in answer.out and "\r" not in answer.out
    assert answer.out.splitlines()[-1] == "report: out/report.html"
    for name in ("config.toml", "metrics.jsonl", "summary.json", "report.html", "model.safetensors", "checkpoint"):
        assert (tmp_path / "out" / name).exists(), name
    assert len(answer.err.splitlines()) <= 1, answer.err  # how clients are run, and why


def test_no_picture_fails_a_finished_run(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr("fedsim.data.show.draw", fail)
    answer = call("run", runs.write(tmp_path / "e.toml", "rounds=1"), "--out", "out")
    assert answer.code == 0 and answer.out.splitlines()[-1] == "report: out/report.html"
    assert caplog.messages[-1] == "the picture of the partition was not drawn: RuntimeError: no ink"
    assert not (tmp_path / "out" / "partition.svg").exists()


def test_twice_the_same(tmp_path: Path) -> None:
    """In whatever order blocks are run, the numbers are the same to the last bit."""
    orders = [None, lambda starts: starts[::-1], lambda starts: starts[1:] + starts[:1]]
    done = [run(runs.experiment(), tmp_path / str(i), order=order) for i, order in enumerate(orders)]
    assert len({d["params_sha256"] for d in done}) == 1
    assert runs.lines(tmp_path / "0") == runs.lines(tmp_path / "1") == runs.lines(tmp_path / "2")
    assert run(runs.experiment("seed=4"), tmp_path / "other")["params_sha256"] != done[0]["params_sha256"]


def test_sweep_and_compare(call: Call, tmp_path: Path) -> None:
    file = runs.write(tmp_path / "e.toml", "rounds=2")
    answer = call("run", file, "seed=1,2", "strategy.lr=0.05,0.1", "--out", "sweep")
    assert answer.code == 0, answer.err
    folders = sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir())
    assert folders == [f"seed={s},strategy.lr={lr}" for s in (1, 2) for lr in ("0.05", "0.1")]
    assert (tmp_path / "sweep" / "compare.html").exists()
    compared = call("compare", *sorted(Path("sweep").glob("*")))  # as a shell takes the README's sweep/*
    assert compared.code == 0 and "±" in compared.out
    assert compared.err == "note: sweep/compare.html: not a run folder; skipped\n"
    # A sweep that was cut short goes on: what is there stays, what is missing is run.
    import shutil

    shutil.rmtree(tmp_path / "sweep" / folders[-1])
    before = runs.summary(tmp_path / "sweep" / folders[0])["params_sha256"]
    assert call("run", file, "seed=1,2", "strategy.lr=0.05,0.1", "--out", "sweep", "--resume").code == 0
    assert runs.summary(tmp_path / "sweep" / folders[0])["params_sha256"] == before
    assert (tmp_path / "sweep" / folders[-1] / "summary.json").exists()


def test_a_sweep_goes_on_where_a_run_fails(call: Call, tmp_path: Path) -> None:
    """And where one cannot begin; the failures stand at the end, with the command that goes on with the sweep."""
    file = runs.write(tmp_path / "e.toml", "rounds=2")
    sweep = ("run", file, "strategy.lr=1e38,0.1", "strategy.cohort=4,99", "--out", "sweep")
    answer = call(*sweep)
    assert answer.code == 1
    assert (tmp_path / "sweep" / "compare.html").exists() and (
        tmp_path / "sweep/strategy.lr=0.1,strategy.cohort=4"
    ).exists()
    said = answer.err.splitlines()
    at = said.index("error: 3 of 4 runs failed")
    assert [re.sub(r": .*", "", line.removeprefix("error: ")) for line in said[at + 1 : -1]] == [
        "strategy.lr=1e38 strategy.cohort=4",
        "strategy.lr=1e38 strategy.cohort=99",
        "strategy.lr=0.1 strategy.cohort=99",
    ]
    assert "must be at most 12" in said[-2]
    assert said[-1] == f"to go on with them: fedsim {shlex.join(map(str, sweep))} --resume"
    again = call(*sweep, "--resume")
    assert again.code == 1 and "3 of 4" in again.err and "is not empty" not in again.err
    nothing = call("run", file, "seed=1,2", "strategy.cohort=99", "--out", "other")
    assert nothing.code == 2 and "error: 2 of 2 runs failed" in nothing.err and not (tmp_path / "other").exists()


def test_a_sweep_may_go_on_after_a_spent_budget(call: Call, tmp_path: Path) -> None:
    """A run that stopped at its budget had come to its end: it is no failure when the others go on."""
    private = (
        "strategy.name=fedavg", "strategy.weighting=uniform", "data.holdout=0.0", "privacy.mode=client",
        "privacy.clip=0.5", "privacy.noise_multiplier=1.0", "privacy.delta=1e-3", "privacy.max_epsilon=2.5",
    )  # fmt: skip
    sweep = ("run", runs.write(tmp_path / "e.toml", *private, "rounds=9"), "seed=1,2", "--out", "sweep")
    assert call(*sweep).code == 0
    assert runs.summary(tmp_path / "sweep/seed=1")["status"] == "stopped"
    answer = call(*sweep, "--resume")
    assert answer.code == 0 and answer.out.count("nothing to do: privacy.max_epsilon: 2.5 is spent after round") == 2
    assert re.search(r"^ fedavg +2 ", answer.out, re.MULTILINE) and "its privacy budget was spent" in answer.err


def test_clients_own_models_are_a_result(call: Call, tmp_path: Path) -> None:
    """Strategies without a global model: in the table of the run, in the report, and beside those that have one."""
    for name in ("local", "fedrep", "fedavg"):
        file = runs.write(tmp_path / "e.toml", f"strategy.name={name}", "rounds=2", "task.model=mlp")
        answer = call("run", file, "--out", name)
        assert answer.code == 0, answer.err
        assert ("personal" in answer.out) == (name != "fedavg") and (" accuracy " in answer.out) == (name == "fedavg")
        assert ("of own models" in (tmp_path / name / "report.html").read_text()) == (name != "fedavg")
    compared = call("compare", "local", "fedavg", "--target", "0.01").out
    assert re.search(r"^ local .* - +- +0\.\d{4} +[12] ", compared, re.MULTILINE), compared


@pytest.mark.parametrize(("name", "holdout", "warned"), [("local", 0.0, 1), ("local", 0.2, 0), ("fedavg", 0.0, 0)])
def test_a_run_that_measures_nothing_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, holdout: float, warned: int
) -> None:
    run(runs.experiment(f"strategy.name={name}", "rounds=1", f"data.holdout={holdout}"), tmp_path / "out")
    assert caplog.text.count("data.holdout: is 0, so no accuracy is measured: 'local' has no global model") == warned


def test_long_names_of_a_sweep_do_not_collide() -> None:
    long = "x" * 200
    names = {cli._folder([f"task.path='{long}{i}'", "seed=1"]) for i in range(3)}
    assert len(names) == 3 and all(len(name) <= 120 for name in names)
    assert cli._folder(["a='x/y'"]) != cli._folder(["a='x_y'"])


def test_data_commands(call: Call, tmp_path: Path) -> None:
    answer = call("data", "list")
    assert re.search(r"^digits +yes +- ", answer.out, re.MULTILINE)
    shown = call("data", "show", runs.write(tmp_path / "e.toml"), "--out", "p.svg")
    assert shown.code == 0 and (tmp_path / "p.svg").exists()
    assert shown.out.startswith("digits: 12 clients\nclient  examples  holdout  labels") and "array" not in shown.out
    assert call("data", "get", "digits").code == 0
