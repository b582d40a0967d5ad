"""Checkpoints: written whole or not at all, verified when read, never a pickle.

A value (named tuples, dicts, lists, numbers, tensors, arrays) is one safetensors file: its tensors, and its structure
as JSON in the header. A checkpoint is a folder that appears by one rename. Clients' memories are files of their own,
written when they change, so that a checkpoint costs O(cohort) and not O(population).

    checkpoint/round-00000012/manifest.json  state.safetensors
    checkpoint/clients/7-12.safetensors            what client 7 remembers since round 12
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from fedsim.errors import ResumeError
from fedsim.files import sync, write, write_new
from fedsim.memory import Memory

log = logging.getLogger("fedsim")

FORMAT = 1


class Checkpoint(NamedTuple):
    """What a run needs to go on as if it had never stopped."""

    round: int
    config: dict[str, Any]
    state: Any
    memory: Mapping[int, Any]  # read when it is asked for: a population's need not fit into memory
    extra: dict[str, Any]


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The structure of a value as JSON; its tensors are added to ``tensors``. ``TypeError`` for what is not a value."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().clone().contiguous()
            return {"tensor": name}
        case np.ndarray():
            name = str(len(tensors))
            tensors[name] = torch.from_numpy(value.copy())
            return {"array": name}
        case np.generic():
            return encode(value.item(), tensors)
        case bytes():
            return {"bytes": value.hex()}
        case tuple() if hasattr(value, "_fields"):
            return {"named": type(value).__qualname__, "fields": [encode(v, tensors) for v in value]}
        case tuple():
            return {"tuple": [encode(v, tensors) for v in value]}
        case list():
            return {"list": [encode(v, tensors) for v in value]}
        case dict() if type(value) is dict:  # a Counter or a defaultdict would come back as something else
            return {"dict": [[encode(k, tensors), encode(v, tensors)] for k, v in value.items()]}
    raise TypeError(f"a {type(value).__module__}.{type(value).__qualname__} cannot be put in a checkpoint")


def decode(structure: Any, tensors: Mapping[str, Tensor], named: Mapping[str, type]) -> Any:
    """The value of a structure. ``named`` gives the named tuples that may occur, by qualified name."""
    if not isinstance(structure, dict):
        return structure
    match structure:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"array": str(name)}:
            return tensors[name].numpy()
        case {"bytes": str(text)}:
            return bytes.fromhex(text)
        case {"named": str(name), "fields": list(fields)}:
            if name not in named:
                raise ResumeError(f"the checkpoint holds a '{name}', which this strategy does not have")
            known: tuple[str, ...] = getattr(named[name], "_fields", ())
            if len(fields) != len(known):
                raise ResumeError(
                    f"the strategy's state has other fields than the checkpoint's: '{name}' has {len(known)} of them "
                    f"and had {len(fields)}"
                )
            return named[name](*(decode(f, tensors, named) for f in fields))
        case {"tuple": list(items)}:
            return tuple(decode(i, tensors, named) for i in items)
        case {"list": list(items)}:
            return [decode(i, tensors, named) for i in items]
        case {"dict": list(items)}:
            return {decode(k, tensors, named): decode(v, tensors, named) for k, v in items}
    raise ResumeError("the checkpoint has an unknown structure")


def named_tuples(value: Any) -> dict[str, type]:
    """The named-tuple classes inside a value, by qualified name."""
    return {type(v).__qualname__: type(v) for v in _walk(value) if hasattr(v, "_fields")}


def _walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        for v in value.values():
            yield from _walk(v)
    elif isinstance(value, tuple | list):
        for v in value:
            yield from _walk(v)


def pack(value: Any) -> bytes:
    """A value as the bytes of one safetensors file."""
    tensors: dict[str, Tensor] = {}
    structure = encode(value, tensors)
    packed: bytes = to_bytes(tensors, metadata={"structure": json.dumps(structure)})
    return packed


def unpack(path: Path, named: Mapping[str, type]) -> Any:
    """The value in a file. Raises ``ResumeError`` for anything that ``pack`` did not make."""
    try:
        with safe_open(str(path), "pt") as f:
            tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
            return decode(json.loads((f.metadata() or {})["structure"]), tensors, named)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as e:
        raise ResumeError(f"{path}: damaged ({type(e).__name__})") from e


class Memories(Mapping[int, Any]):
    """Clients' memories in the files of a checkpoint, each read when it is asked for."""

    def __init__(self, paths: Mapping[int, Path], named: Mapping[str, type]) -> None:
        self.paths, self._named = paths, named

    def __getitem__(self, client: int) -> Any:
        return unpack(self.paths[client], self._named)

    def __iter__(self) -> Iterator[int]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


