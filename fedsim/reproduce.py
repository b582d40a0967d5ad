"""A paper's claims, run and judged: ``fedsim reproduce experiments/<paper>/claims.toml``.

The file names experiments (with overrides, a grid and seeds) and claims over them in the language of ``fedsim.claims``.
Runs are kept in a cache by the hash of their resolved config, so an interrupted reproduction goes on where it stopped,
in the middle of a run too. Beside the file go ``results.json`` and the pictures; ``expected.toml`` there says which
figures are normal.

    title = "FedHyper"                        # and: seeds = [1, 2, 3]
    [runs.hyper]
    file = "digits.toml"                      # beside this file
    set = ["strategy.variant=g+cl"]
    grid = { lr = "strategy.lr=0.01,0.05" }   # axis = key=values
    [[claims]]
    name = "faster than FedAvg"
    paper = "converges 1.1 to 3 times faster"
    holds = ["reach(fedavg, 0.8) / reach(hyper, 0.8) >= 1.1"]
    [[pictures]]
    file = "accuracy.svg"
    title = "Accuracy, lr = 0.01"
    curves = { FedHyper = "hyper(lr=0.01)" }   # or the mean over cells: "mean(hyper)"
    [[tables]]
    file = "costs.md"
    title = "Accuracy and traffic"
    columns = ["accuracy", "MB"]
    rows = { FedHyper = ["final(hyper, lr=0.01)", "total(hyper, lr=0.01) / 1e6"] }
    [quick]                                   # what --quick changes
    seeds = [1]
    set = ["rounds=2"]
"""

import ast
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w
from pydantic import Field, model_validator

from fedsim import claims, config, files, offline, record, registry
from fedsim.claims import Grid, Result, Table
from fedsim.config import Closed
from fedsim.errors import ConfigError, FedsimError, Stopped
from fedsim.report import embeddings, figures

FREE = ("name", "checkpoint")  # tables of a config that decide no number of a run
WRITTEN = ("results.json", "expected.toml", "*.svg", "*.md")  # beside claims
TOLERANCE = 3.0  # --accept writes so many standard deviations, and at least one part in a hundred


class RunSpec(Closed):
    """One experiment over a grid."""

    file: str
    set: list[str] = Field(default_factory=list)
    grid: dict[str, str] = Field(default_factory=dict)
    seeds: list[int] | None = None


class Claim(Closed):
    """What the paper says, and the comparisons that say it in figures; ``figures`` are reported beside them."""

    name: str
    paper: str
    holds: list[str] = Field(min_length=1)
    figures: list[str] = Field(default_factory=list)


class Picture(Closed):
    """Curves over rounds, or another key ``x``: the mean over seeds, and one standard deviation to either side.

    With ``embeddings``, a run's name, how its clients' embeddings moved, of its first seed; its summaries then have
    ``embedding_separation`` (``fedsim.report.embeddings``).
    """

    file: str = Field(pattern=r"^[\w.-]+\.svg$")
    title: str = ""
    key: str = "accuracy"
    x: str = "round"
    curves: dict[str, str] = Field(default_factory=dict)
    embeddings: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Picture":
        if bool(self.curves) == (self.embeddings is not None):
            raise ValueError("curves: a picture has curves or embeddings, and not both")
        return self


class Page(Closed):
    """A table in Markdown: of each row a figure for each column, the mean ± sd over seeds; "" leaves a cell empty."""

    file: str = Field(pattern=r"^[\w.-]+\.md$")
    title: str
    columns: list[str] = Field(min_length=1)
    rows: dict[str, list[str]]

    @model_validator(mode="after")
    def _full(self) -> "Page":
        for name, row in self.rows.items():
            if len(row) != len(self.columns):
                raise ValueError(f"rows.{name}: needs {len(self.columns)} figures (got {len(row)})")
        return self


class Quick(Closed):
    """What ``--quick`` changes."""

    seeds: list[int] | None = None
    set: list[str] = Field(default_factory=list)


class Claims(Closed):
    """A claims file."""

    title: str
    seeds: list[int] = Field(min_length=1)
    runs: dict[str, RunSpec]
    claims: list[Claim]
    pictures: list[Picture] = Field(default_factory=list)
    tables: list[Page] = Field(default_factory=list)
    quick: Quick = Quick()


