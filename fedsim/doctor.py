"""``fedsim doctor``: what this installation and this machine can do, and what is wrong with them."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fedsim import offline, registry
from fedsim.errors import ConfigError

PACKAGES = ("clients", "server", "strategies")
NEEDED = ("torch", "flwr", "pydantic", "numpy", "scikit-learn", "safetensors", "flwr-datasets")
EXTRAS = {"ray": "ray", "opacus": "privacy", "dp-accounting": "privacy", "transformers": "text", "peft": "text"}
LITTLE_DISK = 1 << 30


class Finding(NamedTuple):
    """A line of the report; ``problem`` says what to do where something is wrong."""

    what: str
    found: str
    problem: str | None = None


def run() -> list[str]:
    """Print what was found, line by line, and return the problems."""
    problems = []
    for finding in findings():
        print(f"{finding.what:<14} {finding.found}", flush=True)
        if finding.problem:
            problems.append(f"{finding.what}: {finding.problem}")
    return problems


def findings() -> Iterator[Finding]:
    yield from _versions()
    yield from _packages()
    yield from _machine()
    yield from _switches()
    yield from _plugins()
    yield from _data()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    import platform

    yield Finding("python", platform.python_version())
    own = _version("fedsim-engine")
    bare = None if own else "not installed, so there are no plugins: pip install -e ."
    yield Finding("fedsim", own or "a bare checkout", bare)
    for name in NEEDED:
        found = _version(name)
        yield Finding(name, found or "missing", None if found else f"pip install {name}")
    for name, extra in EXTRAS.items():
        yield Finding(name, _version(name) or f"not installed (extra: {extra})")


def roots() -> dict[str, Path | None]:
    """The folder that each of the four packages comes from."""
    out: dict[str, Path | None] = {}
    for name in ("fedsim", *PACKAGES):
        found = importlib.util.find_spec(name)
        out[name] = Path(found.origin).parent.parent if found and found.origin else None
    return out


def _packages() -> Iterator[Finding]:
    found = roots()
    home = found["fedsim"]
    for name in PACKAGES:
        if found[name] != home:
            yield Finding("packages", f"{name} from {found[name]}", f"a stranger hides our package '{name}' of {home}")
    if set(found.values()) == {home}:
        yield Finding("packages", f"fedsim, clients, server, strategies from {home}")


def _machine() -> Iterator[Finding]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", f"{usable} of {os.cpu_count()} usable, {torch.get_num_threads()} thread a process")
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (os.sysconf(name) * page / 1e9 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        yield Finding("memory", f"{total:.1f} GB, {free:.1f} GB free")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            yield Finding("GPU", f"{about.name}, {about.total_memory / 1e9:.1f} GB")
    else:
        yield Finding("GPU", "none that torch sees")
    disk = shutil.disk_usage(Path.cwd())
    little = f"{disk.free / 1e9:.1f} GB left for runs here" if disk.free < LITTLE_DISK else None
    yield Finding("disk", f"{disk.free / 1e9:.1f} GB free in {Path.cwd()}", little)


def _switches() -> Iterator[Finding]:
    wrong = [name for name, value in offline.QUIET.items() if os.environ.get(name) != value]
    yield Finding(
        "telemetry",
        "off (Flower, Ray, Hugging Face)" if not wrong else f"not off: {', '.join(wrong)}",
        f"set {' '.join(f'{name}={offline.QUIET[name]}' for name in wrong)}" if wrong else None,
    )


def _plugins() -> Iterator[Finding]:
    for group in registry.GROUPS:
        names, broken = registry.installed(group), []
        for name in names:
            try:
                registry.load(group, name)
            except ConfigError as e:
                broken.append(str(e))
        yield Finding(group, f"{len(names) - len(broken)} of {len(names)} load", "; ".join(broken) or None)


def _data() -> Iterator[Finding]:
    from fedsim.data import fetch

    here = [row.name for row in fetch.table() if row.here]
    absent = [row.name for row in fetch.table() if not row.here]
    yield Finding("data here", ", ".join(here) or "none")
    yield Finding("data to get", f"{', '.join(absent) or 'none'} (fedsim data get NAME; kept in {fetch.folder()})")
