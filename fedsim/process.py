"""How a process that computes is set up: in a run, in a worker, in a deployed node."""

import ctypes
import os
from functools import cache

import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's names, from malloc.h
LARGEST = 32 << 20  # the most that glibc takes as a threshold
KEPT = 1 << 30


def prepare() -> None:
    """One thread, freed memory kept, operations with the same bits every time, and float32 that is float32."""
    torch.set_num_threads(1)
    keep()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS may sum in another order each time
    torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU would round their operands to 10 bits
    # As torch.use_deterministic_algorithms(True, warn_only=True), which would load all of torch._inductor: 1.5 s.
    torch.set_deterministic_debug_mode("warn")


@cache
def keep() -> bool:
    """Have freed memory kept for the next client, up to 1 GiB, and not given back at once; whether that could be said.

    glibc maps every large tensor anew and unmaps it when it is freed, so that each page of each client's model is a
    fault and is zeroed by the kernel: as much work again as a round of 50 clients of 44 MB has to do. On glibc only;
    elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
