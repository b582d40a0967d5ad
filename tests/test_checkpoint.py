"""Values that survive: what goes into a checkpoint comes out the same, bit for bit. (Damage: test_faults.py.)"""

import json
import re
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import check
from fedsim.checkpoint import Store, named_tuples, pack, unpack
from fedsim.errors import ResumeError
from fedsim.memory import Memory


class Inner(NamedTuple):
    x: Any
    n: int


class Outer(NamedTuple):
    inner: Inner
    more: Any


VALUE = Outer(
    Inner({"w": torch.randn(3, 2, generator=torch.Generator().manual_seed(1))}, 7),
    {
        "numbers": [1, -(2**70), 0.1, float("inf"), True, None, "text\n\0"],
        "bytes": b"\0\xff",
        "tuple": (1, (2.5, [torch.tensor(3)])),
        3: "a key that is a number",
        "array": np.arange(6, dtype=np.float32).reshape(2, 3),
        "numpy number": np.float64(0.25),
        "empty": [{}, [], (), torch.zeros(0, 3)],
    },
)


def through(value: Any, folder: Path) -> Any:
    path = folder / "value"
    path.write_bytes(pack(value))
    return unpack(path, named_tuples(value))


def test_round_trip(tmp_path: Path) -> None:
    back = through(VALUE, tmp_path)
    expected = VALUE._replace(more=VALUE.more | {"numpy number": 0.25})
    assert check.difference(expected, back) is None
    assert type(back) is Outer and type(back.inner) is Inner
    assert type(back.more["tuple"]) is tuple and 3 in back.more


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.arange(4).to(dtype)
    back = through([x, x[1:3], x.reshape(2, 2).t(), x[0]], tmp_path)
    assert [b.dtype for b in back] == [dtype] * 4
    assert torch.equal(back[2], x.reshape(2, 2).t()) and torch.equal(back[1], x[1:3])


def test_special_numbers(tmp_path: Path) -> None:
    """NaN's bits, signed zeros, denormals: a checkpoint judges nothing."""
    x = torch.tensor([float("nan"), -0.0, 1e-45, float("inf")])
    assert torch.equal(through(x, tmp_path).view(torch.int32), x.view(torch.int32))
    assert str(through([-0.0, 5e-324], tmp_path)) == "[-0.0, 5e-324]"


def test_it_is_a_copy() -> None:
    x = torch.ones(2)
    packed = pack({"x": x})
    x.zero_()
    assert packed == pack({"x": torch.ones(2)})


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, [1, {"deep": iter(())}]])
def test_what_is_no_value(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be put in a checkpoint"):
        pack(value)


def test_unknown_named_tuple(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(pack(VALUE))
    with pytest.raises(ResumeError, match="'Inner', which this strategy does not have"):
        unpack(tmp_path / "v", {"Outer": Outer})


leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
nested = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, database=None)
@given(nested)
def test_any_nested_value(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    back = through(value, tmp_path_factory.mktemp("v"))
    assert back == value and repr(back) == repr(value)


def test_no_pickle_anywhere() -> None:
    """Loading a checkpoint must not be able to run code; of a stranger's weights, tensors are all that is read."""
    root = Path(__file__).parent.parent
    for folder in ("fedsim", "clients", "server", "strategies"):
        for path in (root / folder).rglob("*.py"):
            text = re.sub(r"torch\.load\(\w+, weights_only=True\)", "", path.read_text())
            for forbidden in ("import pickle", "pickle.load", "torch.load(", "import dill", "cloudpickle", "marshal"):
                assert forbidden not in text, f"{path}: {forbidden}"


# The store


def memory(values: dict[int, float]) -> Memory:
    made = Memory()
    made.update({client: {"w": {"x": torch.tensor(x)}} for client, x in values.items()})
    return made


def test_store_keeps_the_newest(tmp_path: Path) -> None:
    store, mine = Store(tmp_path, keep=2), memory({1: 1.0, 2: 1.0, 3: 1.0})
    for number in range(1, 6):
        mine.update({1: {"w": {"x": torch.tensor(float(number))}}})
        store.save(number, {"seed": 1}, {"n": number}, mine, {"extra": number})
    assert sorted(p.name for p in tmp_path.glob("round-*")) == ["round-00000004", "round-00000005"]
    # Clients 2 and 3 did not come back: their first files still count; client 1 has two, one for each checkpoint kept.
    assert sorted(p.name for p in (tmp_path / "clients").iterdir()) == [
        f"{c}.safetensors" for c in ("1-4", "1-5", "2-1", "3-1")
    ]
    found = Store(tmp_path, keep=2).load({})
    assert (found.round, found.state, found.extra, found.config) == (5, {"n": 5}, {"extra": 5}, {"seed": 1})
    assert {c: float(m["w"]["x"]) for c, m in found.memory.items()} == {1: 5.0, 2: 1.0, 3: 1.0}


def test_a_save_writes_what_has_changed(tmp_path: Path) -> None:
    """A checkpoint costs O(cohort), not O(population)."""
    store, mine = Store(tmp_path, keep=2), memory(dict.fromkeys(range(50), 0.0))
    store.save(1, {}, {}, mine, {})
    written = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "clients").iterdir()}
    mine.update({7: {"w": {"x": torch.tensor(1.0)}}})
    store.save(2, {}, {}, mine, {})
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "clients").iterdir()}
    assert set(after) - set(written) == {"7-2.safetensors"}
    assert all(after[name] == written[name] for name in written)


def test_the_manifest_is_for_people_too(tmp_path: Path) -> None:
    Store(tmp_path, 2).save(3, {"seed": 1}, {"w": torch.ones(2)}, memory({4: 1.0}), {})
    manifest = json.loads((tmp_path / "round-00000003" / "manifest.json").read_text())
    assert manifest["round"] == 3 and manifest["config"] == {"seed": 1} and list(manifest["memory"]) == ["4"]


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no checkpoint to resume from"):
        Store(tmp_path, 2).load({})


@pytest.mark.parametrize("value", [Counter("ab"), OrderedDict(a=1), defaultdict(list)])
def test_a_mapping_that_is_no_dict_is_refused(value: Any) -> None:
    """It would come back as a dict, and behave otherwise."""
    with pytest.raises(TypeError, match=f"{type(value).__name__} cannot be put in a checkpoint"):
        pack({"inside": [value]})
