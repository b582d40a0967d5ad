# ruff: noqa: E501 - tables of input and answer read best a line a row
"""Partitions: each example in exactly one client, the key decides everything, and nothing infeasible ever hangs."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsim import data, registry
from fedsim.data import flower
from fedsim.data.dataset import Dataset, Federation, Partition, Split
from fedsim.errors import ConfigError, DataError
from fedsim.rng import Key

# flwr-datasets takes a second to import, which must not count against the first example.
few = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits are drawn here, not read from a file of an earlier test."""
    monkeypatch.setenv("FEDSIM_DATA", str(tmp_path / "data"))


def world(examples: int = 300, classes: int = 5, owners: int = 7, seed: int = 0) -> Dataset:
    """Examples with every label, sorted by label as files often are, and a natural owner each."""
    rng = np.random.default_rng(seed)
    y = np.sort(np.concatenate([np.arange(classes), rng.integers(0, classes, examples - classes)]))
    x = torch.from_numpy(rng.normal(size=(examples, 3)).astype(np.float32))
    client = np.array([f"owner {k}" for k in np.arange(examples) % owners])
    split = Split(x, torch.from_numpy(y), client)
    return Dataset("world", split, split, classes)


def build(options: Mapping[str, Any], dataset: Dataset, seed: int = 0) -> Partition:
    plugin = registry.load("partitioners", options["name"])
    partition: Partition = plugin.build(plugin.Config(**options), dataset, Key.root(seed).at("partition"))
    return partition


def clients(partition: Partition) -> list[list[int]]:
    return [partition[i].tolist() for i in range(len(partition))]


WHOLE: list[dict[str, Any]] = [
    {"name": "iid", "clients": 10},
    {"name": "natural_id"},
    {"name": "grouped_natural_id", "group_size": 2},
    {"name": "dirichlet", "clients": 10, "alpha": 0.5},
    {"name": "dirichlet", "clients": 10, "alpha": 0.5, "self_balancing": True},
    {"name": "inner_dirichlet", "partition_sizes": [100, 150, 50], "alpha": 5.0},
    {"name": "distribution", "clients": 10, "distribution_array": [[1.0, 2.0, 3.0, 4.0]] * 5},
    {"name": "linear", "clients": 10},
    {"name": "square", "clients": 5},
    {"name": "exponential", "clients": 4},
    {"name": "size", "partition_sizes": [200, 90, 10]},
    {"name": "shard", "clients": 10, "num_shards_per_partition": 3},
    {"name": "shard", "clients": 7, "shard_size": 11, "keep_incomplete_shard": True},
    {"name": "pathological", "clients": 10, "class_assignment_mode": "deterministic"},
    {"name": "continuous", "clients": 10, "strictness": 0.5},
]


@pytest.mark.parametrize("options", WHOLE, ids=lambda o: "-".join(map(str, o.values()))[:40])
def test_each_example_is_held_by_one_client(options: dict[str, Any]) -> None:
    held = clients(build(options, world()))
    assert sorted(i for mine in held for i in mine) == list(range(300))
    assert all(held)


