"""Text data sets from small archives made here, the teacher, and label skew."""

import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedsim.data import fetch, label_skew, newsgroups, pretrained, rdata, spam_assassin, teacher, text
from fedsim.data.dataset import Dataset, Split
from fedsim.errors import DataError
from fedsim.rng import Key

ODD = ["", "two words", "naïve – façade", "x" * 100]


def test_texts_are_kept_as_they_are() -> None:
    packed = text.part("train", ODD, ["a", "b", "a", "b"])
    assert packed["train_text"].dtype == np.uint8
    assert text.unpack(packed, "train") == ODD
    assert text.unpack(text.part("test", [], []), "test") == []


def test_a_repeated_text_is_known_by_its_words() -> None:
    assert text.key(" A  b\n") == text.key("a B") != text.key("ab")


def tokenizer(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "good", "bad", "tea"])}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"pad_token_id": 0}')
    return folder


def test_tokens_are_cut_and_padded(tmp_path: Path) -> None:
    got = text.tokens(["good tea", "bad strange tea good", ""], str(tokenizer(tmp_path)), 3)
    assert got.tolist() == [[2, 4, 0], [3, 1, 4], [0, 0, 0]] and got.dtype == torch.int64
    with pytest.raises(DataError, match=r"data\.tokenizer: .* is no model folder"):
        text.tokens(["a"], str(tmp_path / "none"), 3)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer\.json"):
        text.tokens(["a"], str(tmp_path), 3)


def test_a_set_is_encoded_with_its_test_part_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = text.part("train", ["good", "bad", "tea"], ["b", "a", "b"]) | text.part(
        "test", ["good tea", "bad tea", "tea", "good"], ["b", "a", "b", "b"]
    )
    monkeypatch.setattr(text.fetch, "load", lambda name: arrays)
    config = newsgroups.Config(tokenizer=str(tokenizer(tmp_path)), length=2, test=3)
    found = newsgroups.build(config)
    assert found.train.x.tolist() == [[2, 0], [3, 0], [4, 0]] and found.train.y.tolist() == [1, 0, 1]
    assert len(found.test.y) == 3 and found.classes == 2
    whole = newsgroups.build(config.model_copy(update={"test": None})).test
    assert all(
        row in list(zip(whole.x.tolist(), whole.y.tolist()))
        for row in zip(found.test.x.tolist(), found.test.y.tolist())
    )
    tfidf = newsgroups.build(config.model_copy(update={"encoding": "tfidf", "features": 2}))
    assert tfidf.train.x.shape == (3, 2) and tfidf.train.x.dtype == torch.float32


def test_orange_tables(tmp_path: Path) -> None:
    archive = tmp_path / "o.whl"
    with zipfile.ZipFile(archive, "w") as z:
        for part in ("train", "test"):
            rows = "Category\tText\nd\tstring\nclass\t\n" + f"sport\tball of {part}\npolitics\tvote\nsport\t\n"
            z.writestr(f"{newsgroups.FOLDER}20newsgroups-{part}.tab", rows)
    got = newsgroups.convert(archive)
    assert text.unpack(got, "train") == ["ball of train", "vote"]
    assert got["test_label"].tolist() == ["sport", "politics"]


def test_mails_lose_their_headers(tmp_path: Path) -> None:
    archive = tmp_path / "s.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for i in range(10):
            mail = f"From: someone@secret.example\nSubject: tea {i}\nReceived: by relay\n\nbuy it\n".encode()
            info = tarfile.TarInfo(f"package/data/{'spam-1' if i % 2 else 'easy-ham-1'}/{i}.txt")
            info.size = len(mail)
            tar.addfile(info, io.BytesIO(mail))
    got = spam_assassin.convert(archive)
    texts = text.unpack(got, "train") + text.unpack(got, "test")
    assert sorted(texts) == [f"tea {i}\nbuy it\n" for i in range(10)]
    assert len(got["test_label"]) == 2 and set(got["train_label"]) == {"ham", "spam"}


def test_a_model_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    archive = tmp_path / "w.whl"
    with zipfile.ZipFile(archive, "w") as z:
        for name in pretrained.FILES:
            z.writestr(pretrained.INSIDE + name, '{"pad_token_id": null}' if name == "config.json" else name)
    with pytest.raises(DataError, match="fedsim data get minilm"):
        pretrained.folder("minilm", "task.path")
    monkeypatch.setattr(pretrained.fetch, "load", lambda name: pretrained.convert(archive))
    found = pretrained.folder("minilm", "task.path")
    assert (found / "README.md").read_text() == "README.md" and pretrained.pad(found) == 0
    monkeypatch.setattr(pretrained.fetch, "load", lambda name: pytest.fail("read twice"))
    assert pretrained.folder("minilm", "task.path") == found


# --- R's serialisation, written here --------------------------------------------------------------------------------


def word(*n: int) -> bytes:
    return struct.pack(f">{len(n)}i", *n)


def chars(s: str) -> bytes:
    return word(9, len(s)) + s.encode()


def strings(*items: str, flags: int = 0) -> bytes:
    return word(16 | flags, len(items)) + b"".join(chars(s) for s in items)


def named(name: str, value: bytes) -> bytes:
    """A pairlist of one, as attributes are."""
    return word(2 | 0x400, 1) + chars(name) + value + word(254)


HEADER = b"X\n" + word(3, 0x40200, 0x30500, 5) + b"UTF-8"


