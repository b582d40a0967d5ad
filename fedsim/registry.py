"""Plugins by name. Ours are registered in the same way as a stranger's: by entry points.

A name is an entry point of the group, or ``package.module:Class`` for code that is not installed as a plugin. What it
gives is either a module or object with ``Config`` and ``build``, or (strategies) a subclass of Flower's ``Strategy``.
"""

import importlib
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fedsim.errors import ConfigError, did_you_mean

GROUPS = ("strategies", "tasks", "datasets", "partitioners")


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of a group by name. Raises ``ConfigError`` where two packages claim one name."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=f"fedsim.{group}"):
        if entry.name in found and found[entry.name].value != entry.value:
            raise ConfigError(f"two plugins are named '{entry.name}': {found[entry.name].value} and {entry.value}")
        found[entry.name] = entry
    return dict(sorted(found.items()))


def load(group: str, name: str) -> Any:
    """The plugin of this name. Raises ``ConfigError``: unknown name (nearest one suggested), or broken plugin."""
    known = installed(group)
    if ":" in name:
        target, of = EntryPoint(name, name, f"fedsim.{group}"), f"'{name}'"
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            # A console script does not see the folder it is called from; a user's own module usually lies there.
            importlib.invalidate_caches()
            sys.path.append(str(Path.cwd()))
    elif name in known:
        target, of = known[name], f"'{name}' ({known[name].value})"
    else:
        raise ConfigError(f"'{name}' not found{did_you_mean(name, list(known))} (installed: {', '.join(known)})")
    try:
        plugin = target.load()
    except Exception as e:
        raise ConfigError(f"plugin {of} cannot be loaded: {type(e).__name__}: {e}") from e
    if group == "strategies" and isinstance(plugin, type):
        # A class can only be a strategy of Flower's; the adapter that runs it lives at the edge.
        return importlib.import_module("strategies.flower").plugin(name, plugin)
    if group == "tasks" and callable(plugin) and not hasattr(plugin, "Config"):
        return importlib.import_module("fedsim.tasks").plugin(name, plugin)  # a function that returns an nn.Module
    for needed in ("Config", "build"):
        if not hasattr(plugin, needed):
            raise ConfigError(f"plugin {of} has no '{needed}'")
    return plugin
