# ruff: noqa: E501 - tables of input and answer read best a line a row
"""Bad input: every problem in one line that names key, value and remedy; exit code 2; nothing run, nothing written."""

import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import runs
from fedsim import config, registry
from fedsim.errors import ConfigError
from runs import Answer

Call = Callable[..., Answer]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "no-data"))  # and nobody fetches any: tests are offline
    return runs.inside(capsys, monkeypatch)


def refused(answer: Answer, *expected: str) -> None:
    """Exit code 2, and exactly these lines, each a regular expression for what follows ``error: ``."""
    assert answer.code == 2, (answer.out, answer.err)
    assert "Traceback" not in answer.err
    lines = answer.err.splitlines()
    assert len(lines) == len(expected), answer.err
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(f"error: {pattern}", line), f"{line!r} is not {pattern!r}"


# One wrong setting each: the assignment, and the line that it must give.
SETTINGS = {
    # names and types
    "strategy.cohrt=5": r"strategy\.cohrt: unknown key; did you mean 'cohort'\?",
    "sed=5": r"sed: unknown key; did you mean 'seed'\?",
    "evalute.every=2": r"evalute: unknown key; did you mean 'evaluate'\?",
    "evaluate.evry=2": r"evaluate\.evry: unknown key; did you mean 'every'\?",
    "data.holdot=0.1": r"data\.holdot: unknown key; did you mean 'holdout'\?",
    "data.partition.client=3": r"data\.partition\.client: unknown key; did you mean 'clients'\?",
    "task.dtpe=float64": r"task\.dtpe: unknown key; did you mean 'dtype'\?",
    "lr=0.5": r"lr: unknown key; it belongs to \[strategy\]",
    "data.cohort=5": r"data\.cohort: unknown key; it belongs to \[strategy\]",
    "strategy.rounds=5": r"strategy\.rounds: unknown key; it belongs to the top of the file",
    "strategy.clients=5": r"strategy\.clients: unknown key; known: .*, cohort, .*",
    "strategy={name='fzoos',batch_size=8}": r"strategy\.batch_size: unknown key; known: .*",
    "data.partition.name=natural_id": r"data\.partition\.clients: unknown key; known: min_partition_size, name",
    "seed='10'": r"seed: must be a valid integer \(got '10'\)",
    "seed=2.5": r"seed: must be a valid integer \(got 2\.5\)",
    "rounds=true": r"rounds: must be a valid integer \(got True\)",
    "rounds=ten": r"rounds: must be a valid integer \(got 'ten'\)",
    "strategy.lr=nan": r"strategy\.lr: must be a finite number \(got nan\)",
    "strategy.lr=inf": r"strategy\.lr: must be a finite number \(got inf\)",
    "strategy.lr=fast": r"strategy\.lr: must be a valid number \(got 'fast'\)",
    "strategy=fedavg": r"strategy: must be a table \(got 'fedavg'\)",
    "data.partition=iid": r"data\.partition: must be a table \(got 'iid'\)",
    "strategy.name=7": r"strategy\.name: must be a string \(got 7\)",
    "name='a/b'": r"name: .*pattern.* \(got 'a/b'\)",
    "name='..'": r"name: .* \(got '\.\.'\)",
    "name=''": r"name: .* \(got ''\)",
    f"name={'n' * 300}": r"name: .* \(got 'n+'\)",
    # ranges
    "seed=-1": r"seed: must be at least 0 \(got -1\)",
    "seed=18446744073709551616": r"seed: .* \(got 18446744073709551616\)",
    "rounds=0": r"rounds: must be at least 1 \(got 0\)",
    "rounds=-4": r"rounds: must be at least 1 \(got -4\)",
    "rounds=1000000000000": r"rounds: must be at most 10000000 \(got 1000000000000\)",
    "strategy.cohort=0": r"strategy\.cohort: must be at least 1 \(got 0\)",
    "strategy.cohort=-3": r"strategy\.cohort: must be at least 1 \(got -3\)",
    "strategy.lr=0": r"strategy\.lr: must be greater than 0 \(got 0\)",
    "strategy.lr=-0.1": r"strategy\.lr: must be greater than 0 \(got -0\.1\)",
    "strategy.epochs=0": r"strategy\.epochs: must be at least 1 \(got 0\)",
    "strategy.steps=0": r"strategy\.steps: must be at least 1 \(got 0\)",
    "strategy.batch_size=0": r"strategy\.batch_size: must be at least 1 \(got 0\)",
    "strategy.batch_size=-1": r"strategy\.batch_size: must be at least 1 \(got -1\)",
    "strategy.weight_decay=-1": r"strategy\.weight_decay: must be at least 0 \(got -1\)",
    "strategy.optimizer=sdg": r"strategy\.optimizer: must be 'sgd' \(got 'sdg'\)",
    "data.holdout=1.0": r"data\.holdout: must be less than 1 \(got 1\.0\)",
    "data.holdout=-0.1": r"data\.holdout: must be at least 0 \(got -0\.1\)",
    "data.partition.clients=0": r"data\.partition\.clients: must be at least 1 \(got 0\)",
    "data.partition.clients=-3": r"data\.partition\.clients: must be at least 1 \(got -3\)",
    "engine.workers=two": r"engine\.workers: must be a valid integer or 'auto' \(got 'two'\)",
    "engine.workers=0": r"engine\.workers: must be at least 1 or 'auto' \(got 0\)",
    "strategy.lr_schedule={name='cosin'}": r"strategy\.lr_schedule\.name: must be 'exponential', 'cosine' or 'step' \(got 'cosin'\); did you mean 'cosine'\?",
    "strategy.lr_schedule={name='step',every=2,factor=0.5,facto=1}": r"strategy\.lr_schedule\.facto: unknown key; did you mean 'factor'\?",
    "strategy.lr_schedule={name='cosine'}": r"strategy\.lr_schedule\.rounds: missing",
    "strategy.lr_schedule={rounds=3}": r"strategy\.lr_schedule\.name: missing",
    "strategy.lr_schedule=0.5": r"strategy\.lr_schedule: must be a table \(got 0\.5\)",
    "engine.block=3": r"engine\.block: must be a power of two \(got 3\)",
    "engine.record=true": r"engine\.record: is for a GPU: set device",
    "engine.workers=4": r"engine\.workers: belongs to kind 'ray': set engine\.kind, or --engine ray \(got 4\)",
    "engine.block=0": r"engine\.block: must be at least 1 \(got 0\)",
    "engine.on_error=ignore": r"engine\.on_error: must be 'raise'.* \(got 'ignore'\)",
    "engine.device=tpu": r"engine\.device: must be 'cpu', 'cuda' or 'auto' \(got 'tpu'\)",
    "evaluate.every=0": r"evaluate\.every: must be at least 1 \(got 0\)",
    "checkpoint.keep=0": r"checkpoint\.keep: must be at least 1 \(got 0\)",
    "task.dtype=float16": r"task\.dtype: must be 'float32' or 'float64' \(got 'float16'\)",
    # plugins
    "strategy.name=fedavgg": r"strategy\.name: 'fedavgg' not found; did you mean 'fedavg'\? \(installed: .*fedprox.*\)",
    "task.model=logstic": r"task\.model: 'logstic' not found; did you mean 'logistic'\? \(installed: .*\)",
    "data.name=digts": r"data\.name: 'digts' not found; did you mean 'digits'\? \(installed: .*\)",
    "data.partition.name=idd": r"data\.partition\.name: 'idd' not found; did you mean 'iid'\? \(installed: .*\)",
    "strategy.name='nowhere.mine:build'": r"strategy\.name: plugin 'nowhere\.mine:build' cannot be loaded: ModuleNotFoundError: .*",
    "strategy.name='math:pi'": r"strategy\.name: plugin 'math:pi' has no 'Config'",
    "strategy.name='math:tau2'": r"strategy\.name: plugin 'math:tau2' cannot be loaded: AttributeError: .*",
    "strategy.name='pathlib:Path'": r"strategy\.name: 'pathlib:Path' is not a strategy: .*",
    "task.model='absent.py:net'": r"task\.model: 'absent\.py': no such file",
    "strategy.name='absent.py'": r"strategy\.name: 'absent\.py': no such file",
    "strategy.name='flwr.serverapp.strategy:FedAdm'": r"strategy\.name: plugin .* cannot be loaded: AttributeError: .*FedAdm.*",
    # what only the data can tell
    "strategy.cohort=13": r"strategy\.cohort: must be at most 12, the number of clients \(got 13\)",
    "data.partition.clients=5000": r"data\.partition\.clients: 5000 clients for 1437 examples",
    "engine.device=cuda": r"engine\.device: 'cuda' was asked for, but torch sees no GPU here",
}  # fmt: skip


