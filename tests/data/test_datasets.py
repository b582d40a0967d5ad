# ruff: noqa: E501 - tables of input and answer read best a line a row
"""Data sets: what is bundled loads offline; what was fetched loads, else its test is skipped with the reason."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim import config, registry
from fedsim.config import DataConfig
from fedsim.data import fashion_mnist, federation, fetch, heart_disease, idx, shakespeare
from fedsim.data.dataset import Dataset, Federation, Split, validate
from fedsim.errors import ConfigError, DataError
from fedsim.rng import Key


def load(name: str, **options: Any) -> Dataset:
    plugin = registry.load("datasets", name)
    return validate(plugin.build(plugin.Config(name=name, **options)))


def data(dataset: dict[str, Any], partition: dict[str, Any], **options: Any) -> DataConfig:
    return DataConfig(
        dataset=registry.load("datasets", dataset["name"]).Config(**dataset),
        partition=registry.load("partitioners", partition["name"]).Config(**partition),
        **options,
    )


@pytest.mark.parametrize(("name", "train", "test", "side"), [("digits", 1437, 360, 8), ("mnist_small", 4000, 1000, 28)])
def test_bundled_images(name: str, train: int, test: int, side: int) -> None:
    d = load(name)
    assert d.train.x.shape == (train, 1, side, side) and d.test.x.shape == (test, 1, side, side)
    assert d.train.x.dtype == torch.float32 and d.train.y.dtype == torch.int64 and d.classes == 10
    assert float(d.train.x.min()) == 0.0 and float(d.train.x.max()) == 1.0
    # No example is in both parts, where the source has no duplicate; at most a handful of 8x8 digits may coincide.
    rows = torch.cat([d.train.x, d.test.x]).reshape(train + test, -1)
    assert len(torch.unique(rows, dim=0)) > 0.99 * (train + test)
    again = load(name)
    assert torch.equal(again.train.x, d.train.x) and torch.equal(again.test.y, d.test.y)


def test_mnist_small_is_stratified() -> None:
    d = load("mnist_small")
    assert torch.bincount(d.train.y).tolist() == [400] * 10 and torch.bincount(d.test.y).tolist() == [100] * 10


def test_mnist_small_refuses_other_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "mnist_5k.csv.gz"
    other.write_bytes(b"something else")
    monkeypatch.setattr(fetch, "bundled", lambda name: other)
    with pytest.raises(DataError, match=r"data\.name: mnist_small: .*sha256 differs"):
        load("mnist_small")


def test_a_seed_moves_the_partition_and_not_the_split() -> None:
    c = data({"name": "digits"}, {"name": "iid", "clients": 10}, holdout=0.2)
    a, b = federation(c, 0), federation(c, 1)
    assert torch.equal(a.dataset.test.x, b.dataset.test.x)
    assert a.partition[0].tolist() != b.partition[0].tolist()
    assert a.partition[0].tolist() == federation(c, 0).partition[0].tolist()
    held, kept = a.indices(0, "holdout"), a.indices(0, "train")
    assert sorted([*held, *kept]) == sorted(a.partition[0]) and len(held) == round(0.2 * len(a.partition[0]))


def test_a_users_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_fedsim.py").write_text(
        "import torch\n"
        "from fedsim.config import DatasetConfig\n"
        "from fedsim.data.dataset import Dataset, Split\n"
        "class Config(DatasetConfig):\n"
        "    rows: int = 12\n"
        "class scans:\n"
        "    Config = Config\n"
        "    @staticmethod\n"
        "    def build(config):\n"
        "        split = Split(torch.zeros(config.rows, 2), torch.arange(config.rows) % 3)\n"
        "        return Dataset('scans', split, split, 3)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = federation(data({"name": "mine_for_fedsim:scans", "rows": 9}, {"name": "iid", "clients": 3}), 0)
    assert len(made) == 3 and made.dataset.train.x.shape == (9, 2)


def test_a_partitioner_that_leaves_clients_empty_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_for_fedsim.py").write_text(
        "import numpy as np\n"
        "from fedsim.config import PartitionConfig\n"
        "class bad:\n"
        "    Config = PartitionConfig\n"
        "    @staticmethod\n"
        "    def build(config, dataset, key):\n"
        "        return [np.arange(3), np.arange(0)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DataError, match="bad_for_fedsim:bad leaves client 1 of 2 without examples"):
        federation(data({"name": "digits"}, {"name": "bad_for_fedsim:bad"}), 0)


GOOD = Split(torch.rand(6, 4), torch.arange(6) % 3, np.array(list("aabbcc")))
WRONG: dict[str, tuple[Any, str]] = {
    "a tuple": ((GOOD, GOOD), "data: must be a fedsim.Dataset (got tuple)"),
    "a dict": ({"train": GOOD}, "data: must be a fedsim.Dataset (got dict)"),
    "a pair": (Dataset("mine", (GOOD.x, GOOD.y), GOOD, 3), "data: train and test must be a fedsim.Split (got tuple)"),  # type: ignore[arg-type]
    "no classes": (Dataset("mine", GOOD, GOOD, None), "data: classes must be a whole number of at least 1 (got None)"),  # type: ignore[arg-type]
    "arrays": (GOOD._replace(x=GOOD.x.numpy()), "data: mine train: x must be a torch.Tensor (got ndarray)"),
    "a list": (GOOD._replace(y=[0] * 6), "data: mine train: y must be a torch.Tensor (got list)"),
    "int32": (GOOD._replace(y=GOOD.y.int()), "data: mine train: y must be torch.int64, (N,) or (N, T) (got torch.int32 (6,))"),
    "float": (GOOD._replace(y=GOOD.y.float()), "data: mine train: y must be torch.int64, (N,) or (N, T) (got torch.float32 (6,))"),
    "owners": (GOOD._replace(client=np.array(["a", "b"])), "data: mine train: client must name the owner of each of 6 examples (got (2,))"),
    "numbers": (GOOD._replace(client=np.arange(6)), "data: mine train: client must be a NumPy array of strings (got int64); np.array(…).astype(str) is one"),
    "names": (GOOD._replace(client=list("aabbcc")), "data: mine train: client must be a NumPy array of strings (got list); np.array(…).astype(str) is one"),
    "NaN": (GOOD._replace(x=torch.full((6, 4), torch.nan)), "data: mine train has NaN or Inf in 6 rows (first: row 0)"),
    "labels": (GOOD._replace(y=GOOD.y + 1), "data: mine train has labels 1..3, expected 0..2"),
    "a width": (Dataset("mine", GOOD, GOOD._replace(x=torch.rand(6, 5)), 3), "data: mine x of an example must be float32 (4,) as in train (got float32 (5,) in test)"),
    "a kind": (Dataset("mine", GOOD, GOOD._replace(x=torch.ones(6, 4).long()), 3), "data: mine x of an example must be float32 (4,) as in train (got int64 (4,) in test)"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_own_data_of_other_types_is_refused(what: str) -> None:
    given, said = WRONG[what]
    with pytest.raises(DataError) as e:
        validate(Dataset("mine", given, GOOD, 3) if isinstance(given, Split) else given)
    assert str(e.value) == said


def test_own_data_that_is_right_is_accepted() -> None:
    assert validate(Dataset("mine", GOOD, GOOD, np.int64(3))).classes == 3  # type: ignore[arg-type]


def test_numbers_that_the_dtype_cannot_hold_are_refused() -> None:
    x = torch.rand(6, 4, dtype=torch.float64)
    x[4, 1] = 1e300
    split = Split(x, GOOD.y)
    whole = Federation(validate(Dataset("mine", split, split, 3)), [np.arange(6)], 0.0, Key.root(0))
    assert whole.to(torch.device("cpu"), torch.float64).dataset.train.x[4, 1] == 1e300
    with pytest.raises(
        DataError, match=r"data: mine train has numbers that float32 cannot hold in 1 rows \(first: row 4"
    ):
        whole.to(torch.device("cpu"), torch.float32)


def test_reading_a_config_does_not_import_the_heavy_libraries() -> None:
    code = (
        "import sys; from fedsim import registry\n"
        "for g in ('datasets', 'partitioners'):\n"
        "    for n in registry.installed(g): registry.load(g, n)\n"
        "import fedsim.data, fedsim.data.show, fedsim.data.fetch\n"
        "print([m for m in ('datasets', 'flwr_datasets', 'sklearn', 'matplotlib', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# --- what has to be fetched ------------------------------------------------------------------------------------------


def here(name: str) -> None:
    if not fetch.available()[name]:
        pytest.skip(f"{name} is not here: `fedsim data get {name}`")


def test_mnist() -> None:
    here("mnist")
    d = load("mnist")
    assert d.train.x.shape == (60000, 1, 28, 28) and d.test.x.shape == (10000, 1, 28, 28)
    # The canonical counts, and the canonical mean 0.1307.
    assert torch.bincount(d.train.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(float(d.train.x.mean()) - 0.13066) < 1e-5


def test_fashion_mnist() -> None:
    here("fashion_mnist")
    d = load("fashion_mnist")
    assert d.train.x.shape == (60000, 1, 28, 28) and torch.bincount(d.train.y).tolist() == [6000] * 10
    assert torch.bincount(d.test.y).tolist() == [1000] * 10
    assert abs(float(d.train.x.mean()) - 0.2860) < 1e-4


def test_shakespeare() -> None:
    here("shakespeare")
    d = load("shakespeare")
    assert d.train.client is not None and d.test.client is not None
    assert d.train.x.shape == d.train.y.shape == (45060, 80)
    assert len(np.unique(d.train.client)) == 634 and set(d.test.client.tolist()) <= set(d.train.client.tolist())
    assert torch.equal(d.train.x[:, 1:], d.train.y[:, :-1])
    letters = fetch.load("shakespeare")["vocabulary"]
    hamlet = d.train.x[torch.from_numpy(d.train.client == "hamlet/HAM")]
    assert "".join(letters[hamlet[0].numpy()]).startswith(
        "A little more than kin, and less than kind!\nNot so, my lord"
    )
    few = load("shakespeare", min_characters=20_000, window=40)
    assert 20 < len(np.unique(few.train.client)) < 60 and few.train.x.shape[1] == 40  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"data\.min_characters: no speaker has 1000000 characters"):
        load("shakespeare", min_characters=1_000_000)


def test_heart_disease() -> None:
    here("heart_disease")
    d = load("heart_disease")
    assert d.train.client is not None and d.test.client is not None
    both = np.concatenate([d.train.client, d.test.client])
    names, counts = np.unique(both, return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist())) == {
        "Cleveland": 304, "Hungary": 293, "Switzerland": 123, "VA Long Beach": 200,
    }  # fmt: skip
    assert d.train.x.shape == (735, 22) and d.classes == 2
    numbers = d.train.x[:, : len(heart_disease.NUMBERS)]
    assert numbers.mean(0).abs().max() < 1e-5 and (numbers.std(0, correction=0) - 1).abs().max() < 1e-5
    assert set(d.train.x[:, len(heart_disease.NUMBERS) :].unique().tolist()) == {0.0, 1.0}


# --- the parsers, on text and bytes made here ------------------------------------------------------------------------


def test_speeches() -> None:
    text = (
        "PLAY\n\nPERSONS\n\nKING JOHN.\nA LORD.\n\nACT I.\n\nSCENE I. A room.\n\n[Enter the KING.]\n\n"
        "KING JOHN.\nGood day.\nNo more.\n\nFirst Lord.\n[Aside.] Ay,\nmy lord.\n\n[Exit.]\n\nAnd so farewell.\n\n"
        "SCENE II.\n\nnobody says this\n\nKING JOHN.\nAgain.\n"
    )
    assert list(shakespeare.speeches("john", text)) == [
        ("KING JOHN", "Good day.\nNo more."),
        ("FIRST LORD", "Ay,\nmy lord."),
        ("FIRST LORD", "And so farewell."),
        ("KING JOHN", "Again."),
    ]
    assert list(shakespeare.speeches("sonnets", "THE SONNETS\n\nI.\n\nFrom fairest creatures\nwe desire")) == []


def test_speeches_of_the_play_with_another_layout() -> None:
    text = "ACT I\n\nSCENE I\n\nTHESEUS\nNow, fair Hippolyta,\nour nuptial hour\n\nHIPPOLYTA\nFour days.\n"
    assert list(shakespeare.speeches("midsummer_nights_dream", text)) == [
        ("THESEUS", "Now, fair Hippolyta,\nour nuptial hour"),
        ("HIPPOLYTA", "Four days."),
    ]


def test_idx() -> None:
    whole = b"\0\0\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    assert idx.parse(whole, "f").tolist() == [[0, 1, 2], [3, 4, 5]]
    for broken in (b"", b"\0\0\x08", whole[:-1], whole + b"x", b"\x1f\x8b" + whole[2:], whole[:7]):
        with pytest.raises(DataError, match="f is not an IDX file"):
            idx.parse(broken, "f")


def test_deb() -> None:
    def member(name: bytes, body: bytes) -> bytes:
        return name.ljust(48) + str(len(body)).encode().ljust(10) + b"`\n" + body + b"\n" * (len(body) % 2)

    deb = b"!<arch>\n" + member(b"debian-binary", b"2.0\n\n") + member(b"data.tar.xz", b"the files")
    assert fashion_mnist.contents(deb, "x.deb") == b"the files"
    for broken in (b"", b"!<arch>\n", b"PK" + deb[2:], deb[:80]):
        with pytest.raises(DataError, match=r"x\.deb is not a Debian package"):
            fashion_mnist.contents(broken, "x.deb")


def test_heart_features_use_the_training_part_alone() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.normal(50, 9, (40, 6))
    numbers[3, 2] = 0  # a cholesterol of 0 was not measured
    numbers[5, 0] = np.nan
    categories = rng.integers(0, 2, (40, 7)).astype(np.int8)
    categories[7, 0] = -1
    train = np.arange(40) < 30
    x = heart_disease._features(numbers, categories, train)
    assert x.shape == (40, 22) and np.isfinite(x).all()
    assert x[3, 2] == 0.0 and x[5, 0] == 0.0  # the mean
    changed = numbers.copy()
    changed[35:] += 1000
    assert np.array_equal(heart_disease._features(changed, categories, train)[:30], x[:30])
    assert x[7, 6] == float(np.bincount(categories[:30, 0][categories[:30, 0] >= 0]).argmax())


# --- huggingface, on local folders -----------------------------------------------------------------------------------


def test_huggingface_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    rows = {
        "age": [1.0, 2.0, 3.0, 4.0] * 5,
        "bmi": [0, 1, 0, 1] * 5,
        "kind": ["b", "a", "c", "b"] * 5,
        "who": [1, 1, 2, 2] * 5,
    }
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows), "test": datasets.Dataset.from_dict(rows)})
    both.save_to_disk(tmp_path / "saved")
    options = {"path": str(tmp_path / "saved"), "features": ["age", "bmi"], "label": "kind"}
    d = load("huggingface", client="who", **options)
    assert d.train.x.tolist()[:2] == [[1.0, 0.0], [2.0, 1.0]] and d.train.y.tolist()[:3] == [1, 0, 2] and d.classes == 3
    assert d.train.client is not None and d.train.client.tolist()[:3] == ["1", "1", "2"]
    held = load("huggingface", test="", test_share=0.25, **options)
    assert len(held.test.y) == 5 and len(held.train.y) == 15
    for wrong, said in (
        ({"label": "knd"}, r"data\.label: no column 'knd'; did you mean 'kind'\?"),
        ({"features": ["kind"]}, r"data\.features: column 'kind' is not numbers"),
        ({"label": "age"}, r"data\.label: column 'age' is not one whole number or string"),
        ({"test": "validation"}, r"data\.path: .*split 'validation'"),
    ):
        with pytest.raises(DataError, match=said) as e:
            load("huggingface", **(options | wrong))
        assert len(str(e.value).splitlines()) == 1


CELLS = {"features": ("age", "row 1", 2), "label": ("kind", "row 2", 1), "client": ("who", "row 0", 1)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the library leaves its files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("option", CELLS)
def test_huggingface_says_where_a_value_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("age,kind,who,fine\n1.5,a,,1\n,b,x,1\n3,,y,2\n,a,y,2\n")
    column, row, rows = CELLS[option]
    options = {"features": ["fine"], "label": "fine"} | {option: [column] if option == "features" else column}
    with pytest.raises(DataError) as e:
        load("huggingface", path=str(tmp_path / "csv"), test="", **options)
    assert str(e.value) == (
        f"data.{option}: column '{column}' has no value in {row} of split 'train', counted from 0"
        f" ({rows} such row{'s' * (rows > 1)}); nothing is imputed"
    )


def test_huggingface_images(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    pictures = [Image.fromarray(np.full((4, 5, 3), 51 * i, np.uint8)) for i in range(6)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes", "unused"])})
    table = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 3}, features=features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    d = load("huggingface", path=str(tmp_path / "saved"), image="img")
    assert d.train.x.shape == (6, 3, 4, 5) and d.classes == 3
    assert torch.allclose(d.train.x[:, 0, 0, 0], torch.arange(6) / 5)
    with pytest.raises(DataError, match=r"data\.image: column 'label' has no images"):
        load("huggingface", path=str(tmp_path / "saved"), image="label")


def test_huggingface_offline_is_one_line() -> None:
    with pytest.raises(
        DataError, match=r"data\.path: nobody/nothing, split 'train': .* set HF_HUB_OFFLINE=0 once"
    ) as e:
        load("huggingface", path="nobody/nothing", features=["a"])
    assert len(str(e.value).splitlines()) == 1


def test_huggingface_needs_one_kind_of_input() -> None:
    with pytest.raises(ConfigError, match=r"data\.image: give either a column of images, or features"):
        config.check(registry.load("datasets", "huggingface").Config, {"name": "huggingface", "path": "x"}, "data")
