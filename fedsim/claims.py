"""The small language in which a paper's claims are written, e.g. ``final(cl) > final(fedavg)``.

A figure is a function of a *run*: a named experiment, over a grid of settings and over seeds. Its value is a table, one
row a cell of the grid and one column a seed.

    final(run)            mean of ``key`` over the ``last`` rounds that measured it (accuracy; 5)
    best(run)             highest value of ``key``
    at(run, round)        ``key`` in this round
    reach(run, target)    first round with ``key`` ≥ target; one more than the run has where none is: a lower bound
    fall(run, target)     first round with ``key`` ≤ target, likewise
    total(run)            sum of ``key`` over the rounds
    summary(run)          ``key`` of summary.json
    below(run, level)     1 where ``final`` (the last) is under ``level`` or no number, else 0: the share that collapsed

An axis as a keyword picks cells: ``final(cl, lr=0.01)``, ``final(cl, lr=[0.01, 0.05])``. Of a table ``max`` and ``min``
give the cell with the highest and the lowest mean over seeds, ``mean`` the average cell, ``spread`` is max − min, and
``sd`` is the deviation over seeds. Tables are added, subtracted, multiplied and divided cell by cell and seed by seed.
A comparison is one of means over seeds, and has to hold in every cell. A number that is missing makes it false.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.errors import ConfigError, did_you_mean

Line = Mapping[str, Any]
NAN = float("nan")


class Table(NamedTuple):
    """Values (cells, seeds), NaN where there is none, and a label for each cell."""

    cells: tuple[str, ...]
    values: npt.NDArray[np.float64]


class Result(NamedTuple):
    """What a run left: the lines of metrics.jsonl, and summary.json."""

    lines: Sequence[Line]
    summary: Line


class Grid(NamedTuple):
    """A run's axes with their values, and what is known of each cell (in the order of the product): a result a seed."""

    axes: dict[str, tuple[Any, ...]]
    results: list[list[Result]]


class Judged(NamedTuple):
    """Whether a comparison holds, and every figure that it was made of, by its text."""

    holds: bool
    figures: dict[str, Table]


def _series(result: Result, key: str) -> list[float]:
    """The values of a key in the rounds that measured it; NaN for a number that was not finite."""
    return [NAN if line[key] is None else float(line[key]) for line in result.lines if key in line]


def _first(result: Result, key: str, hit: Callable[[float], bool]) -> float:
    rounds = [line["round"] for line in result.lines if line.get(key) is not None and hit(line[key])]
    return float(rounds[0] if rounds else result.lines[-1]["round"] + 1)


def _final(result: Result, *, key: str = "accuracy", last: int = 5) -> float:
    values = _series(result, key)[-int(last) :]
    return float(np.mean(values)) if values else NAN


def _best(result: Result, *, key: str = "accuracy") -> float:
    values = _series(result, key)
    return float(np.max(values)) if values else NAN


def _at(result: Result, round: float, *, key: str = "accuracy") -> float:
    return next((v for line in result.lines if line["round"] == round for v in _series(Result([line], {}), key)), NAN)


def _reach(result: Result, target: float, *, key: str = "accuracy") -> float:
    return _first(result, key, lambda value: value >= target)


def _fall(result: Result, target: float, *, key: str = "loss") -> float:
    return _first(result, key, lambda value: value <= target)


def _total(result: Result, *, key: str = "bytes_up") -> float:
    return float(np.sum(_series(result, key)))


def _below(result: Result, level: float, *, key: str = "accuracy", last: int = 1) -> float:
    return float(not _final(result, key=key, last=last) >= level)


def _summary(result: Result, *, key: str = "total_bytes_up") -> float:
    value = result.summary.get(key)
    return NAN if value is None else float(value)


MEASURES: dict[str, Callable[..., float]] = {
    "final": _final, "best": _best, "at": _at, "reach": _reach, "fall": _fall, "total": _total, "summary": _summary,
    "below": _below,
}  # fmt: skip
OPTIONS = {"key", "last"}  # keywords that are no axes


def _row(t: Table, pick: Callable[[Any], Any]) -> Table:
    means = t.values.mean(axis=1)
    return Table(
        ("",), t.values[[pick(means)]] if np.isfinite(means).all() else np.full((1, t.values.shape[1]), np.nan)
    )


def _spread(t: Table) -> Table:
    return Table(("",), _row(t, np.argmax).values - _row(t, np.argmin).values)


def _sd(t: Table) -> Table:
    return Table(t.cells, t.values.std(axis=1, ddof=1, keepdims=True))


REDUCTIONS: dict[str, Callable[[Table], Table]] = {
    "max": lambda t: _row(t, np.argmax),
    "min": lambda t: _row(t, np.argmin),
    "mean": lambda t: Table(("",), t.values.mean(axis=0, keepdims=True)),
    "spread": _spread,
    "sd": _sd,
}

ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Eq: operator.eq,
}  # fmt: skip


def judge(text: str, grids: Mapping[str, Grid]) -> Judged:
    """Whether a comparison holds, e.g. ``final(a) >= final(b) > 0.5``. ``ConfigError`` for what is not one."""
    figures: dict[str, Table] = {}
    tree = _parse(text)
    if not isinstance(tree, ast.Compare):
        raise ConfigError(f"{text}: a claim compares, e.g. final(a) > final(b)")
    sides = [_value(node, grids, figures) for node in (tree.left, *tree.comparators)]
    holds = True
    for left, op, right in zip(sides, tree.ops, sides[1:]):
        if type(op) not in COMPARISONS:
            raise ConfigError(f"{text}: compare with >, >=, <, <= or ==")
        a, b = (s.values.mean(axis=1) if isinstance(s, Table) else np.array([s]) for s in _aligned(left, right))
        holds = holds and bool(COMPARISONS[type(op)](a, b).all())
    return Judged(holds, figures)


