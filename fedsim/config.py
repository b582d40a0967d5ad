"""The experiment as one frozen, closed value: TOML in, every mistake named at once.

The tables ``[strategy]``, ``[data]``, ``[data.partition]`` and ``[task]`` are parsed by the plugin that they name, with
the plugin's own ``Config``. An unknown key is an error that suggests the nearest known one.
"""

import itertools
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from fedsim import registry
from fedsim.errors import ConfigError, did_you_mean

BARE = re.compile("[A-Za-z0-9_-]+")  # a key that TOML writes without quotes
# Keys that mean something else in each table that has them: where one stands says nothing of where it belongs.
COMMON = {"batch_size", "clients", "every", "examples", "labels", "local", "method", "mode", "name", "size", "step"}
MAX_BYTES = 1 << 20  # a config is written by hand; anything larger is a mistake or an attack


class Closed(BaseModel):
    """Base of every config: frozen, no unknown key, no coercion (``"10"`` is not 10), no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DatasetConfig(Closed):
    """Base of a data set plugin's own ``Config``."""

    name: str


class PartitionConfig(Closed):
    """Base of a partitioner plugin's own ``Config``."""

    name: str


class DataConfig(Closed):
    """``[data]``: which data, over which clients."""

    dataset: SerializeAsAny[DatasetConfig]
    partition: SerializeAsAny[PartitionConfig]
    holdout: float = Field(0.0, ge=0, lt=1, description="share of each client's examples kept as its own test set")


class TaskConfig(Closed):
    """Base of a task plugin's own ``Config``."""

    model: str
    dtype: Literal["float32", "float64"] = "float32"


class StrategyConfig(Closed):
    """Base of a strategy plugin's own ``Config``."""

    name: str
    cohort: int = Field(10, ge=1, description="clients sampled each round")


class EngineConfig(Closed):
    """``[engine]``: where clients run, and how."""

    kind: Literal["inline", "ray"] = Field("inline", description="clients in this process, or in Ray's workers")
    workers: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        "auto", description="of kind 'ray'; auto: one a core, or as many as fit each GPU"
    )
    deadline: float | None = Field(
        None, gt=0, description="seconds that a worker of kind 'ray' may take for a message before it is replaced"
    )
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    execution: Literal["auto", "plain", "batched"] = Field(
        "auto", description="clients one at a time, or a block of them as stacked tensors; auto: whichever is faster"
    )
    block: int = Field(16, ge=1, le=4096, description="clients that a worker runs at once; a power of two")
    record: bool = Field(
        False,
        description="on a GPU: a block's step is recorded once and played again (CUDA graphs); not yet tried on one",
    )
    paths: Literal["fast", "messages"] = Field("fast", description="messages: real Flower messages for every client")
    on_error: Literal["raise", "drop", "retry"] = Field(
        "raise",
        description="what a failing client does to the run: raise ends it, drop goes on without it; retry: its work is "
        "done once more, alone, before it raises; the draws are the same, so this helps against chance alone (memory)",
    )
    memory_mb: int = Field(1024, ge=1, description="of clients' memories in this process; the others go to files")

    @model_validator(mode="after")
    def _sane(self) -> "EngineConfig":
        if self.block & (self.block - 1):
            raise ValueError(f"block: must be a power of two (got {self.block})")
        if self.record and self.device == "cpu":
            raise ValueError("record: is for a GPU: set device")
        if self.workers != "auto" and self.kind != "ray":
            raise ValueError(f"workers: belongs to kind 'ray': set engine.kind, or --engine ray (got {self.workers})")
        return self


class EvaluateConfig(Closed):
    """``[evaluate]``: on the central test set, and on clients' own held-out examples where ``data.holdout`` > 0."""

    every: int = Field(1, ge=1)
    batch_size: int = Field(512, ge=1)
    clients: int = Field(100, ge=1, description="a fixed sample of at most so many clients is evaluated")
    local: bool = Field(False, description="also right after local training: local_accuracy of the cohort's clients")


class CheckpointConfig(Closed):
    """``[checkpoint]``: after how many rounds, and how many are kept."""

    every: int = Field(1, ge=1)
    keep: int = Field(2, ge=1, le=1000)