@pytest.mark.parametrize("assignment", SETTINGS)
def test_setting(call: Call, tmp_path: Path, assignment: str) -> None:
    if assignment == "engine.device=cuda" and runs.has_gpu():
        pytest.skip("there is a GPU here")
    file = runs.write(tmp_path / "e.toml")
    before = runs.listing(tmp_path)
    refused(call("run", file, assignment, "--out", "out"), SETTINGS[assignment])
    assert runs.listing(tmp_path) == before


# Several settings that belong together.
COMBINATIONS = [
    (["strategy.name=fedavg", "strategy.epochs=1", "strategy.steps=1"], r"strategy\.epochs: give either epochs or steps.*"),
    (["strategy.name=fedavg", "strategy.momentum=1.0"], r"strategy\.momentum: must be less than 1 \(got 1\.0\)"),
    (["strategy.name=fedavg", "strategy.momentum=-0.1"], r"strategy\.momentum: must be at least 0 \(got -0\.1\)"),
    (["strategy.name=fedavg", "strategy.optimizer=adam", "strategy.momentum=0.9"], r"strategy\.momentum: belongs to optimizer 'sgd'.*"),
    (["strategy.name=fedprox", "strategy.mu=-1"], r"strategy\.mu: must be at least 0 \(got -1\)"),
    (["strategy.name=fedadam", "strategy.beta1=1.0"], r"strategy\.beta1: must be less than 1 \(got 1\.0\)"),
    (["strategy.name=fedadam", "strategy.tau=0"], r"strategy\.tau: must be greater than 0 \(got 0\)"),
    (["strategy.name=fedavg", "strategy.mu=0.1"], r"strategy\.mu: unknown key.*"),
    (["data.partition.name=dirichlet", "data.partition.alpha=0"], r"data\.partition\.alpha: must be greater than 0 \(got 0\)"),
    (["data.partition.name=dirichlet", "data.partition.alpha=-1"], r"data\.partition\.alpha: must be greater than 0 \(got -1\)"),
    (["data.partition.name=dirichlet", "data.partition.alpha=nan"], r"data\.partition\.alpha: must be a finite number \(got nan\)"),
    (["data.partition.name=dirichlet", "data.partition.alpha=1e-9", "data.partition.clients=200"], r"data\.partition\..*"),
    (["data.partition={name='natural_id'}"], r"data\.partition\.name: natural_id needs natural clients, and digits has none"),
    (["data.partition={name='sampled',clients=50,size=2000}"], r"data\.partition\.size: 2000 distinct examples .* 1437 examples"),
    (["data.name=fashion_mnist"], r"data\.name: fashion_mnist.*"),
    (["strategy={name='flwr.serverapp.strategy:FedAdam',args={ettta=1}}"], r"strategy\.args\.ettta: unknown argument of FedAdam.*'eta'.*"),
    (["strategy={name='flwr.serverapp.strategy:FedAdam',args={eta='x'}}", "rounds=0"], r"rounds: must be at least 1.*"),
]  # fmt: skip


