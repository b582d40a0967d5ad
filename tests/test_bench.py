"""What ``fedsim bench`` measures with, and what it makes of it. The figures themselves are nobody's test."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsim import bench, config
from fedsim.bench import Arm, Edit, Figures, Workload
from fedsim.benches import gpu, proc
from fedsim.errors import ConfigError, FedsimError
from runs import has_gpu

BURN = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\n"


def test_cpu_counts_children_that_live_and_that_are_dead() -> None:
    """The child burns half a second, and its own child, which it waits for, another half; then it sleeps."""
    script = f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {BURN!r}])\n{BURN}time.sleep(60)\n"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 50
        while (used := proc.cpu(child.pid)) < 1.0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert 1.0 <= used < 3.0
        assert proc.tree(child.pid) == [child.pid]
        peak = proc.Peak(child.pid, 0.05)
        time.sleep(0.3)
        assert 1e6 < peak.stop() < 1e9
    finally:
        child.kill()
        child.wait()


def workload(*arms: Arm, reference: str = "") -> Workload:
    return Workload("w", "a title", {}, arms, (), reference)


def test_medians_and_ratios() -> None:
    runs = [Figures("a", c, 1.0, 5.0, 100.0, 0.5) for c in (1.0, 9.0, 2.0)]
    runs += [Figures("b", c, 2.0, 6.0, 300.0, None) for c in (8.0, 4.0, 3.0)]
    a, b = bench.summary(workload(reference="b"), runs)
    assert (a["cpu_seconds_a_round"], a["range"], a["faster_than_reference"]) == (2.0, [1.0, 9.0], 2.0)
    assert (b["faster_than_reference"], b["accuracy"], b["runs"]) == (1.0, None, 3)
    first, *_ = bench.summary(workload(), runs)
    assert first["faster_than_reference"] == 1.0  # without a reference, the first arm is one
    text = bench.table(workload(reference="b"), runs)
    assert "| a | 2.0000 (1.0000–9.0000) | 2.00 | 1.0000 | 5.0 | 100 | 0.500 |" in text


def test_what_waits_for_a_gpu_is_compared_by_wall_time() -> None:
    runs = [Figures("a", 1.0, 6.0, 5.0, 100.0, 0.5), Figures("b", 1.5, 2.0, 5.0, 100.0, 0.5)]
    of = workload()._replace(clock="wall")
    assert [row["faster_than_reference"] for row in bench.summary(of, runs)] == [1.0, 3.0]
    assert "× a (wall) |" in bench.table(of, runs)


def test_what_a_gpu_would_run_is_a_config() -> None:
    """The arms of a GPU, on a CPU; whether they are fast is not asked."""
    w1 = dict(bench.workloads("mnist_small")["w1"].experiment)
    assert not gpu.specs(w1) or has_gpu()
    for spec in gpu.specs(w1, device="cpu"):
        for _, overrides in spec.arms:
            assert config.parse(config.override(spec.experiment, overrides)).engine.device == "cpu"
    w1["data"] = {"name": "digits", "partition": {"name": "iid", "clients": 8}}
    w1 |= {"rounds": 2, "task": {"model": "cnn", "channels": [2, 2], "hidden": 4}}
    w1["strategy"] = w1["strategy"] | {"cohort": 8}
    accuracies = set()
    for name, overrides in gpu.specs(w1, device="cpu")[0].arms:
        if "workers" not in name:
            runs = bench.measure(Workload("gpu_w1", "", w1, (Arm(name, overrides),)), 1, {})
            accuracies.add(round(runs[0].accuracy or 0, 1))
    assert len(accuracies) == 1


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'w9' is not a benchmark.*known: w1, w2"):
        bench.run("w9", 1)
    with pytest.raises(ConfigError, match=r"--against: no peer 'fluk'.*did you mean 'fluke'.*known: flwr, pfl, fluke"):
        bench.run("w1", 1, ["fluk"])


def test_an_edit_that_finds_nothing_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    bench.edit(tmp_path, [Edit("a.py", "x = 1", "x = 2")])
    assert file.read_text() == "x = 2\n"
    with pytest.raises(FedsimError, match=r"a\.py has 'x = 1' 0 times"):
        bench.edit(tmp_path, [Edit("a.py", "x = 1", "x = 2")])


def test_all_workloads_are_experiments() -> None:
    from fedsim import config

    for w in bench.workloads("digits").values():
        for arm in (a for a in w.arms if a.script is None):
            tables = config.override(w.experiment, [o for o in arm.overrides if not o.startswith("-")])
            config.parse({k: v for k, v in tables.items() if f"-{k}" not in arm.overrides})


@pytest.mark.slow
def test_ours_and_the_loop_train_the_same(tmp_path: Path) -> None:
    w = bench.workloads("mnist_small")["w2"]
    tables = dict(w.experiment) | {
        "rounds": 3,
        "data": {"name": "mnist_small", "partition": {"name": "iid", "clients": 20}},
    }
    tables["strategy"] = dict(tables["strategy"]) | {"cohort": 10}
    small = w._replace(experiment=tables, arms=(Arm("fedsim"), Arm("plain loop")))
    runs = bench.measure(small, 1, {})
    assert [f.arm for f in runs] == ["fedsim", "plain loop"]
    a, b = (f.accuracy for f in runs)
    assert a is not None and b is not None and abs(a - b) < 0.05
    bench.write(small, runs, "mnist_small", tmp_path)
    assert len(json.loads((tmp_path / "w2.json").read_text())["runs"]) == 2
    with pytest.raises(FedsimError, match="w2: fedsim failed"):
        bench.measure(small._replace(experiment=tables | {"task": {"model": "nonsense"}}), 1, {})