class AdaptiveClip(Closed):
    """``[privacy.adaptive]``: C follows a quantile of the clients' norms (Andrew et al. 2021, arXiv:1905.03871)."""

    quantile: float = Field(0.5, gt=0, lt=1, description="γ, the share of clients that shall not be clipped")
    rate: float = Field(0.2, gt=0, le=1, description="η_C: C ← C exp(−η_C (share − γ))")
    bit_noise: float | None = Field(None, gt=0, description="σ_b, on the count of unclipped clients; else cohort/20")


class AttackConfig(Closed):
    """``[attack]``: what a server that only looks could reconstruct of what clients send (docs/leakage.md)."""

    every: int = Field(0, ge=0, description="attack what is sent in rounds 1, 1+every, …; 0: by `fedsim attack` alone")
    method: Literal["ig", "dlg", "rog"] = "ig"
    knowledge: Literal["naive", "joint", "oracle", "analytic"] = Field(
        "naive",
        description="of memories: guess, guess and optimise, know (a bound), or read off a hypernetwork's structure",
    )
    victims: int = Field(2, ge=1, le=1000, description="clients that are attacked, each alone")
    examples: int = Field(1, ge=0, description="of each, its first so many; 0: all that it has")
    visit: dict[str, Any] = Field(default_factory=dict, description="other strategy settings in the attacked visit")
    labels: Literal["known", "inferred", "optimised"] | None = Field(
        None, description="absent: optimised with the pictures for dlg, as its paper does, and known for the others"
    )
    iterations: int = Field(300, ge=1)
    step: float = Field(0.03, gt=0, description="of the optimiser, where pictures have values from 0 to 1")
    tv: float = Field(0.01, ge=0, description="weight of the total variation (ig)")
    restarts: int = Field(1, ge=1)


MIN_NOISE, MAX_NOISE = 0.2, 1e4  # outside, accountants are slow, imprecise, or ask for tens of GiB
MAX_STEPS = 10_000_000


class PrivacyConfig(Closed):
    """``[privacy]``: differential privacy, of each client's examples or of each client as a whole."""

    mode: Literal["example", "client"]
    noise_multiplier: float | None = Field(None, description="σ: the noise's deviation is σ times the clipping norm")
    target_epsilon: float | None = Field(None, description="ε that all rounds together may cost; σ is found for it")
    delta: float = Field(description="δ; well below 1/(number of units)")
    allow_weak_delta: bool = Field(False, description="accept a δ above 1/(number of units)")
    max_grad_norm: float | None = Field(None, description="C of an example's gradient (mode 'example')")
    clip: float | None = Field(None, description="C of a client's update (mode 'client')")
    adaptive: AdaptiveClip | None = Field(None, description="let C follow the clients' norms; clip is where it starts")
    accountant: Literal["rdp", "prv", "pld"] = "rdp"
    max_epsilon: float | None = Field(None, description="the run stops before it would spend more")
    sampling: Literal["poisson", "fixed", "shuffle"] = "poisson"
    noise: Literal["os", "seeded"] = Field("os", description="seeded: repeatable from the config, no privacy at all")
    grad_sample: Literal["auto", "batched", "opacus"] = Field("auto", description="how gradients of examples are had")

    @model_validator(mode="after")
    def _sane(self) -> "PrivacyConfig":
        for name in ("noise_multiplier", "target_epsilon", "max_epsilon", "max_grad_norm", "clip"):
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{name}: must be greater than 0 (got {value})")
        if not 1e-16 <= self.delta < 1:
            raise ValueError(f"delta: must be at least 1e-16 and less than 1 (got {self.delta})")
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            got = "neither" if self.target_epsilon is None else "both"
            raise ValueError(f"noise_multiplier: give either noise_multiplier or target_epsilon (got {got})")
        sigma = self.noise_multiplier
        if sigma is not None and not MIN_NOISE <= sigma <= MAX_NOISE:
            raise ValueError(f"noise_multiplier: must be in {MIN_NOISE}..{MAX_NOISE:g} (got {sigma})")
        wanted, other = ("max_grad_norm", "clip") if self.mode == "example" else ("clip", "max_grad_norm")
        if getattr(self, wanted) is None:
            raise ValueError(f"{wanted}: missing; mode '{self.mode}' needs the norm to clip to")
        if getattr(self, other) is not None:
            raise ValueError(f"{other}: does not belong to mode '{self.mode}', which clips to {wanted}")
        if self.sampling != "poisson":
            raise ValueError(
                f"sampling: must be 'poisson', the sampler that the accountants assume (got '{self.sampling}')"
            )
        claim = next((name for name in ("target_epsilon", "max_epsilon") if getattr(self, name) is not None), None)
        if self.noise == "seeded" and claim:
            raise ValueError(f"noise: 'seeded' protects nobody, so there can be no {claim}; give noise_multiplier")
        if self.mode == "client" and self.grad_sample != "auto":
            raise ValueError("grad_sample: belongs to mode 'example'")
        if self.mode == "example" and self.adaptive:
            raise ValueError("adaptive: belongs to mode 'client'")
        return self