@pytest.mark.parametrize(("assignments", "expected"), COMBINATIONS, ids=[" ".join(a)[:60] for a, _ in COMBINATIONS])
def test_combination(call: Call, tmp_path: Path, assignments: list[str], expected: str) -> None:
    file = runs.write(tmp_path / "e.toml")
    before = runs.listing(tmp_path)
    refused(call("run", file, *assignments, "--out", "out"), expected)
    assert runs.listing(tmp_path) == before


def test_all_problems_at_once(call: Call, tmp_path: Path) -> None:
    file = runs.write(
        tmp_path / "e.toml", "sed=1", "rounds=0", "strategy.lr=-1", "strategy.batchsize=3", "task.model=cnnn",
        "data.partition.clients=0", "engine.block=5", "data.name=digit",
    )  # fmt: skip
    answer = call("run", file, "--out", "out")
    assert answer.code == 2
    keys = {line.removeprefix("error: ").split(":")[0] for line in answer.err.splitlines()}
    assert keys == {
        "sed", "rounds", "strategy.lr", "strategy.batchsize", "task.model", "data.partition.clients", "engine.block",
        "data.name",
    }  # fmt: skip


# The file

FILES = {
    "empty": (b"", ["data: missing", "name: missing", "rounds: missing", "strategy: missing", "task: missing"]),
    "syntax": (b"name = \n", [r"{file}: not valid TOML: .*line 1.*"]),
    "yaml": (b"name: x\nrounds: 3\n", [r"{file}: not valid TOML: .*line 1.*"]),
    "a duplicate key": (b"rounds = 1\nrounds = 2\n", [r"{file}: not valid TOML: .*line 2.*"]),
    "not UTF-8": (b"name = '\xff\xfe'\n", [r"{file}: not UTF-8"]),
    "nested without end": (b"a = " + b"[" * 5000 + b"]" * 5000 + b"\n", [r"{file}: not valid TOML: .*"]),
    "binary": (bytes(range(256)), [r"{file}: not .*"]),
    "too large": (b"# " + b"x" * (1 << 20), [r"{file}: larger than 1048576 bytes"]),
}


