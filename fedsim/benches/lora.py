"""`lora`: adapters on all-MiniLM-L6-v2, a block of clients through the frozen model at once against one by one."""

from typing import Any, Literal, NamedTuple


class Spec(NamedTuple):
    """A workload in plain values: arms are a name and the overrides of the experiment; ``clock`` as in ``Workload``."""

    name: str
    title: str
    experiment: dict[str, Any]
    arms: tuple[tuple[str, tuple[str, ...]], ...]
    clock: Literal["cpu", "wall"] = "cpu"


def texts() -> dict[str, Any] | None:
    """The experiment; None where the model or the texts were not fetched."""
    from fedsim.data import fetch

    here = fetch.available()
    if not here["minilm"] or not here["fine_foods"]:
        return None
    return {
        "name": "bench",
        "seed": 1,
        "rounds": 3,
        "data": {"name": "fine_foods", "length": 32, "test": 16, "partition": {"name": "iid", "clients": 32}},
        "task": {"model": "text"},
        "strategy": {"name": "ffa_lora", "lr": 1.0, "cohort": 16, "steps": 2, "batch_size": 2},
        "evaluate": {"every": 3},
    }


def specs() -> list[Spec]:
    """Nothing where the model or the texts were not fetched."""
    experiment = texts()
    if experiment is None:
        return []
    batched = "engine.execution=batched"
    arms: list[tuple[str, tuple[str, ...]]] = []
    for batch in (2, 8):
        size = f"strategy.batch_size={batch}"
        arms += [
            (f"one by one, batch {batch}", (size, "engine.execution=plain")),
            (f"in blocks, batch {batch}", (size, batched)),
        ]
    private = (
        "strategy.batch_size=8", "engine.execution=plain", "privacy.mode=example", "privacy.noise_multiplier=1.0",
        "privacy.delta=1e-5", "privacy.max_grad_norm=1.0",
    )  # fmt: skip
    arms.append(("private, batch 8", private))
    arms.append(("bfloat16, in blocks, batch 8", ("strategy.batch_size=8", batched, "task.precision=bfloat16")))
    title = "LoRA: MiniLM, FFA-LoRA on query and value, 16 clients, 2 steps of 32 tokens"
    return [Spec("lora", title, experiment, tuple(arms))]