class Store:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._since: dict[int, tuple[int, str]] = {}  # client -> the round that last wrote its memory, and its hash
        self._needs: dict[str, frozenset[str]] = {}  # of checkpoints known to be whole, by name: their clients' files
        self._old: set[str] | None = None  # clients' files that a newer one has followed; None: not looked for yet

    def save(self, round: int, config: Mapping[str, Any], state: Any, memory: Memory, extra: Mapping[str, Any]) -> None:
        """Write the checkpoint of a round; older ones beyond ``keep`` go, and memories that none of them needs.

        Files are written for clients whose memory has changed. The manifest names all that remember: 5 µs for each.
        """
        clients = self._folder / "clients"
        clients.mkdir(parents=True, exist_ok=True)
        write_new(clients, self._memories(round, memory))
        packed = pack(state)
        manifest = {
            "format": FORMAT,
            "round": round,
            "config": config,
            "sha256": {"state.safetensors": sha256(packed).hexdigest()},
            "memory": {str(client): [round, digest] for client, (round, digest) in self._since.items()},
            "extra": dict(extra),
        }
        final = self._folder / f"round-{round:08d}"
        temporary = self._folder / f".round-{round:08d}.tmp"
        for stale in (final, temporary):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        write(temporary / "state.safetensors", packed)
        text = _text(manifest)
        write(temporary / "manifest.json", text[:-1] + f', "self": "{sha256(text).hexdigest()}"}}'.encode())
        os.rename(temporary, final)
        sync(self._folder)
        self._needs[final.name] = _files(manifest)
        memory.changed.clear()
        self._forget()

    def _memories(self, round: int, memory: Memory) -> Iterator[tuple[str, bytes]]:
        """What has changed, as files, each noted as it goes."""
        for client in sorted(memory.changed):
            packed = pack(memory.get(client))
            if self._old is not None and client in self._since:
                self._old.add(f"{client}-{self._since[client][0]}.safetensors")
            self._since[client] = round, sha256(packed).hexdigest()
            yield f"{client}-{round}.safetensors", packed

    def load(self, named: Mapping[str, type]) -> Checkpoint:
        """The newest checkpoint that is whole. Raises ``ResumeError`` where there is none."""
        reasons = []
        for folder in sorted(self._folder.glob("round-*"), reverse=True):
            try:
                found = self._read(folder, named)
            except ResumeError as e:
                reasons.append(str(e))
                log.warning("%s; trying an older checkpoint", e)
                continue
            return found
        raise ResumeError(reasons[0] if reasons else f"{self._folder}: no checkpoint to resume from")

    def peek(self) -> dict[str, Any]:
        """The config of the newest checkpoint whose manifest can be read, without its tensors."""
        for folder in sorted(self._folder.glob("round-*"), reverse=True):
            try:
                return dict(_manifest(folder)["config"])
            except ResumeError as e:
                log.warning("%s; trying an older checkpoint", e)
        raise ResumeError(f"{self._folder}: no checkpoint to resume from")

    def _read(self, folder: Path, named: Mapping[str, type]) -> Checkpoint:
        manifest = _manifest(folder)
        for name, digest in manifest["sha256"].items():
            _verify(folder / name, digest)
        since = {int(client): (int(round), str(digest)) for client, (round, digest) in manifest["memory"].items()}
        memory = Memories({c: self._folder / "clients" / f"{c}-{r}.safetensors" for c, (r, _) in since.items()}, named)
        for client, (_, digest) in since.items():
            _verify(memory.paths[client], digest)
        state = unpack(folder / "state.safetensors", named)
        self._since = since
        return Checkpoint(manifest["round"], manifest["config"], state, memory, manifest["extra"])

    def _forget(self) -> None:
        kept: list[frozenset[str]] = []
        for folder in sorted(self._folder.glob("round-*"), reverse=True):
            if folder.name not in self._needs:
                try:
                    self._needs[folder.name] = _files(_manifest(folder))
                except ResumeError:
                    continue  # of no use, but not ours to judge: it may be of another version
            if len(kept) < self._keep:
                kept.append(self._needs[folder.name])
            else:
                shutil.rmtree(folder)
                del self._needs[folder.name]
        clients = self._folder / "clients"
        if self._old is None:  # of all that ever were here, once; from then on of those that have changed
            self._old = {path.name for path in clients.iterdir()}
        gone = {name for name in self._old if not any(name in files for files in kept)}
        for name in gone:
            (clients / name).unlink(missing_ok=True)
        self._old = self._old - gone - kept[0]  # what the newest needs, none has followed yet


def _text(manifest: Mapping[str, Any]) -> bytes:
    """A manifest's content, whose hash it carries itself."""
    return json.dumps(manifest, sort_keys=True).encode()


def _files(manifest: Mapping[str, Any]) -> frozenset[str]:
    """The clients' files that a checkpoint refers to."""
    return frozenset(f"{client}-{round}.safetensors" for client, (round, _) in manifest["memory"].items())


def _verify(path: Path, digest: str) -> None:
    try:
        data = path.read_bytes()
    except OSError as e:
        raise ResumeError(f"{path}: {e.strerror}") from e
    if sha256(data).hexdigest() != digest:
        raise ResumeError(f"{path}: damaged (its checksum differs)")


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, with the keys of this format."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as e:
        raise ResumeError(f"{path}: damaged ({type(e).__name__})") from e
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else "none"
        raise ResumeError(f"{path}: written in format {found}, this version reads {FORMAT}")
    seal = manifest.pop("self", None)
    if seal != sha256(_text(manifest)).hexdigest():
        raise ResumeError(f"{path}: damaged (its checksum differs)")
    return manifest
