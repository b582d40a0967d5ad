"""Plugins in words, for ``fedsim list`` and ``fedsim show``: what each is, and what can be set."""

import ast
import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

LONG = 100
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def summary(entry: EntryPoint) -> str:
    """The first sentence of a plugin's docstring, read without importing it; without one, what the name stands for."""
    module, _, attribute = entry.value.partition(":")
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None:
            return entry.value
        path = Path(spec.origin)
        path = path.parent.joinpath(*rest).with_suffix(".py") if rest else path
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, ImportError):
        return entry.value
    said = _of_object(tree, attribute) if attribute else ast.get_docstring(tree)
    return _first_sentence(said).removeprefix(f"{entry.name}: ") if said else entry.value


def _of_object(tree: ast.Module, name: str) -> str | None:
    """The docstring of ``name`` in a module; of ``name = Partitioner(NameConfig, …)``, that of the config."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name in classes:
        return ast.get_docstring(classes[name])
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            args = node.value.args if isinstance(node.value, ast.Call) else []
            used = [n.id for arg in args for n in ast.walk(arg) if isinstance(n, ast.Name) and n.id in classes]
            return next((doc for doc in map(ast.get_docstring, (classes[u] for u in used)) if doc), None)
    return None


def _first_sentence(text: str) -> str:
    """Of the first paragraph; a full stop inside brackets or before a small letter ends nothing."""
    line = text.strip().split("\n\n")[0].replace("\n", " ").replace("`", "")
    depth = 0
    for i, c in enumerate(line):
        depth += (c in "([") - (c in ")]")
        if c == "." and depth == 0 and line[i + 1 : i + 2] == " " and not line[i + 2 : i + 3].islower():
            line = line[:i]
            break
    line = line.rstrip(".:")
    return line if len(line) <= LONG else f"{line[: LONG - 1]}…"


def about(plugin: Any) -> str:
    """A plugin's own docstring: its module's, its class's, or else that of its ``Config``."""
    own = inspect.isclass(plugin) or isinstance(plugin, ModuleType) or "__doc__" in getattr(plugin, "__dict__", {})
    return inspect.cleandoc((plugin.__doc__ if own else None) or plugin.Config.__doc__ or "")


def settings(model: type[BaseModel]) -> list[str]:
    """A line for each key of a ``Config``: name, what may stand there, default, meaning."""
    rows = []
    for key, field in model.model_fields.items():
        default = "(required)" if field.is_required() else _written(field.get_default(call_default_factory=True))
        main, *none = kind(field.annotation).rsplit(" | nothing", 1)
        allowed = " ".join([main, *_bounds(field), *("or nothing" for _ in none)])
        rows.append((key, allowed, default, field.description or ""))
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns; a wide cell widens its own line only."""
    widths = [min(max(map(len, column), default=0), 28) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def kind(annotation: Any) -> str:
    """A type as a person would write it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "nothing"
    if origin is Literal:
        return " | ".join(map(_written, args))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(kind, args)))
    if origin is Annotated:
        return " ".join([kind(args[0]), *_bounds(args[1:])])
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        name = annotation.model_fields.get("name")
        return f"{{name = {kind(name.annotation)}, …}}" if name else "{…}"
    if origin in (tuple, list):
        return f"[{kind(args[0])}, …]" if args else "[…]"
    if origin is dict or annotation is dict:
        return "{…}"
    names = {int: "whole number", float: "number", str: "text", bool: "true | false"}
    return names.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _bounds(of: FieldInfo | Iterable[Any]) -> list[str]:
    marks = of.metadata if isinstance(of, FieldInfo) else of
    return [
        f"{sign} {getattr(mark, name):g}"
        for mark in marks
        for name, sign in SIGNS.items()
        if isinstance(getattr(mark, name, None), int | float)
    ]


def _written(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if value is None:
        return "-"
    return str(list(value)) if isinstance(value, tuple) else str(value)