class Experiment(Closed):
    """A whole experiment. Together with nothing else, it decides every number of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$")]
    seed: int = Field(0, ge=0, lt=1 << 64)
    rounds: int = Field(ge=1, le=10_000_000)
    data: DataConfig
    task: SerializeAsAny[TaskConfig]
    strategy: SerializeAsAny[StrategyConfig]
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    privacy: PrivacyConfig | None = None
    attack: AttackConfig | None = None


C = TypeVar("C", bound=BaseModel)


def parse(tables: Mapping[str, Any]) -> Experiment:
    """An experiment from TOML tables. Raises one ``ConfigError`` that lists every problem."""
    problems: list[str] = []
    ready: dict[str, Any] = dict(tables)

    data = tables.get("data")
    if isinstance(data, Mapping):
        own = {key: data[key] for key in DataConfig.model_fields.keys() & data.keys() - {"dataset", "partition"}}
        dataset = {key: value for key, value in data.items() if key not in own and key != "partition"}
        ready["data"] = own | {
            "dataset": _plugin("datasets", "data.name", dataset, "name", problems, ("holdout", "partition")),
            "partition": _plugin("partitioners", "data.partition.name", data.get("partition"), "name", problems),
        }
    ready["task"] = _plugin("tasks", "task.model", tables.get("task"), "model", problems)
    ready["strategy"] = _plugin("strategies", "strategy.name", tables.get("strategy"), "name", problems)

    failed = {key for key in ("task", "strategy") if ready[key] is None}
    try:
        experiment = Experiment.model_validate(ready)
    except ValidationError as e:
        problems += [
            p
            for p in explain(e, Experiment, ready)
            if p.split(":")[0] not in failed | {"data.dataset", "data.partition"}
        ]
    if problems:
        raise ConfigError(*(_at_home(p, tables) for p in dict.fromkeys(problems)))
    return experiment


def _at_home(problem: str, tables: Mapping[str, Any]) -> str:
    """The problem, or where its unknown key belongs if that is another table."""
    path, _, what = problem.partition(": ")
    if not what.startswith("unknown key"):
        return problem
    key = path.rpartition(".")[2]
    if key in COMMON:
        return problem
    for table, fields in _tables(tables):
        if key in fields:
            return f"{path}: unknown key; it belongs to {f'[{table}]' if table else 'the top of the file'}"
    return problem


def _tables(tables: Mapping[str, Any]) -> Iterator[tuple[str, Collection[str]]]:
    """The tables of this config with their keys, as far as they can be known."""
    data = tables.get("data")
    partition = data.get("partition") if isinstance(data, Mapping) else None
    for group, path, table, key in (
        ("strategies", "strategy", tables.get("strategy"), "name"),
        ("tasks", "task", tables.get("task"), "model"),
        ("datasets", "data", data, "name"),
        ("partitioners", "data.partition", partition, "name"),
    ):
        if isinstance(table, Mapping) and isinstance(table.get(key), str):
            with suppress(ConfigError):
                yield path, config_of(group, table[key]).model_fields.keys() - {"name", "model"}
    yield "data", {"holdout", "partition"}
    for name, field in Experiment.model_fields.items():
        for model in _types(field.annotation):
            if issubclass(model, Closed) and name not in ("strategy", "task", "data"):
                yield name, model.model_fields.keys()
    yield "", Experiment.model_fields.keys()


def _plugin(
    group: str, where: str, table: Any, key: str, problems: list[str], others: Sequence[str] = ()
) -> BaseModel | None:
    """Parse a table by the ``Config`` of the plugin that it names; problems are added to the list.

    ``others`` are keys that may stand in the table, but are not the plugin's.
    """
    path = where.rpartition(".")[0]
    if not isinstance(table, Mapping):
        got = "missing" if table is None else f"must be a table (got {table!r})"
        problems.append(f"{path}: {got}")
        return None
    name = table.get(key)
    if not isinstance(name, str):
        problems.append(f"{where}: {'missing' if name is None else f'must be a string (got {name!r})'}")
        return None
    try:
        model = config_of(group, name)
        try:
            return model.model_validate(dict(table))
        except ValidationError as e:
            raise ConfigError(*explain(e, model, table, path, others)) from None
    except ConfigError as e:
        problems += [p if p.startswith(path) else f"{where}: {p}" for p in e.problems]
        return None


BASES: dict[str, type[BaseModel]] = {
    "datasets": DatasetConfig,
    "partitioners": PartitionConfig,
    "tasks": TaskConfig,
    "strategies": StrategyConfig,
}


def groups_of(name: str) -> list[str]:
    """The groups in which a plugin has this name; for one of the user's own, the group that it has the shape of.

    Raises ``ConfigError`` where one's own cannot be imported.
    """
    groups = [group for group in registry.GROUPS if name in registry.installed(group)]
    if groups or not registry.is_own(name):
        return groups
    plugin = registry.own(name)
    model = getattr(plugin, "Config", None)
    if model is None and callable(plugin):
        from torch import nn

        return ["tasks" if not isinstance(plugin, type) or issubclass(plugin, nn.Module) else "strategies"]
    return [g for g, base in BASES.items() if isinstance(model, type) and issubclass(model, base)] or ["strategies"]


def config_of(group: str, name: str) -> type[BaseModel]:
    """The ``Config`` of a plugin. Raises ``ConfigError`` where it has none of the kind that its group needs."""
    model, base = registry.load(group, name).Config, BASES[group]
    if not (isinstance(model, type) and issubclass(model, base)):
        raise ConfigError(f"plugin '{name}': its Config must be a subclass of {base.__name__}")
    return model


def check(model: type[C], table: Mapping[str, Any], path: str = "") -> C:
    """Validate a table, with problems as ``path.key: what is wrong (got value)``."""
    try:
        return model.model_validate(dict(table))
    except ValidationError as e:
        raise ConfigError(*explain(e, model, table, path)) from None


def explain(
    error: ValidationError,
    model: type[BaseModel],
    table: Mapping[str, Any],
    prefix: str = "",
    others: Sequence[str] = (),
) -> list[str]:
    """One line a problem of ``table``: where, what is expected, what was found, and the nearest name for a typo."""
    lines: list[str] = []
    expected: dict[tuple[str, str], list[str]] = {}  # of each place with the wrong value there: each kind has its own
    for item in error.errors():
        raw, kind = list(map(str, item["loc"])), item["type"]
        loc = [part if BARE.fullmatch(part) else repr(part) for part in _written(item["loc"], table, kind)]
        where = ".".join(([prefix] if prefix else []) + loc)
        if kind == "extra_forbidden":
            known = [*_fields_at(model, raw[:-1]), *(others if len(loc) == 1 else ())]
            hint = did_you_mean(loc[-1], known) or (f"; known: {', '.join(sorted(known))}" if known else "")
            lines.append(f"{where}: unknown key{hint}")
        elif kind == "missing":
            lines.append(f"{where}: missing")
        elif kind == "union_tag_not_found":
            lines.append(f"{where}.{item['ctx']['discriminator'][1:-1]}: missing")
        elif kind == "union_tag_invalid":
            key, tag, tags = (str(item["ctx"][of]) for of in ("discriminator", "tag", "expected_tags"))
            *most, last = tags.split(", ")
            hint = did_you_mean(tag, re.findall("'(.*?)'", tags))
            lines.append(f"{where}.{key[1:-1]}: must be {', '.join(most)} or {last} (got {tag!r}){hint}")
        elif kind == "value_error":
            message = str(item["ctx"]["error"])
            lines.append(f"{where}.{message}" if where else message)
        else:
            message = item["msg"].replace("Input should be", "must be").replace("greater than or equal to", "at least")
            message = message.replace("less than or equal to", "at most")
            if kind in ("dict_type", "model_type", "model_attributes_type"):
                message = "must be a table"
            place = where, f"(got {item['input']!r})"
            if place not in expected:
                lines.append(where)
            expected.setdefault(place, []).append(f"{message[0].lower()}{message[1:]}")
    for (where, got), (first, *rest) in expected.items():
        what = " or ".join([first, *(message.removeprefix("must be ") for message in rest)])
        lines[lines.index(where)] = f"{where}: {what} {got}"
    return lines


def _written(loc: Sequence[str | int], table: Mapping[str, Any], kind: str) -> list[str]:
    """A location of pydantic's without the names that it gives to the members of a union, which stand in no file."""
    value: Any = table
    parts = []
    for i, part in enumerate(loc):
        missing = kind == "missing" and i == len(loc) - 1
        if missing or (isinstance(value, Mapping) and part in value):
            parts.append(str(part))
            value = None if missing else value[part]
        elif isinstance(value, list | tuple) and isinstance(part, int):
            parts.append(str(part))
            value = value[part]
    return parts