def frame(index_name: str) -> tuple[bytes, bytes]:
    factor = word(13 | 0x200, 3, 2, 1, 2) + named("levels", strings("other", "great"))
    numbers = word(14, 2) + struct.pack(">2d", 0.5, -1.0)
    data = (
        HEADER + word(19 | 0x200, 3) + factor + strings("a", "b", "c") + numbers + named(
            "names", strings("score", "text", "x")
        )
    )  # fmt: skip
    rdb = b"junk" + word(len(data)) + zlib.compress(data)
    place = word(13, 2, 4, len(rdb) - 4)
    variables = word(19 | 0x200, 1) + place + named("names", strings(index_name))
    index = HEADER + word(19 | 0x200, 1) + variables + named("names", strings("variables"))
    packer = zlib.compressobj(wbits=31)
    return packer.compress(index) + packer.flush(), rdb


def test_a_data_frame_of_r() -> None:
    got = rdata.frame(*frame("d"), "d")
    assert got["score"] == ["great", "other", "great"] and got["text"] == ["a", "b", "c"]
    assert got["x"].tolist() == [0.5, -1.0]


def test_code_in_an_r_file_is_refused() -> None:
    with pytest.raises(ValueError, match="R type 3 "):
        rdata.parse(HEADER + word(3))  # a closure
    with pytest.raises(ValueError, match="not R's binary"):
        rdata.parse(b"PK")


# --- Label skew, and the teacher ------------------------------------------------------------------------------------


def labelled(*counts: int) -> Dataset:
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    split = Split(torch.zeros(len(y), 1), y)
    return Dataset("labelled", split, split, len(counts))


@pytest.mark.parametrize(
    ("config", "counts", "expected"),
    [
        ({"level": "severe"}, (300, 300), [[20, 180], [180, 20], [100, 100]]),
        ({"level": "severe"}, (100, 100, 100), [[90, 5, 5], [5, 90, 5], [5, 5, 90]]),
        ({"level": "mild"}, (100, 100, 100), [[60, 20, 20], [20, 60, 20], [20, 20, 60]]),
        ({"level": "iid"}, (300, 300), [[100, 100], [100, 100], [100, 100]]),
        ({"shares": [[1, 0], [0, 1]]}, (30, 10), [[30, 0], [0, 10]]),
        ({"level": "severe"}, (100, 100, 100, 100), [[90, 5, 5, 90], [5, 90, 5, 5], [5, 5, 90, 5]]),
    ],
)
def test_label_skew(config: dict[str, Any], counts: tuple[int, ...], expected: list[list[int]]) -> None:
    dataset = labelled(*counts)
    partition = label_skew.build(label_skew.Config(**config), dataset, Key.root(1))
    got = [
        np.bincount(dataset.train.y.numpy()[partition[k]], minlength=len(counts)).tolist()
        for k in range(len(partition))
    ]
    assert got == expected
    owned = np.concatenate([partition[k] for k in range(len(partition))])
    assert sorted(owned.tolist()) == list(range(sum(counts)))
    other = label_skew.build(label_skew.Config(**config), dataset, Key.root(2))
    assert expected == [[30, 0], [0, 10]] or any(
        partition[k].tolist() != other[k].tolist() for k in range(len(partition))
    )


def test_label_skew_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="rows must be of one length"):
        label_skew.Config(shares=[[1, 0], [1]])
    with pytest.raises(ValueError, match="every class needs a client"):
        label_skew.Config(shares=[[1, 0], [1, 0]])
    with pytest.raises(DataError, match="a column for each of 3 classes"):
        label_skew.build(label_skew.Config(shares=[[1, 1]]), labelled(2, 2, 2), Key.root(1))
    with pytest.raises(DataError, match="a client has no example"):
        label_skew.build(label_skew.Config(shares=[[1, 0.9], [0, 0.001]]), labelled(5, 5), Key.root(1))


def test_a_teacher_is_the_student_moved_by_little_rank() -> None:
    config = teacher.Config(teacher=4, train=300, test=50)
    a, b = teacher.build(config), teacher.build(config)
    assert torch.equal(a.train.x, b.train.x) and torch.equal(a.test.y, b.test.y)
    assert set(a.train.y.tolist()) == {0, 1, 2}
    assert not torch.equal(a.train.y, teacher.build(config.model_copy(update={"teacher": 5})).train.y)
    said = teacher.student(8, 64)(a.train.x).argmax(1)
    assert 0.2 < float((said == a.train.y).float().mean()) < 0.8  # there is something to learn
    near = teacher.build(config.model_copy(update={"shift": 1e-4}))
    assert float((teacher.student(8, 64)(near.train.x).argmax(1) == near.train.y).float().mean()) > 0.98


@pytest.mark.parametrize(
    ("name", "sizes", "classes", "counts"),
    [
        ("newsgroups", (11_293, 7_528), 20, {"rec.sport.hockey": 600}),
        ("reuters", (5_485, 2_189), 8, {"earn": 2_840, "grain": 41}),
        ("fine_foods", (3_972, 1_000), 2, {}),
        ("spam_assassin", (4_837, 1_209), 2, {}),
    ],
)
def test_what_was_fetched(name: str, sizes: tuple[int, int], classes: int, counts: dict[str, int]) -> None:
    if not fetch.available()[name]:
        pytest.skip(f"{name} is not here: `fedsim data get {name}`")
    arrays = fetch.load(name)
    found = {p: text.unpack(arrays, p) for p in ("train", "test")}
    assert (len(found["train"]), len(found["test"])) == sizes
    assert all(t.strip() for t in found["train"][:100]) and arrays["train_label"].shape == (sizes[0],)
    labels, number = np.unique(arrays["train_label"], return_counts=True)
    assert len(labels) == classes and set(arrays["test_label"]) == set(labels)
    assert counts.items() <= dict(zip(labels.tolist(), number.tolist(), strict=True)).items()
    if name == "spam_assassin":
        both = np.concatenate([arrays["train_label"], arrays["test_label"]])
        assert (int((both == "ham").sum()), int((both == "spam").sum())) == (4_150, 1_896)
