"""What a run comes from that its config only names: a user's own code, and how a partition gives out the examples.

Both may change under the same config, and a run that goes on, or that is compared, must not take one for the other.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from fedsim import record, registry
from fedsim.config import Experiment
from fedsim.data.dataset import Federation

HOME, OURS = Path(__file__).resolve().parent.parent, ("fedsim", "clients", "server", "strategies")
KNOWN = [name.replace("-", "_") for name in record.PACKAGES]  # their versions say what they are
KEPT = ("sources", "earlier_sources", "partition")  # of an origin, in the summary of a run
CLIENTS = 16  # whose examples are looked at: a million clients are not to be drawn


def files(experiment: Experiment) -> dict[str, str]:
    """The SHA-256 of each file of a user's own code behind an experiment, by its path below where it is imported from.

    These are the files of its plugins, and those beside them that they import. Not among them is what has a version in
    ``environment``; a plugin of another installed package stands for itself, without its imports. Its plugins must have
    been loaded.
    """
    plugins = {
        "strategies": experiment.strategy.name,
        "tasks": experiment.task.model,
        "datasets": experiment.data.dataset.name,
        "partitioners": experiment.data.partition.name,
    }
    found: dict[str, str] = {}
    for group, name in plugins.items():
        if where := _where(group, name):
            _read(*where, found)
    return dict(sorted(found.items()))


def partition(federation: Federation) -> str:
    """A digest of who holds what: of the number of clients, and of the examples of some of them."""
    count = len(federation)
    digest = sha256(str(count).encode())
    for client in sorted({i * (count - 1) // (CLIENTS - 1) for i in range(CLIENTS)}):
        held = np.asarray(federation.partition[client], dtype=np.int64)
        digest.update(f" {client} {len(held)} ".encode() + held.tobytes())
    return digest.hexdigest()


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is another between two origins: files, and the partition. Nothing where ``before`` is older than this."""
    if "sources" not in before:
        return []
    was, are = before["sources"], now["sources"]
    names = [name for name in sorted(was.keys() | are.keys()) if was.get(name) != are.get(name)]
    return names + ["the partition (clients hold other examples)"] * (before["partition"] != now["partition"])


def continued(before: Mapping[str, Any], now: Mapping[str, Any], done: int, rounds: int) -> dict[str, Any]:
    """The origin of a run that goes on after round ``done``: ``now``, and the code of earlier rounds if it was another.

    Where all ``rounds`` are done, that of ``before``: the code of now has computed none of them.
    """
    kept = {name: before[name] for name in KEPT if name in before}
    if done >= rounds:
        return {**now, **kept}
    earlier = kept.get("earlier_sources", [])
    if kept and kept["sources"] != now["sources"]:
        earlier = [*earlier, {"until_round": done, **kept["sources"]}]
    return {**now, **({"earlier_sources": earlier} if earlier else {})}


def _where(group: str, name: str) -> tuple[Path, Path] | None:
    """The file of a plugin that is a user's, and the folder that its module is imported from."""
    entry = registry.installed(group).get(name)
    module = (entry.value if entry else name).partition(":")[0]
    if module.endswith(".py"):
        module = Path(module).stem  # as the registry calls it
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "").resolve()
    if not file.is_file() or (_installed(file) and module.partition(".")[0] in KNOWN):
        return None
    return file, file.parents[module.count(".") + (file.name == "__init__.py")]


def _installed(file: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(file.parts)


def _read(file: Path, root: Path, found: dict[str, str]) -> None:
    """Add a file, and what it imports from below ``root``."""
    name = file.relative_to(root)
    if str(name) in found or (root == HOME and name.parts[0] in OURS):
        return
    content = file.read_bytes()
    found[str(name)] = sha256(content).hexdigest()
    if file.suffix == ".py" and not _installed(file):
        packages = [root / folder / "__init__.py" for folder in name.parents[:-1]]
        for needed in (*packages, *_imported(content, file, root)):
            if root in needed.parents and needed.is_file():
                _read(needed, root, found)


def _imported(content: bytes, file: Path, root: Path) -> Iterator[Path]:
    """The files that a file imports, if they lie there: below ``root``, or beside it."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # it may be imported where it is not needed, and nobody has asked for it
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [root.joinpath(*alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = file.parents[node.level - 1] if node.level else root
            module = start.joinpath(*(node.module or "").split("."))
            paths = [module, *(module / alias.name for alias in node.names)]
        else:
            continue
        for path in paths:
            yield path / "__init__.py"
            yield path.with_name(f"{path.name}.py")