def _fields_at(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The known keys of the table at ``path`` inside ``model``; of a union, those of the member that is named there."""
    models = [model]
    for part in path:
        fields = [of.model_fields[part] for of in models if part in of.model_fields]
        if fields:
            models = [t for field in fields for t in _types(field.annotation) if issubclass(t, BaseModel)]
        else:
            models = [of for of in models if part in _tags(of)]
    return list(dict.fromkeys(name for of in models for name in of.model_fields))


def _tags(model: type[BaseModel]) -> list[Any]:
    kinds = (field.annotation for field in model.model_fields.values())
    return [tag for kind in kinds if get_origin(kind) is Literal for tag in get_args(kind)]


def _types(annotation: Any) -> Iterator[type]:
    if get_origin(annotation) in (Union, UnionType, Annotated):
        for arg in get_args(annotation):
            yield from _types(arg)
    elif isinstance(annotation, type):
        yield annotation


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ``ConfigError`` naming the file for anything that is not one."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8") from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: not valid TOML: {e}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None


def override(tables: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply ``a.b=value`` to nested tables; values are TOML, and bare words are strings."""
    result = _copy(tables)
    for assignment in assignments:
        path, _, text = assignment.partition("=")
        *parents, leaf = path.split(".")
        table = result
        for part in parents:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"{path}: '{part}' is not a table")
        table[leaf] = value(text)
    return result