@pytest.mark.parametrize("what", FILES)
def test_file(call: Call, tmp_path: Path, what: str) -> None:
    content, expected = FILES[what]
    file = tmp_path / "e.toml"
    file.write_bytes(content)
    before = runs.listing(tmp_path)
    answer = call("run", file, "--out", "out")
    assert sorted(answer.err.splitlines()) == sorted(answer.err.splitlines(), key=str)
    got = sorted(answer.err.splitlines())
    refused(answer._replace(err="\n".join(got)), *[e.replace("{file}", re.escape(str(file))) for e in expected])
    assert runs.listing(tmp_path) == before


def test_a_byte_order_mark_is_no_mistake(call: Call, tmp_path: Path) -> None:
    """Some editors write one; it says nothing and harms nobody."""
    file = tmp_path / "e.toml"
    file.write_bytes(b"\xef\xbb\xbf" + tomli_w.dumps(runs.tables()).encode())
    assert config.parse(config.read(file)) == runs.experiment()


def test_files_that_are_none(call: Call, tmp_path: Path) -> None:
    refused(call("run", "absent.toml"), r"absent\.toml: no such file")
    refused(call("run", tmp_path), re.escape(f"{tmp_path}: is a directory"))
    file = runs.write(tmp_path / "e.toml")
    refused(call("run", file / "x"), re.escape(f"{file}/x: ") + ".*")


def test_out(call: Call, tmp_path: Path) -> None:
    file = runs.write(tmp_path / "e.toml")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "a_file").write_text("x")
    before = runs.listing(tmp_path)
    refused(call("run", file, "--out", "full"), "--out: full is not empty; --resume continues the run in it")
    refused(call("run", file, "--out", "full", "--resume"), "--out: full holds files, but no run to resume")
    refused(call("run", file, "--out", "a_file"), "--out: a_file is a file")
    refused(call("run", file, "--out", "a_file/deeper/still"), "--out: a_file is a file")
    refused(call("run", file, "--out", "/proc/nowhere"), "--out: /proc.* cannot be written.*")
    refused(call("run", file, "--resume"), "--resume: needs --out, the folder of the run")
    assert runs.listing(tmp_path) == before


def test_overrides(call: Call, tmp_path: Path) -> None:
    file = runs.write(tmp_path / "e.toml")
    before = runs.listing(tmp_path)
    refused(call("run", file, "seed"), "seed: overrides are written key=value")
    refused(call("run", file, "=3"), "=3: overrides are written key=value")
    refused(call("run", file, "seed.x=3"), "seed.x: 'seed' is not a table")
    refused(call("run", file, "seed="), r"seed: must be a valid integer \(got ''\)")
    refused(call("run", file, "seed=1,x"), r"seed: must be a valid integer \(got 'x'\)")
    refused(call("run", file, "..=3"), ".*")
    assert runs.listing(tmp_path) == before