class Job(NamedTuple):
    """One run: its place in the tables, its resolved config, and its folder in the cache."""

    run: str
    cell: int
    seed: int
    label: str
    tables: dict[str, Any]
    folder: Path


def reproduce(
    path: Path,
    *,
    quick: bool = False,
    fresh: bool = False,
    accept: bool = False,
    workers: int = 2,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """Run what is missing, judge, write and print. Returns the claims as they stand in ``results.json``.

    quick:  with the file's ``[quick]`` changes; prints the verdicts and writes nothing beside the file
    fresh:  run everything again
    accept: write ``expected.toml`` from these figures

    Raises ``ConfigError`` before anything runs for what is wrong in the file, and ``FedsimError`` at the end where a
    run failed; the other runs are kept.
    """
    began, code = time.perf_counter(), commit(path.parent)  # what runs now, whatever is committed meanwhile
    spec = config.check(Claims, config.read(path))
    if quick:
        spec = _quickly(spec)
    cache = cache or Path("runs") / "reproduce" / path.resolve().parent.name
    axes = {name: _axes(run) for name, run in spec.runs.items()}
    jobs = _jobs(spec, axes, path.parent, cache)
    _validate(spec, axes)
    if fresh:
        for job in jobs:
            shutil.rmtree(job.folder, ignore_errors=True)
    reused = [job for job in jobs if _is_done(job.folder)]
    _run(jobs, workers)
    grids = _load(spec, axes, jobs)
    judged = [_judge(claim, grids) for claim in spec.claims]
    seconds = time.perf_counter() - began + sum(_summary(job.folder)["wall_seconds"] for job in reused) / workers
    _print(spec, judged, seconds)
    _compare(path.with_name("expected.toml"), judged)
    if not quick:
        results = {
            "commit": code,
            "machine": machine(),
            "minutes": round(seconds / 60, 2),
            "seeds": spec.seeds,
            "claims": [{key: claim[key] for key in ("name", "paper", "holds", "figures")} for claim in judged],
        }
        files.write(path.with_name("results.json"), json.dumps(results, indent=1, allow_nan=False).encode() + b"\n")
        for picture in spec.pictures:
            files.write(path.with_name(picture.file), _draw(picture, grids, jobs))
        for page in spec.tables:
            files.write(path.with_name(page.file), _page(page, grids).encode())
    if accept:
        _accept(path.with_name("expected.toml"), judged)
    return judged


def _quickly(spec: Claims) -> Claims:
    runs = {
        name: run.model_copy(update={"set": [*run.set, *spec.quick.set], "seeds": spec.quick.seeds or run.seeds})
        for name, run in spec.runs.items()
    }
    return spec.model_copy(update={"runs": runs, "seeds": spec.quick.seeds or spec.seeds})


def _axes(run: RunSpec) -> dict[str, tuple[Any, ...]]:
    """The values of each axis of a run's grid."""
    axes = {}
    for axis, text in run.grid.items():
        if axis in claims.OPTIONS or not axis.isidentifier():
            raise ConfigError(f"grid.{axis}: cannot be the name of an axis")
        axes[axis] = tuple(config.value(one.partition("=")[2]) for [one] in config.sweep([text]))
    return axes


def _jobs(spec: Claims, axes: Mapping[str, Mapping[str, Sequence[Any]]], base: Path, cache: Path) -> list[Job]:
    """Every run of every cell and seed. Raises ``ConfigError`` with the run's name for a config that is wrong."""
    jobs = []
    registry.look_in(*((base / run.file).parent for run in spec.runs.values()))
    for name, run in spec.runs.items():
        tables = config.read(base / run.file)
        for cell, assignments in enumerate(config.sweep(list(run.grid.values()))):
            for seed in run.seeds or spec.seeds:
                try:
                    experiment = config.parse(config.override(tables, [*run.set, *assignments, f"seed={seed}"]))
                except ConfigError as e:
                    raise ConfigError(*(f"runs.{name}: {problem}" for problem in e.problems)) from None
                resolved = config.dump(experiment)
                number = {key: value for key, value in resolved.items() if key not in FREE}
                digest = sha256(json.dumps(number, sort_keys=True).encode()).hexdigest()[:16]
                # A checkpoint now and then: a run is short, and each costs a few flushes to the disk.
                resolved["checkpoint"] = {"every": max(1, experiment.rounds // 4), "keep": 1}
                label = " ".join([name, *assignments, f"seed={seed}"])
                jobs.append(Job(name, cell, seed, label, resolved, cache / digest))
    return jobs


def _validate(spec: Claims, axes: Mapping[str, dict[str, tuple[Any, ...]]]) -> None:
    """Read every expression over runs that know nothing, so that a mistake is found before an hour is spent."""
    nothing = Result([{"round": 1}], {})
    grids = {
        name: Grid(a, [[nothing] * len(spec.runs[name].seeds or spec.seeds) for _ in claims.settings(a)])
        for name, a in axes.items()
    }
    for claim in spec.claims:
        _judge(claim, grids)
    for picture in spec.pictures:
        for text in picture.curves.values():
            _curve(text, grids)
        if picture.embeddings is not None and picture.embeddings not in grids:
            raise ConfigError(f"pictures.embeddings: no run '{picture.embeddings}'")
    for page in spec.tables:
        _page(page, grids)


def _run(jobs: Sequence[Job], workers: int) -> None:
    """Run what is missing, ``workers`` at a time, each in a process of one thread."""
    todo = list({job.folder: job for job in jobs if not _is_done(job.folder)}.values())
    total = len({job.folder for job in jobs})
    print(f"{total} runs, {total - len(todo)} of them done before")
    if not todo:
        return
    failed = []
    for number, (job, error) in enumerate(_each(todo, workers), 1):
        if error is not None:
            failed.append(f"{job.label} ({job.folder}): {error}")
        print(f"[{number}/{len(todo)}] {job.label}: {error or _said(_summary(job.folder))}", flush=True)
    if failed:
        raise FedsimError("\n".join(failed))


def _each(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, str | None]]:
    """Run the jobs, and give each with what failed as it ends. One worker is this process."""
    offline.prepare()
    from fedsim.run import stoppable  # only now: Flower reads its switches when it is imported

    if workers == 1:
        for job in jobs:
            yield job, _one(job.tables, job.folder)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes that are started now
    spawn, beside = multiprocessing.get_context("spawn"), tuple(registry.folders())
    with ProcessPoolExecutor(min(workers, len(jobs)), spawn, registry.look_in, beside) as pool:
        waiting = {pool.submit(_one, job.tables, job.folder): job for job in jobs}
        try:
            with stoppable():
                for future in as_completed(waiting):
                    yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # each stops as a run does, and goes on from its checkpoint the next time
            raise


def _said(summary: Mapping[str, Any]) -> str:
    known = (summary.get(key) for key in ("final_accuracy", "personal_accuracy_mean"))
    accuracy = next((a for a in known if a is not None), None)
    return f"accuracy {'-' if accuracy is None else format(accuracy, '.4f')}, {summary['wall_seconds']:.1f} s"


def _one(tables: dict[str, Any], folder: Path) -> str | None:
    """One run, from its last checkpoint if it has one. What failed, or None."""
    offline.prepare()
    from fedsim.run import run

    begun = (folder / record.CONFIG).exists()
    if not begun:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        run(config.parse(tables), folder, resume=begun)
    except (Stopped, KeyboardInterrupt):
        if multiprocessing.parent_process() is None:
            raise
        os._exit(1)  # an exception would only make the pool's worker take up the next run
    except FedsimError as e:
        return str(e)
    return None


def _is_done(folder: Path) -> bool:
    return (folder / record.SUMMARY).exists() and _summary(folder).get("status") == "completed"


def _summary(folder: Path) -> dict[str, Any]:
    return record.read_summary(folder) or {}


def _load(spec: Claims, axes: Mapping[str, dict[str, tuple[Any, ...]]], jobs: Sequence[Job]) -> dict[str, Grid]:
    """The results of all runs, in the order of their jobs: by cell, then by seed."""
    grids = {name: Grid(a, [[] for _ in claims.settings(a)]) for name, a in axes.items()}
    drawn = {picture.embeddings for picture in spec.pictures}
    for job in jobs:
        summary = _summary(job.folder)
        if job.run in drawn:
            summary |= {"embedding_separation": _separation(job)}
        grids[job.run].results[job.cell].append(Result(record.read_lines(job.folder), summary))
    return grids


def _separation(job: Job) -> float | None:
    moved = embeddings.read(config.parse(job.tables), job.folder)
    return None if moved is None else embeddings.separation(moved.moves, moved.groups)


def _judge(claim: Claim, grids: Mapping[str, Grid]) -> dict[str, Any]:
    """A claim as it goes into ``results.json``, with its comparisons and those of them that failed."""
    verdicts = [claims.judge(text, grids) for text in claim.holds]
    tables = {text: t for verdict in verdicts for text, t in verdict.figures.items()}
    tables |= {text: claims.table(text, grids) for text in claim.figures}
    return {
        "name": claim.name,
        "paper": claim.paper,
        "holds": all(verdict.holds for verdict in verdicts),
        "claim": claim.holds,
        "failed": [text for text, verdict in zip(claim.holds, verdicts, strict=True) if not verdict.holds],
        "figures": {name: stat for text, t in tables.items() for name, stat in _stats(text, t)},
    }


def _stats(text: str, t: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Mean and standard deviation (n − 1) over seeds, a cell at a time."""
    for cell, row in zip(t.cells, t.values, strict=True):
        sd = float(np.std(row, ddof=1)) if len(row) > 1 else None
        yield (
            f"{text} [{cell}]" if cell else text,
            record.strict({"mean": _round(np.mean(row)), "sd": sd and _round(sd), "n": len(row)}),
        )


def _round(x: Any) -> float:
    """Six digits: more would say more than a mean over a few seeds knows."""
    return float(f"{float(x):.6g}")


def _print(spec: Claims, judged: Sequence[Mapping[str, Any]], seconds: float) -> None:
    print(f"\n{spec.title}: mean ± sd over {len(spec.seeds)} seeds, {seconds / 60:.1f} minutes\n")
    for claim in judged:
        print(f"{'HOLDS     ' if claim['holds'] else 'DOES NOT  '} {claim['name']}\n           paper: {claim['paper']}")
        for text in claim["claim"]:
            print(f"           {'✗' if text in claim['failed'] else '✓'} {text}")
        for name, stat in claim["figures"].items():
            print(f"             {name:<56} {_text(stat)}")
    held = sum(claim["holds"] for claim in judged)
    print(f"\n{held} of {len(judged)} claims hold")


def _text(stat: Mapping[str, Any]) -> str:
    if stat["mean"] is None:
        return "-"
    sd = stat["sd"] or 0.0
    return f"{stat['mean']:.4g}" + (f" ± {sd:.2g}" if sd > 1e-9 * abs(stat["mean"]) else "")  # less is rounding


def _compare(path: Path, judged: Sequence[Mapping[str, Any]]) -> None:
    """Say which figures are not what ``expected.toml`` has."""
    if not path.exists():
        return
    found = {name: stat for claim in judged for name, stat in claim["figures"].items()}
    expected = config.read(path).get("figures", {})
    known = {name: e for name, e in expected.items() if name in found}
    off = [
        f"{name}: {_text(found[name])}, expected {e['mean']:.4g} ± {e['tolerance']:.2g}"
        for name, e in known.items()
        if found[name]["mean"] is None or abs(found[name]["mean"] - e["mean"]) > e["tolerance"]
    ]
    print(f"{len(known) - len(off)} of {len(expected)} expected figures are within their tolerance")
    for line in [*off, *(f"{name}: was not measured" for name in expected.keys() - found.keys())]:
        print(f"  {line}")


def _accept(path: Path, judged: Sequence[Mapping[str, Any]]) -> None:
    """Write these figures as the expected ones."""
    table = {
        name: {
            "mean": stat["mean"],
            "sd": stat["sd"] or 0.0,
            "tolerance": _round(max(TOLERANCE * (stat["sd"] or 0.0), abs(stat["mean"]) / 100)),
        }
        for claim in judged
        for name, stat in claim["figures"].items()
        if stat["mean"] is not None
    }
    head = "# Mean and sd over seeds, and how far from the mean a new measurement may lie.\n"
    files.write(path, head.encode() + tomli_w.dumps({"figures": table}).encode())


def _curve(text: str, grids: Mapping[str, Grid]) -> list[Result]:
    """The results, one a seed, of ``run`` or ``run(axis=value, …)``; of several cells, their ``mean(…)``."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        over = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "mean"
        if isinstance(node, ast.Call) and over:
            (node,) = node.args
        fixed = {k.arg or "": ast.literal_eval(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
    except (SyntaxError, ValueError):
        raise ConfigError(f"{text}: cannot be read as a run") from None
    name = node.func if isinstance(node, ast.Call) else node
    if not isinstance(name, ast.Name) or name.id not in grids:
        raise ConfigError(f"{text}: no such run (there are {', '.join(grids)})")
    cells = list(claims.select(grids[name.id], fixed, text).values())
    if over:
        return [_averaged(of_seed) for of_seed in zip(*cells, strict=True)]
    if len(cells) != 1:
        raise ConfigError(f"{text}: a curve is one cell, and this is {len(cells)}; mean({text}) is one")
    return cells[0]


def _averaged(results: Sequence[Result]) -> Result:
    """Line by line, the mean of every number that all of them have."""
    lines = []
    for at in zip(*(r.lines for r in results), strict=False):
        numbers = [k for k in at[0] if all(isinstance(line.get(k), int | float) for line in at)]
        lines.append({k: sum(line[k] for line in at) / len(at) for k in numbers})
    return Result(lines, {})


def _page(page: Page, grids: Mapping[str, Grid]) -> str:
    """Raises ``ConfigError`` for a figure of several cells."""
    lines = [["", *page.columns], ["---"] * (1 + len(page.columns))]
    for name, row in page.rows.items():
        cells = []
        for text in row:
            found = list(_stats(text, claims.table(text, grids))) if text else []
            if len(found) > 1:
                raise ConfigError(f"{text}: a cell of a table is one figure, and this is {len(found)}")
            cells.append(_text(found[0][1]) if found else "")
        lines.append([name, *cells])
    return f"# {page.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _draw(picture: Picture, grids: Mapping[str, Grid], jobs: Sequence[Job]) -> bytes:
    if picture.embeddings is not None:
        job = next(job for job in jobs if job.run == picture.embeddings)
        embeddings.draw(config.parse(job.tables), job.folder)
        return (job.folder / embeddings.PICTURE).read_bytes()
    curves = []
    for label, text in picture.curves.items():
        found = [
            {r["round"]: r[picture.key] for r in result.lines if r.get(picture.key) is not None}
            for result in _curve(text, grids)
        ]
        where = [{r["round"]: r.get(picture.x) for r in result.lines} for result in _curve(text, grids)]
        rounds = sorted(set.intersection(*map(set, found)))
        values = np.array([[f[at] for at in rounds] for f in found])
        band = values.std(axis=0, ddof=1).tolist() if len(found) > 1 else None
        xs = np.array([[w[at] for at in rounds] for w in where], dtype=float).mean(axis=0).tolist()
        curves.append(figures.Curve(label, xs, values.mean(axis=0).tolist(), band))
    fixed = picture.key.endswith("accuracy")
    svg = figures.chart("picture", picture.title, curves, x=picture.x, wide=True, fixed=fixed)
    return figures.standalone(svg).encode()


def commit(folder: Path) -> str:
    """The commit that is checked out, with "-dirty" where a tracked file differs; "unknown" outside a repository.

    What reproductions write themselves decides no number: one after another, in a clone, leaves all of them clean.
    """

    def git(*command: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(folder.resolve()), *command], capture_output=True, text=True, check=True, timeout=30
        )
        return answer.stdout.strip()

    try:
        head, top = git("rev-parse", "HEAD"), git("rev-parse", "--show-toplevel")
        written = [f":(top,exclude,glob)**/{name}" for name in WRITTEN]
        return head + "-dirty" * bool(git("-C", top, "diff", "--name-only", "HEAD", "--", ".", *written))
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def machine() -> str:
    """Processor and number of cores; nothing that says whose machine it is."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        model = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.machine()
    return f"{model}, {os.cpu_count()} cores, {platform.system()}"