def sweep(assignments: Sequence[str]) -> list[list[str]]:
    """The product of overrides with commas: ``seed=1,2 lr=0.1`` gives two lists of assignments."""
    choices = []
    for assignment in assignments:
        path, eq, text = assignment.partition("=")
        if not eq or not path:
            raise ConfigError(f"{assignment}: overrides are written key=value")
        choices.append([f"{path}={part}" for part in _split(text)])
    return [list(combination) for combination in itertools.product(*choices)]


def value(text: str) -> Any:
    """A TOML value, or the text itself where it is a bare word."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def _split(text: str) -> list[str]:
    """Split at the commas that are outside brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _copy(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(item) if isinstance(item, Mapping) else item for key, item in tables.items()}


def dump(experiment: Experiment) -> dict[str, Any]:
    """The tables that ``parse`` turns into this experiment, with every default written out."""
    tables = experiment.model_dump(exclude_none=True)
    data = tables["data"]
    tables["data"] = data.pop("dataset") | data
    return tables


def differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> list[str]:
    """The dotted keys in which two dumps differ."""
    out = []
    for key in sorted(a.keys() | b.keys()):
        x, y, here = a.get(key), b.get(key), f"{path}{key}"
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            out += differences(x, y, f"{here}.")
        elif _plain(x) != _plain(y):
            out.append(here)
    return out


def _plain(value: Any) -> Any:
    """A value as TOML gives it back: without tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