# Plugins that are broken

FEDAVG = "from strategies.fedavg import Config, build as of\nbuild = lambda c, t: of(c, t)._replace("
PLUGINS = {
    "raise RuntimeError('first\\nsecond')": r"strategy\.name: plugin 'mine\.py' cannot be loaded: RuntimeError: first second.*",
    "def broken(:": r"strategy\.name: plugin 'mine\.py' cannot be loaded: SyntaxError: .*",
    "import nothing_like_it": r"strategy\.name: plugin 'mine\.py' cannot be loaded: ModuleNotFoundError: .*",
    "raise SystemExit(3)": r"strategy\.name: plugin 'mine\.py' cannot be loaded: SystemExit: 3.*",
    "from strategies.fedavg import Config": r"strategy\.name: plugin 'mine\.py' has no 'build'; an object in it is named 'mine\.py:OBJECT'",
    "from strategies.fedavg import build": r"strategy\.name: plugin 'mine\.py' has no 'Config'; an object in it is named 'mine\.py:OBJECT'",
    "Config = build = 3": r"strategy\.name: plugin 'mine\.py': .*Config.*",
    "from strategies.fedavg import Config\nbuild = lambda c, t: 1 / 0": r"strategy\.name: .*ZeroDivisionError.*",
    "from strategies.fedavg import Config\nbuild = lambda c, t: None": r"strategy\.name: .*Strategy.*",
    FEDAVG + "init=lambda: None)": r"strategy\.name: 'mine\.py' cannot begin: TypeError: .* 0 positional arguments but 1 was given .*",
    FEDAVG + "init=None)": r"strategy\.name: init of 'mine\.py' must be a function \(got None\)",
    FEDAVG + "params=lambda s: [1])": r"strategy\.name: params of 'mine\.py' must give named tensors \(got list\)",
    FEDAVG + "phases=list(of(c, t).phases))": r"strategy\.name: phases of 'mine\.py' must be a tuple of at least one Phase \(got list\)",
    FEDAVG + "phases=())": r"strategy\.name: phases of 'mine\.py' must be a tuple of at least one Phase \(got \(\)\)",
    FEDAVG + "phases=(of(c, t).phases[0]._replace(local=3),))": r"strategy\.name: phases\[0\]\.local of 'mine\.py' must be a Local \(got 3\)",
    FEDAVG + "sends={'x'})": r"strategy\.name: sends of 'mine\.py' must be a tuple of .* \(got \{'x'\}\)",
    FEDAVG + "sends=())": r"strategy\.name: sends of 'mine\.py' must be a tuple of .* \(got \(\)\)",
    FEDAVG + "sends='delta')": r"strategy\.name: sends of 'mine\.py' must be a tuple of .* \(got 'delta'\)",
    FEDAVG + "sends=('delta',))": r"strategy\.name: sends of 'mine\.py' must be a tuple of .* \(got \('delta',\)\)",
}  # fmt: skip


