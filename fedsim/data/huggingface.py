"""`huggingface`: a data set of the Hugging Face Hub by its id, or of a local folder, through the `datasets` library.

An id needs a network where the library has not cached it, and fedsim asks the Hub only where the environment says so:
``HF_HUB_OFFLINE=0 fedsim run …``, once. A folder never needs that. It holds either what
``Dataset.save_to_disk`` wrote, or files that ``datasets.load_dataset`` reads (csv, parquet, folders of images).

Two kinds are read, by the columns of the table. ``image``: pictures of one size, as float32 (N, C, H, W) in [0, 1],
C = 1 for greyscale and 3 for anything else. ``features``: columns with a number each, or with a list of numbers each,
side by side as float32 (N, F); nothing is imputed or scaled. The label is one column: whole numbers or strings,
renumbered 0..K-1 in sorted order, or a ``ClassLabel``, whose own numbers stay. With ``test = ""``, the share
``test_share`` of the training split is held out by a named stream that no seed changes.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedsim.config import DatasetConfig
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError, did_you_mean
from fedsim.rng import Key

Column = npt.NDArray[Any]


class Config(DatasetConfig):
    """Where the data is, and what its columns mean."""

    name: Literal["huggingface"] = "huggingface"
    path: str = Field(min_length=1, description="id on the Hub, or a folder")
    subset: str | None = Field(None, description="configuration of the data set, where it has several")
    revision: str | None = Field(None, description="git revision on the Hub; pin it, or the numbers may move")
    train: str = Field("train", min_length=1, description="split for training")
    test: str = Field("test", description="split for testing; empty: hold out test_share of the training split")
    test_share: float = Field(0.1, gt=0, lt=1)
    image: str | None = Field(None, description="column of images")
    features: list[str] = Field([], description="columns of numbers")
    label: str = "label"
    client: str | None = Field(None, description="column of the natural client")

    @model_validator(mode="after")
    def _one_kind(self) -> "Config":
        if (self.image is None) == (not self.features):
            raise ValueError("image: give either a column of images, or features = [columns of numbers]")
        return self


def build(config: Config) -> Dataset:
    """Raises ``DataError``: offline and not cached; unknown id, split or column; values of another kind."""
    tables = [_table(config, split) for split in (config.train, config.test) if split]
    labels = [_column(table, "label", config.label) for table in tables]
    known, codes = _codes(tables[0].features[config.label], labels, config.label)
    splits = [_split(table, code, config) for table, code in zip(tables, codes)]
    if not config.test:
        n = len(splits[0].y)
        order = Key.root(0).at("huggingface", "split").numpy().permutation(n)
        held = max(1, round(config.test_share * n))
        splits = [_take(splits[0], np.sort(order[held:])), _take(splits[0], np.sort(order[:held]))]
    return Dataset(config.path, splits[0], splits[1], classes=known)


def _table(config: Config, split: str) -> Any:
    """One split, as a ``datasets.Dataset``."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if (Path(config.path) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(config.path)[split]
        return datasets.load_dataset(config.path, config.subset, split=split, revision=config.revision)
    # The library raises some twenty kinds of errors: its own, the Hub's, the network's; they differ by version.
    except Exception as e:
        reason = " ".join(str(e).split())[:300]
        if datasets.config.HF_HUB_OFFLINE and config.path[0] not in "/.~" and not Path(config.path).exists():
            reason += "; it is neither a folder here nor cached: to fetch it from the Hub, set HF_HUB_OFFLINE=0 once"
        raise DataError(f"data.path: {config.path}, split '{split}': {type(e).__name__}: {reason}") from None
    finally:
        if shown:
            datasets.enable_progress_bars()


def _column(table: Any, option: str, name: str) -> Column:
    if name not in table.column_names:
        known = ", ".join(table.column_names)
        raise DataError(f"data.{option}: no column '{name}'{did_you_mean(name, table.column_names)} (columns: {known})")
    try:
        column = np.asarray(table.with_format(None)[name][:])
    except ValueError:  # lists of several lengths
        raise DataError(f"data.{option}: column '{name}' has lists that do not all have one length") from None
    empty = [row for row, cell in enumerate(column) if _is_empty(cell)] if column.dtype == np.object_ else []
    if empty:
        split = f" of split '{table.split}'" if table.split else ""
        raise DataError(
            f"data.{option}: column '{name}' has no value in row {empty[0]}{split}, counted from 0"
            f" ({len(empty)} such row{'s' * (len(empty) > 1)}); nothing is imputed"
        )
    return column


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, list | np.ndarray) and any(map(_is_empty, cell)))


def _codes(feature: Any, labels: list[Column], name: str) -> tuple[int, list[npt.NDArray[np.int64]]]:
    """The number of classes, and each split's labels as 0..K-1."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return feature.num_classes, [column.astype(np.int64) for column in labels]
    for column in labels:
        if column.ndim != 1 or column.dtype.kind not in "iubU":
            raise DataError(
                f"data.label: column '{name}' is not one whole number or string an example ({column.dtype})"
            )
    known = np.unique(labels[0])
    for column in labels[1:]:
        new = np.setdiff1d(column, known)
        if len(new):
            raise DataError(f"data.label: the test split has a label that the training split has not: {new[0]!s}")
    return len(known), [np.searchsorted(known, column).astype(np.int64) for column in labels]


def _split(table: Any, code: npt.NDArray[np.int64], config: Config) -> Split:
    if config.image is not None:
        x = _images(table, config.image)
    else:
        x = torch.cat([_numbers(_column(table, "features", name), name) for name in config.features], dim=1)
    owner = _column(table, "client", config.client).astype(np.str_) if config.client is not None else None
    return Split(x, torch.from_numpy(code), owner)


def _numbers(column: Column, name: str) -> Tensor:
    """(N, F); a column with one number an example is (N, 1)."""
    if column.dtype.kind not in "iufb" or column.ndim > 2:
        raise DataError(f"data.features: column '{name}' is not numbers, or lists that all have one length")
    return torch.from_numpy(column.reshape(len(column), -1).astype(np.float32))


def _images(table: Any, name: str) -> Tensor:
    """(N, C, H, W) in [0, 1]."""
    if name not in table.column_names:
        _column(table, "image", name)
    pictures = []
    for i, picture in enumerate(table.select_columns([name])):
        image = picture[name]
        if not hasattr(image, "convert"):
            raise DataError(f"data.image: column '{name}' has no images (row {i} is a {type(image).__name__})")
        pixels = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
        pictures.append(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
        if pictures[i].shape != pictures[0].shape:
            raise DataError(f"data.image: row {i} has shape {pictures[i].shape}, row 0 has {pictures[0].shape}")
    return torch.from_numpy(np.stack(pictures)).float().div_(255)


def _take(split: Split, rows: npt.NDArray[np.int64]) -> Split:
    client = None if split.client is None else split.client[rows]
    return Split(split.x[rows], split.y[rows], client)
