"""CIFAR-10's test images and features of frozen models: from small archives made here, and the real ones if fetched."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tasks.toys import dataset

from fedsim import registry
from fedsim.data import cifar10_test, features, fetch
from fedsim.data.dataset import Dataset, validate
from fedsim.errors import ConfigError, DataError


def build(**options: Any) -> Dataset:
    return features.build(features.Config(**options))


@pytest.fixture
def looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A backbone that counts what it is shown: the sums of the rows and of the columns of a picture."""
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path))
    shown: list[int] = []

    def backbone(size: int) -> Any:
        def see(x: torch.Tensor) -> torch.Tensor:
            shown.append(len(x))
            return torch.cat([x.sum(2), x.sum(3)], 2).flatten(1)

        return see

    monkeypatch.setattr(features, "efficientnet_lite0", backbone)
    return shown


def test_each_example_is_seen_once(looks: list[int], tmp_path: Path) -> None:
    digits = registry.build("datasets", "digits", "", registry.load("datasets", "digits").Config())
    found = validate(build(of={"name": "digits"}))
    assert sum(looks) == len(digits.train.y) + len(digits.test.y)
    assert torch.equal(found.train.y, digits.train.y) and found.classes == 10
    torch.testing.assert_close(found.test.x[:, :8], digits.test.x[:, 0].sum(1))
    again = build(of={"name": "digits"})
    assert sum(looks) == len(digits.train.y) + len(digits.test.y) and torch.equal(again.train.x, found.train.x)
    build(of={"name": "digits"}, size=64)  # another size is another sight
    assert sum(looks) == 2 * (len(digits.train.y) + len(digits.test.y))
    (tmp_path / next(tmp_path.glob("features-*.npy")).name).write_bytes(b"half")
    with pytest.raises(DataError, match=r"features-.*\.npy is damaged .*; delete it"):
        build(of={"name": "digits"}), build(of={"name": "digits"}, size=64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"of": {}}, "data.of.name: must name another data set"),
        ({"of": {"name": "features", "of": {}}}, "data.of.name: must name another data set"),
        ({"of": {"name": "digits", "sise": 3}}, "data.of.sise: unknown key"),
        ({"of": {"name": "digitz"}}, "data.of.name: 'digitz' not found; did you mean 'digits'"),
        ({"of": {"name": "digits"}, "backbone": "minilm"}, "minilm reads tokens"),
        ({"of": {"name": "quadratic"}}, "efficientnet_lite0 sees pictures"),
    ],
)
def test_a_mistake_is_named(looks: list[int], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(**options)
    assert not looks


def archive(path: Path, inside: str, examples: list[dict[str, Any]]) -> Path:
    body = json.dumps({"examples": examples}).encode()
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"bigbench-1.0.0/{inside}")
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
    return path


def test_cifar_is_read_out_of_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(1).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    examples = []
    for i, one in enumerate(pixels):
        buffer = io.BytesIO()
        Image.fromarray(one).save(buffer, "PNG")
        scores = {name: float(name == "abcdefghij"[i % 10]) for name in reversed("abcdefghij")}
        examples.append({"input": base64.b64encode(buffer.getvalue()).decode(), "target_scores": scores})
    arrays = cifar10_test.convert(archive(tmp_path / "a.tar.gz", cifar10_test.INSIDE, examples))
    assert np.array_equal(arrays["x"], pixels.transpose(0, 3, 1, 2)) and arrays["y"].tolist() == [*range(10)] * 2
    monkeypatch.setattr(cifar10_test, "TRAIN", 1)
    monkeypatch.setattr(fetch, "load", lambda name: arrays)
    d = validate(cifar10_test.build(cifar10_test.Config()))
    assert d.train.x.shape == d.test.x.shape == (10, 3, 32, 32) and d.train.y.tolist() == [*range(10)]
    torch.testing.assert_close(d.test.x, torch.from_numpy(pixels[10:]).permute(0, 3, 1, 2) / 255)
    with pytest.raises(DataError, match=r"b\.tar\.gz has no .*task\.json"):
        cifar10_test.convert(archive(tmp_path / "b.tar.gz", "else.json", []))


# --- what has to be fetched ------------------------------------------------------------------------------------------


def here(*names: str) -> None:
    for name in names:
        if not fetch.available()[name]:
            pytest.skip(f"{name} is not here: `fedsim data get {name}`")


def test_cifar10_test() -> None:
    here("cifar10_test")
    d = cifar10_test.build(cifar10_test.Config())
    assert torch.bincount(d.train.y).tolist() == [800] * 10 and torch.bincount(d.test.y).tolist() == [200] * 10
    x = torch.cat([d.train.x, d.test.x])  # the canonical mean of the test images, and no picture twice
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.4942, 0.4851, 0.4504], abs=1e-4)
    assert len(torch.unique(x.flatten(1), dim=0)) == 10_000


def test_efficientnet_sees_what_it_was_trained_to_see() -> None:
    """Of grey and of coloured pictures it makes 1280 numbers, not below 0 (ReLU6, averaged), which tell them apart."""
    here("efficientnet_lite0")
    pytest.importorskip("efficientnet_lite_pytorch")
    with torch.no_grad():
        z = features.efficientnet_lite0(64)(dataset(3, 32, 32).train.x)
        grey = features.efficientnet_lite0(64)(dataset(1, 28, 28).train.x)
    assert z.shape == grey.shape == (6, 1280) and 0 <= float(z.min()) <= float(z.max()) <= 6
    assert float(torch.pdist(z).min()) > 0.1


def test_minilm_means_what_words_mean() -> None:
    here("minilm")
    from fedsim.data import text

    tokens = text.tokens(["a cat sits on the mat", "a kitten is on a rug", "stocks fell sharply today"], "minilm", 16)
    with torch.no_grad():
        a, b, c = torch.nn.functional.normalize(features.minilm()(tokens), dim=1)
    assert float(a @ b) > 0.4 > 0.2 > float(a @ c)