@pytest.mark.parametrize("options", WHOLE, ids=lambda o: "-".join(map(str, o.values()))[:40])
def test_the_key_decides_and_nothing_else(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = clients(build(options, world()))
    np.random.seed(0)  # noqa: NPY002
    monkeypatch.setattr(flower, "_kept", flower._drawn)
    assert clients(build(options, world())) == first
    if options["name"] != "natural_id":
        assert clients(build(options, world(), seed=1)) != first


def test_a_split_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, draw = [], flower._drawn

    def counted(*args: Any) -> Any:
        drawn.append(args[0])
        return draw(*args)

    monkeypatch.setattr(flower, "_drawn", counted)
    options = {"name": "dirichlet", "clients": 10, "alpha": 0.5}
    first = clients(build(options, world()))
    assert clients(build(options, world())) == first
    assert drawn == ["DirichletPartitioner"]
    # Another option, seed or label is another split.
    others = [build(options | {"alpha": 0.6}, world()), build(options, world(), seed=1), build(options, world(seed=1))]
    assert all(clients(other) != first for other in others) and len(drawn) == 4
    # A file that was cut short is drawn again, and one that is not a split of these examples is refused.
    kept = sorted((tmp_path / "data" / "partitions").glob("*.npz"), key=lambda f: f.stat().st_mtime_ns)
    whole = kept[0].read_bytes()
    kept[0].write_bytes(whole[: len(whole) // 2])
    assert clients(build(options, world())) == first and len(drawn) == 5
    np.savez(kept[0], rows=np.zeros(300, np.int64), cuts=np.arange(30, 300, 30))
    with pytest.raises(DataError, match="one client"):
        build(options, world())


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the folder should be")
    assert len(build({"name": "dirichlet", "clients": 10, "alpha": 0.5}, world())) == 10


def test_splits_on_disk_do_not_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "KEPT", 2)
    for seed in range(4):
        build({"name": "linear", "clients": 10}, world(), seed=seed)
    assert len(list((tmp_path / "data" / "partitions").iterdir())) == 2


def test_every_partitioner_of_ours_is_in_these_tests() -> None:
    elsewhere = {"dominant_groups", "label_skew"}  # test_dominant_groups.py, test_texts.py
    assert {str(o["name"]) for o in WHOLE} | {"sampled"} | elsewhere == set(registry.installed("partitioners"))


class Liar(list[Any]):
    def size(self, client: int) -> int:
        return 7


class Broken(list[Any]):
    def __getitem__(self, client: Any) -> Any:
        raise KeyError("no such owner")


MISTAKES: dict[str, tuple[Any, str]] = {
    "masks": ([np.arange(300) < 150, np.arange(300) >= 150], r"mine must give client 0 whole numbers, \(n,\) \(got bool \(300,\)\)"),
    "fractions": ([np.arange(3), np.array([0.2, 1.7])], r"mine must give client 1 whole numbers, .* \(got float64 \(2,\)\)"),
    "2-D": ([np.arange(4).reshape(2, 2)], r"mine must give client 0 whole numbers, .* \(got int64 \(2, 2\)\)"),
    "numbers": (np.arange(4), r"mine must give client 0 whole numbers, .* \(got int64 \(\)\)"),
    "names": ("ab", r"mine must give client 0 whole numbers, .* \(got str\)"),
    "nothing": (None, r"mine must build a Partition, with len\(\) and \[client\] \(got NoneType\)"),
    "a generator": ((np.arange(3) for _ in range(2)), r"mine must build a Partition, .* \(got generator\)"),
    "twice": ([np.arange(3), [4, 5, 4]], "mine gives client 1 an example twice"),
    "negative": ([[-1, 2]], r"mine gives client 0 examples outside 0\.\.299"),
    "a wrong size": (Liar([[1, 2]]), r"mine gives client 0 2 examples, and size\(0\) is 7"),
    "an exception": (Broken([1, 2]), r"mine fails for client 0 of 2: KeyError: 'no such owner' \(test_partitions.py:\d+\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistaken_partition_is_named(what: str) -> None:
    given, said = MISTAKES[what]
    with pytest.raises(DataError) as e:
        data._check("mine", given, world())
    assert re.fullmatch(rf"data\.partition\.name: {said}", str(e.value))


@pytest.mark.parametrize(
    "given", [np.arange(300).reshape(6, 50), [[1, 2], [0]], torch.arange(300).reshape(6, 50).unbind()]
)
def test_plain_arrays_are_a_partition(given: Any) -> None:
    data._check("mine", given, world())
    held = Federation(world(), given, 0.0, Key.root(0))
    assert [held.size(c, "train") for c in range(len(held))] == [
        len(held.indices(c, "train")) for c in range(len(held))
    ]


def test_few_clients_of_a_million_are_drawn() -> None:
    class Counted(list[Any]):
        drawn = 0

        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, client: Any) -> Any:
            self.drawn += 1
            return np.array([client % 300])

    partition = Counted()
    data._check("mine", partition, world())
    assert partition.drawn == data.SPOT_CHECKS


def test_a_client_that_was_not_looked_at_is_refused_when_it_is_asked() -> None:
    held = Federation(world(), [np.arange(300) < 9], 0.0, Key.root(0))
    with pytest.raises(DataError, match="must give client 0 whole numbers"):
        held.indices(0, "train")


@few
@given(examples=st.integers(5, 400), count=st.integers(1, 400), seed=st.integers(0, 2**64 - 1))
def test_iid_is_balanced_or_refused(examples: int, count: int, seed: int) -> None:
    if count > examples:
        with pytest.raises(DataError, match=rf"data\.partition\.clients: {count} clients for {examples} examples"):
            build({"name": "iid", "clients": count}, world(examples), seed)
        return
    held = clients(build({"name": "iid", "clients": count}, world(examples), seed))
    assert sorted(i for mine in held for i in mine) == list(range(examples))
    sizes = [len(mine) for mine in held]
    assert max(sizes) - min(sizes) <= 1


@few
@given(
    alpha=st.floats(min_value=5e-324, max_value=1e6),
    count=st.integers(1, 300),
    balance=st.booleans(),
    least=st.integers(1, 400),
)
def test_dirichlet_partitions_or_names_the_option(alpha: float, count: int, balance: bool, least: int) -> None:
    options = {
        "name": "dirichlet",
        "clients": count,
        "alpha": alpha,
        "self_balancing": balance,
        "min_partition_size": least,
    }
    try:
        held = clients(build(options, world()))
    except DataError as e:
        said = str(e)
    else:
        assert sorted(i for mine in held for i in mine) == list(range(300))
        assert min(map(len, held)) >= least
        return
    assert said.startswith(("data.partition.alpha: ", "data.partition.min_partition_size: "))
    assert "\n" not in said


def test_dirichlet_draws_other_shares_for_another_seed() -> None:
    """The shuffle alone would move examples between clients, and leave the sizes as they are."""
    sizes = [[len(c) for c in clients(build({"name": "dirichlet", "clients": 10}, world(), seed))] for seed in (0, 1)]
    assert sorted(sizes[0]) != sorted(sizes[1])


def test_dirichlet_follows_alpha() -> None:
    """The expected sum of squared label shares of a client falls from 1 (alpha → 0) towards that of the data, 1/5."""

    def purity(alpha: float) -> float:
        y, partition = (
            world(5000).train.y.numpy(),
            build({"name": "dirichlet", "clients": 10, "alpha": alpha}, world(5000)),
        )
        shares = [np.bincount(y[partition[i]], minlength=5) / len(partition[i]) for i in range(10)]
        return float(np.mean([np.sum(s**2) for s in shares]))

    assert purity(0.1) > 0.6 > 0.35 > purity(5.0) > purity(1000.0) > 0.199


def test_a_million_sampled_clients_cost_nothing_until_asked() -> None:
    data = world(4000)
    start = time.perf_counter()
    partition = build({"name": "sampled", "clients": 1_000_000, "size": 20, "alpha": 0.1}, data)
    held = [partition[i] for i in np.linspace(0, 999_999, 100, dtype=int).tolist()]
    assert time.perf_counter() - start < 2
    assert len(partition) == 1_000_000
    assert all(len(np.unique(mine)) == 20 and mine.min() >= 0 and mine.max() < 4000 for mine in held)
    with pytest.raises(IndexError):
        partition[1_000_000]


@few
@given(
    size=st.integers(1, 300),
    alpha=st.none() | st.floats(min_value=5e-324, max_value=1e6),
    client=st.integers(0, 10**6 - 1),
)
def test_sampled_clients_hold_distinct_examples(size: int, alpha: float | None, client: int) -> None:
    options = {"name": "sampled", "clients": 10**6, "size": size, "alpha": alpha}
    mine = build(options, world())[client]
    assert len(mine) == len(np.unique(mine)) == size
    assert mine.tolist() == build(options, world())[client].tolist()
    if size < 290:
        assert mine.tolist() != build(options, world())[(client + 1) % 10**6].tolist() or size < 5


def test_sampled_follows_alpha() -> None:
    """With alpha = 1e-3 nearly every client has one label: E[sum of squared shares] = (alpha+1)/(5 alpha+1) = 0.996."""
    data = world(4000)
    y = data.train.y.numpy()

    def purity(alpha: float | None) -> float:
        partition = build({"name": "sampled", "clients": 1000, "size": 20, "alpha": alpha}, data)
        return float(np.mean([np.sum((np.bincount(y[partition[i]], minlength=5) / 20) ** 2) for i in range(300)]))

    assert purity(1e-3) > 0.98
    # Uniform: sum p² + (1 - sum p²)/20 = 0.24 with p = 1/5; the mean of 300 clients has a standard error below 0.004.
    assert abs(purity(None) - 0.24) < 0.015


def test_shards_hold_few_labels() -> None:
    data = world(1000)
    partition = build({"name": "shard", "clients": 50, "num_shards_per_partition": 2}, data)
    assert max(len(set(data.train.y[partition[i]].tolist())) for i in range(50)) <= 4


def test_pathological_clients_have_so_many_labels() -> None:
    data = world()
    partition = build({"name": "pathological", "clients": 20, "num_classes_per_partition": 2}, data)
    assert {len(set(data.train.y[partition[i]].tolist())) for i in range(20)} == {2}


def test_size_skews_have_the_sizes_of_their_formula() -> None:
    sizes = [len(c) for c in clients(build({"name": "linear", "clients": 4}, world()))]
    assert sizes == [30, 60, 90, 120]
    assert [len(c) for c in clients(build({"name": "size", "partition_sizes": [7, 1]}, world()))] == [7, 1]


def test_natural_clients_are_the_owners() -> None:
    data = world()
    partition = build({"name": "natural_id"}, data)
    assert data.train.client is not None
    assert [set(data.train.client[partition[i]].tolist()) for i in range(7)] == [{f"owner {k}"} for k in range(7)]
    # 300 = 6 * 43 + 42: only the last owner has 42.
    assert len(build({"name": "natural_id", "min_partition_size": 43}, data)) == 6


# fmt: off
IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    *(({"name": n, "clients": 301}, r"data\.partition\.clients: 301 clients for 300 examples")
      for n in ("iid", "dirichlet", "linear", "square", "exponential", "pathological", "continuous")),
    ({"name": "shard", "clients": 301, "shard_size": 1}, r"data\.partition\.clients: 301 clients for 300 examples"),
    ({"name": "pathological", "clients": 10**9}, r"data\.partition\.clients: 1000000000 clients"),
    ({"name": "dirichlet", "clients": 50, "min_partition_size": 7}, r"50 clients of at least 7 need 350"),
    ({"name": "dirichlet", "clients": 100, "alpha": 1e-9}, r"data\.partition\.alpha: 1e-09 over 100 clients"),
    ({"name": "exponential", "clients": 20}, r"data\.partition\.clients: 20 clients with sizes that grow as exp"),
    ({"name": "exponential", "clients": 300}, r"data\.partition\.clients: 300 clients with sizes that grow as exp"),
    ({"name": "square", "clients": 100}, r"data\.partition\.clients: 100 clients with sizes that grow as k²"),
    ({"name": "size", "partition_sizes": [300, 1]}, r"partition_sizes: they sum to 301, and there are 300"),
    ({"name": "inner_dirichlet", "partition_sizes": [301]}, r"partition_sizes: they sum to 301"),
    ({"name": "inner_dirichlet", "partition_sizes": [150, 150], "alpha": 1e-9}, r"data\.partition\.alpha: 1e-09 asks"),
    ({"name": "shard", "clients": 7, "num_shards_per_partition": 2}, r"300 examples do not divide"),
    ({"name": "shard", "clients": 7}, r"num_shards_per_partition: give it, or shard_size"),
    ({"name": "shard", "clients": 40, "shard_size": 10}, r"300 examples are 30 shards of 10 for 40 "),
    ({"name": "shard", "clients": 200, "num_shards_per_partition": 2}, r"need 400 examples, and there are 300"),
    ({"name": "pathological", "clients": 5, "num_classes_per_partition": 6}, r"partition: 6, and world has 5"),
    ({"name": "pathological", "clients": 290}, r"290 clients of 2 labels need 580"),
    ({"name": "distribution", "clients": 10, "distribution_array": [[1.0], [1.0, 2.0]]}, r"array: rows of"),
    ({"name": "distribution", "clients": 10, "distribution_array": [[0.0] * 4] * 5}, r"array: a row sums to 0"),
    ({"name": "distribution", "clients": 9, "distribution_array": [[1.0] * 3] * 5}, r"distribution cannot split 300"),
    ({"name": "grouped_natural_id", "group_size": 2, "mode": "strict"}, r"7 natural clients do not divide"),
    ({"name": "grouped_natural_id", "group_size": 8, "mode": "strict"}, r"group_size: 8, and world has 7"),
    ({"name": "natural_id", "min_partition_size": 44}, r"44, and the largest of 7 natural clients has 43"),
    ({"name": "sampled", "size": 301}, r"data\.partition\.size: 301 distinct examples a client from 300"),
    ({"name": "continuous", "partition_by": 3}, r"partition_by: 3, and inputs have 3 features"),
]
# fmt: on


@pytest.mark.parametrize(("options", "said"), IMPOSSIBLE, ids=lambda v: "" if isinstance(v, str) else v["name"])
def test_the_impossible_is_one_line_that_names_the_option(options: dict[str, Any], said: str) -> None:
    start = time.perf_counter()
    with pytest.raises(DataError, match=said) as e:
        build(options, world())
    assert len(str(e.value).splitlines()) == 1
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", ["natural_id", "grouped_natural_id"])
def test_no_owners(name: str) -> None:
    data = world()
    with pytest.raises(DataError, match=rf"data\.partition\.name: {name} needs natural clients, and world has none"):
        build({"name": name}, data._replace(train=data.train._replace(client=None)))


@pytest.mark.parametrize(
    "options", [{"name": "dirichlet"}, {"name": "sampled", "alpha": 1.0}, {"name": "pathological"}]
)
def test_sequences_have_no_label_of_their_own(options: dict[str, Any]) -> None:
    data = world()
    sequences = data.train._replace(y=data.train.y[:, None].repeat(1, 4))
    with pytest.raises(DataError, match=r"needs one label an example; world has \(300, 4\)"):
        build(options, data._replace(train=sequences))


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf"), 1e308, "0.5"])
@pytest.mark.parametrize("name", ["dirichlet", "sampled"])
def test_alpha_is_a_positive_number(name: str, alpha: Any) -> None:
    from fedsim.config import check

    with pytest.raises(ConfigError, match=r"data\.partition\.alpha: "):
        check(registry.load("partitioners", name).Config, {"name": name, "alpha": alpha}, "data.partition")


def test_labels_may_be_missing_from_the_training_part() -> None:
    data = world()
    gaps = data._replace(train=data.train._replace(y=data.train.y * 3), classes=20)
    for options in WHOLE:
        assert all(clients(build(options, gaps)))


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_nobody_trains_on_what_another_is_tested_on(alpha: float | None) -> None:
    """Where clients share examples, an example is kept back by all who have it, or by none."""
    options = {"name": "sampled", "clients": 200, "size": 20, "alpha": alpha}
    federation = Federation(
        world(), build({k: v for k, v in options.items() if v is not None}, world()), 0.25, Key.root(0)
    )
    sides = {}
    for split in ("train", "holdout"):
        sides[split] = [federation.indices(client, split) for client in range(len(federation))]
    assert not set(np.concatenate(sides["train"])) & set(np.concatenate(sides["holdout"]))
    assert all(len(a) + len(b) == 20 for a, b in zip(sides["train"], sides["holdout"], strict=True))
    assert sum(map(len, sides["holdout"])) == pytest.approx(0.25 * 200 * 20, rel=0.1)


@pytest.mark.parametrize(
    "options", [*WHOLE, {"name": "sampled", "clients": 9, "size": 7}], ids=lambda o: str(o["name"])
)
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_sizes_are_known_without_drawing(options: dict[str, Any], holdout: float) -> None:
    federation = Federation(world(), build(options, world()), holdout, Key.root(0))
    for client in range(len(federation)):
        for split in ("train", "holdout"):
            assert federation.size(client, split) == len(federation.indices(client, split))
