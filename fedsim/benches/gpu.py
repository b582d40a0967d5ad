"""`gpu_w1`, `gpu_lora`: what a GPU gains by whole blocks, recorded steps, bfloat16, and several workers on it.

By wall time, since a process that waits for a GPU uses its core as well.
"""

from typing import Any

from fedsim.benches.lora import Spec, texts

BLOCKS = (16, 128)


def specs(w1: dict[str, Any], device: str = "cuda") -> list[Spec]:
    """Of W1's experiment and of LoRA's; nothing where there is no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return []
    on = (f"engine.device={device}",)
    batched = "engine.execution=batched"
    arms: list[tuple[str, tuple[str, ...]]] = [("one by one", (*on, "engine.execution=plain"))]
    arms += [(f"blocks of {n}", (*on, batched, f"engine.block={n}")) for n in BLOCKS]
    most = (*on, batched, f"engine.block={BLOCKS[-1]}")
    recorded = ("engine.record=true",) if device == "cuda" else ()
    arms += [
        (f"blocks of {BLOCKS[-1]}, recorded", (*most, *recorded)),
        (f"blocks of {BLOCKS[-1]}, recorded, bfloat16", (*most, *recorded, "task.precision=bfloat16")),
    ]
    arms += [
        (f"{n} workers, blocks of 32", (*on, batched, "engine.block=32", "engine.kind=ray", f"engine.workers={n}"))
        for n in (2, 4)
    ]
    out = [Spec("gpu_w1", "W1 on a GPU: CNN, 100 of 1000 clients, batch 10", w1, tuple(arms), "wall")]
    if (experiment := texts()) is not None:
        experiment["data"] |= {"length": 64}
        experiment["strategy"] |= {"cohort": 8, "batch_size": 8, "steps": 8}
        lora = (
            ("one by one", (*on, "engine.execution=plain")),
            ("in blocks of 8", (*on, batched, "engine.block=8")),
            ("in blocks of 8, bfloat16", (*on, batched, "engine.block=8", "task.precision=bfloat16")),
        )
        title = "LoRA on a GPU: MiniLM, 8 clients, 8 steps of 8 texts of 64 tokens"
        out.append(Spec("gpu_lora", title, experiment, lora, "wall"))
    return out