@pytest.mark.parametrize("source", PLUGINS)
def test_broken_plugin(call: Call, tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (tmp_path / "mine.py").write_text(source)
    file = runs.write(tmp_path / "e.toml", "strategy={name='mine.py',cohort=3}")
    before = runs.listing(tmp_path)
    refused(call("run", file, "--out", "out"), PLUGINS[source])
    assert runs.listing(tmp_path) == before
    sys.modules.pop("mine", None)


# The other commands

COMMANDS = {
    "rnu e.toml": r"No such command 'rnu'.*",
    "run e.toml --outt x": r"No such option.*--outt.*",
    "run": r"Missing argument 'FILE'.*",
    "list strategie": r"'strategie' is not one of strategies, tasks, datasets, partitioners; did you mean 'strategies'\?",
    "show fedavgg": r"'fedavgg' not found; did you mean 'fedavg'\?",
    "check fedavgg": r"'fedavgg' not found; did you mean 'fedavg'\?.*",
    "compare absent": r"absent.*",
    "report absent": r"absent.*",
    "cite absent.toml": r"absent\.toml: no such file",
    "data get digitz": r".*digitz.*digits.*",
    "data show absent.toml": r"absent\.toml: no such file",
    "data show e.toml --out p.png": r"--out: must end in \.svg \(got p\.png\)",
    "privacy plan e.toml --out p.png": r"--out: must end in \.svg \(got p\.png\)",
    "new strategy 1st": r"'1st' .*identifier.*",
    "new strategy class": r"'class' .*",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_command(call: Call, tmp_path: Path, line: str) -> None:
    runs.write(tmp_path / "e.toml")
    before = runs.listing(tmp_path)
    refused(call(*line.split()), COMMANDS[line])
    assert runs.listing(tmp_path) == before


# Twelve of them through the real command: a process of its own, as a user meets them

REAL = [
    (["run", "absent.toml"], 2, r"error: absent\.toml: no such file"),
    (["run", "e.toml", "sed=1"], 2, r"error: sed: unknown key; did you mean 'seed'\?"),
    (["run", "e.toml", "strategy.cohort=100"], 2, r"error: strategy\.cohort: must be at most 12.*"),
    (["check", "fedavgg"], 2, r"error: 'fedavgg' not found.*"),
]


@pytest.mark.parametrize(("args", "code", "line"), REAL, ids=[" ".join(a) for a, _, _ in REAL])
def test_real_command(tmp_path: Path, args: list[str], code: int, line: str) -> None:
    runs.write(tmp_path / "e.toml")
    before = runs.listing(tmp_path)
    answer = runs.command(*args, cwd=tmp_path)
    assert answer.code == code
    assert re.fullmatch(line, answer.err.strip()), answer.err
    assert runs.listing(tmp_path) == before


# At random

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3),
    st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


def _paths(tables: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    out = []
    for key, value in tables.items():
        out.append((*path, key))
        if isinstance(value, dict):
            out += _paths(value, (*path, key))
    return out


FULL = config.dump(runs.experiment())


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(changes=st.lists(st.tuples(st.sampled_from(_paths(FULL)), VALUES, st.booleans()), min_size=1, max_size=4))
def test_any_value_anywhere(changes: list[tuple[tuple[str, ...], Any, bool]]) -> None:
    """Whatever stands in a config, it is accepted, or refused with lines that name a key."""
    tables = config._copy(FULL)
    for path, value, remove in changes:
        table: Any = tables
        for part in path[:-1]:
            table = table.get(part) if isinstance(table, dict) else None
        if isinstance(table, dict):
            if remove:
                table.pop(path[-1], None)
            else:
                table[path[-1]] = value
    problems = ("nothing: wrong",)
    try:
        config.parse(tables)
    except ConfigError as e:
        problems = e.problems
    assert problems
    for problem in problems:
        assert "\n" not in problem and re.match(r"\S.*: ", problem), problem


def test_a_problem_is_one_line_that_can_be_printed() -> None:
    e = ConfigError("task.model: '\n\x1b[2J' not found", "größer als α: 平均")
    assert e.problems == ("task.model: '\\n\\x1b[2J' not found", "größer als α: 平均")
    assert str(e) == "\n".join(e.problems)


def _typo(word: str, rng: random.Random) -> str:
    i, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase)
    return rng.choice(
        [word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + letter + word[i + 1 :],
         word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]]
    )  # fmt: skip


def test_typos_are_understood() -> None:
    """For one slip of the finger in any key, at least 95 of 100 hints are right."""
    rng, right, asked = random.Random(7), 0, 0
    known = {path for path in _paths(FULL) if not isinstance(_at(FULL, path), dict)}
    while asked < 200:
        path = rng.choice(sorted(known))
        word = _typo(path[-1], rng)
        if len(path[-1]) < 3 or (*path[:-1], word) in known or word in registry.GROUPS or path[-1] in ("name", "model"):
            continue
        tables = config._copy(FULL)
        table = _at(tables, path[:-1])
        table[word] = table.pop(path[-1])
        asked += 1
        try:
            config.parse(tables)
        except ConfigError as e:
            right += any(f"did you mean '{path[-1]}'?" in problem for problem in e.problems)
    assert right >= 190, f"{right} of {asked}"


def _at(tables: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        tables = tables[part]
    return tables