def table(text: str, grids: Mapping[str, Grid]) -> Table:
    """The value of an expression over runs. ``ConfigError`` for what is not one."""
    value = _value(_parse(text), grids, {})
    if not isinstance(value, Table):
        raise ConfigError(f"{text}: says nothing about a run")
    return value


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as e:
        raise ConfigError(f"{text}: {e.msg}") from None


def _value(node: ast.expr, grids: Mapping[str, Grid], figures: dict[str, Table]) -> Table | float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = _value(inner, grids, figures)
            return Table(value.cells, -value.values) if isinstance(value, Table) else -value
        case ast.BinOp(left=a, op=op, right=b) if type(op) in ARITHMETIC:
            left, right = _aligned(_value(a, grids, figures), _value(b, grids, figures))
            x, y = (side.values if isinstance(side, Table) else side for side in (left, right))
            cells = next((side.cells for side in (left, right) if isinstance(side, Table)), None)
            with np.errstate(divide="ignore", invalid="ignore"):  # a claim over nothing is false
                result = ARITHMETIC[type(op)](x, y)
            if cells is None:
                return float(result)
            if isinstance(left, Table) and isinstance(right, Table):
                figures[ast.unparse(node)] = Table(cells, result)
            return Table(cells, result)
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in REDUCTIONS:
            value = _value(inner, grids, figures)
            if not isinstance(value, Table):
                raise ConfigError(f"{ast.unparse(node)}: {name} is of a table")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # the deviation of one seed is NaN, and is meant to be
                figures[ast.unparse(node)] = REDUCTIONS[name](value)
        case ast.Call(func=ast.Name(id=name), args=[ast.Name(id=run), *_]) if name in MEASURES:
            figures[ast.unparse(node)] = _measure(node, name, run, grids)
        case ast.Call(func=ast.Name(id=name)) if name not in MEASURES and name not in REDUCTIONS:
            raise ConfigError(f"{ast.unparse(node)}: no figure '{name}'{did_you_mean(name, [*MEASURES, *REDUCTIONS])}")
        case _:
            raise ConfigError(f"{ast.unparse(node)}: cannot be read as a figure")
    return figures[ast.unparse(node)]


def _aligned(a: Table | float, b: Table | float) -> tuple[Table | float, Table | float]:
    """Two sides with the same cells; one cell is compared with each of many."""
    if not isinstance(a, Table) or not isinstance(b, Table) or a.cells == b.cells:
        return a, b
    if len(a.cells) == 1:
        return Table(b.cells, np.repeat(a.values, len(b.cells), axis=0)), b
    if len(b.cells) == 1:
        return a, Table(a.cells, np.repeat(b.values, len(a.cells), axis=0))
    raise ConfigError(f"cells differ: {', '.join(a.cells)} and {', '.join(b.cells)}")


def _measure(node: ast.Call, name: str, run: str, grids: Mapping[str, Grid]) -> Table:
    """A measure of the chosen cells of a run."""
    text = ast.unparse(node)
    if run not in grids:
        raise ConfigError(f"{text}: no run '{run}'{did_you_mean(run, list(grids))}")
    try:
        numbers = [ast.literal_eval(arg) for arg in node.args[1:]]
        keywords = {k.arg or "": ast.literal_eval(k.value) for k in node.keywords}
    except ValueError:
        raise ConfigError(f"{text}: the run comes first, then numbers and keywords") from None
    options = {key: keywords.pop(key) for key in OPTIONS & keywords.keys()}
    chosen = select(grids[run], keywords, text)
    try:
        values = [[MEASURES[name](r, *numbers, **options) for r in results] for results in chosen.values()]
    except TypeError:
        raise ConfigError(f"{text}: {name} is not called so") from None
    return Table(tuple(chosen), np.array(values, dtype=np.float64))


def select(grid: Grid, fixed: Mapping[str, Any], text: str) -> dict[str, list[Result]]:
    """The cells in which axes have these values, by a label that names the axes that are still free."""
    wanted: dict[str, list[Any]] = {}
    for axis, value in fixed.items():
        if axis not in grid.axes:
            raise ConfigError(f"{text}: no axis '{axis}'{did_you_mean(axis, list(grid.axes))}")
        wanted[axis] = value if isinstance(value, list) else [value]
        for v in wanted[axis]:
            if v not in grid.axes[axis]:
                raise ConfigError(f"{text}: {axis}={v} was not run (there are {', '.join(map(str, grid.axes[axis]))})")
    free = [axis for axis in grid.axes if isinstance(fixed.get(axis, []), list)]
    chosen = {}
    for setting, results in zip(settings(grid.axes), grid.results, strict=True):
        if all(setting[axis] in values for axis, values in wanted.items()):
            chosen[" ".join(f"{axis}={setting[axis]}" for axis in free)] = results
    return chosen


def settings(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The cells of a grid: the last axis runs fastest."""
    cells: list[dict[str, Any]] = [{}]
    for axis, values in axes.items():
        cells = [cell | {axis: value} for cell in cells for value in values]
    return cells
