"""Plugins by name. Ours are registered in the same way as a stranger's: by entry points.

A name is an entry point of the group, ``package.module:object``, a file of one's own (``mine.py``), or an object in one
(``mine.py:object``). What it gives is a module or object with ``Config`` and ``build``, or a class of Flower's
(strategies), or a function that returns an ``nn.Module`` (tasks).

Files and modules of one's own are looked for beside the experiment (``look_in``), then in the working directory.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from fedsim import errors
from fedsim.errors import ConfigError, did_you_mean

GROUPS = ("strategies", "tasks", "datasets", "partitioners")
_beside: list[Path] = []


@cache
def _entries(group: str) -> dict[str, list[EntryPoint]]:
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=f"fedsim.{group}"):
        found.setdefault(entry.name, {})[entry.value] = entry
    return {name: [of[value] for value in sorted(of)] for name, of in sorted(found.items())}


def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name; nothing is imported. Of a name that two packages claim, the first."""
    return {name: entries[0] for name, entries in _entries(group).items()}


def clashes(group: str) -> dict[str, list[str]]:
    """Names that two packages claim, with what they stand for. To use one is an error; to have one installed is not."""
    return {name: [e.value for e in entries] for name, entries in _entries(group).items() if len(entries) > 1}


def look_in(*folders: Path) -> None:
    """From now on, files and modules of one's own are looked for in these folders before the working directory."""
    _beside[:] = [folder.resolve() for folder in folders]


def folders() -> list[Path]:
    """Where files and modules of one's own are looked for, in this order."""
    return list(dict.fromkeys([*_beside, Path.cwd()]))


def see_folders() -> None:
    """Let modules be imported from ``folders``: a console script does not even see where it is called from."""
    for folder in folders():
        if str(folder) not in sys.path and not (folder == Path.cwd() and "" in sys.path):
            importlib.invalidate_caches()
            sys.path.append(str(folder))


def file_of(name: str) -> tuple[str, list[str]] | None:
    """The file that a name stands for, and the way to the object in it; None for a name of another kind."""
    file, _, attribute = name.rpartition(":")
    if name.endswith(".py"):
        return name, []
    return (file, attribute.split(".")) if file.endswith(".py") else None


def is_own(name: str) -> bool:
    """Whether a name says itself where the plugin lies: ``package.module:object``, a file, or an object in one."""
    return ":" in name or name.endswith(".py")


def own(name: str) -> Any:
    """The object, or the module, of such a name. Raises ``ConfigError`` where it cannot be imported."""
    see_folders()
    file = file_of(name)
    if file is None:
        return _loaded(f"'{name}'", EntryPoint(name, name, "fedsim").load)
    path, attributes = file
    return _loaded(f"'{name}'", lambda: reduce(getattr, attributes, _file(Path(path))))


def _loaded(of: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:  # a module that ends the program would end ours
        reason = " ".join(str(e).split())
        raise ConfigError(f"plugin {of} cannot be loaded: {type(e).__name__}: {reason}") from e


def load(group: str, name: str) -> Any:
    """The plugin of this name. Raises ``ConfigError``: unknown name (nearest one suggested), or broken plugin."""
    known, of = installed(group), f"'{name}'"
    if is_own(name):
        plugin = own(name)
    elif name in clashes(group):
        raise ConfigError(f"two plugins are named {of}: {' and '.join(clashes(group)[name])}")
    elif name in known:
        of = f"{of} ({known[name].value})"
        plugin = _loaded(of, known[name].load)
    else:
        raise ConfigError(f"{of} not found{did_you_mean(name, list(known))} (installed: {', '.join(known)})")
    if group == "strategies" and isinstance(plugin, type) and not hasattr(plugin, "Config"):
        # A class that is no plugin can only be a strategy of Flower's; the adapter that runs it lives at the edge.
        return importlib.import_module("strategies.flower").plugin(name, plugin)
    if group == "tasks" and callable(plugin) and not hasattr(plugin, "Config"):
        return importlib.import_module("fedsim.tasks").plugin(name, plugin)  # a function that returns an nn.Module
    for needed in ("Config", "build"):
        if not hasattr(plugin, needed):
            hint = f"; an object in it is named '{name}:OBJECT'" if name.endswith(".py") else ""
            raise ConfigError(f"plugin {of} has no '{needed}'{hint}")
    return plugin


def build(group: str, name: str, where: str, *args: Any) -> Any:
    """What the plugin makes of its arguments. ``where`` is the key that names it.

    Raises ``ConfigError``: its own, and one for any other exception.
    """
    try:
        return load(group, name).build(*args)
    except ConfigError:
        raise
    except Exception as e:
        what = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise ConfigError(f"{where}: '{name}' cannot be built: {what} ({errors.where(e)})") from e


def _file(path: Path) -> ModuleType:
    """The module in a file, loaded once."""
    places = [(folder / path).resolve() for folder in folders()]
    where = next((place for place in places if place.is_file()), places[-1])
    loaded = sys.modules.get(where.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() == where:
        return loaded
    if loaded is not None:
        raise ConfigError(f"'{path}': a module '{where.stem}' is already loaded from elsewhere; rename the file")
    spec = importlib.util.spec_from_file_location(where.stem, where)
    if spec is None or spec.loader is None or not where.is_file():
        raise ConfigError(f"'{path}': no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[where.stem] = module  # classes find their module by name, and so does whoever pickles them
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[where.stem]
        raise
    return module
