"""How this process asks for memory. On glibc only; elsewhere nothing happens."""

import ctypes
from functools import cache

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # mallopt's names, from malloc.h
LARGEST = 32 << 20  # the most that glibc takes as a threshold
KEPT = 1 << 30


@cache
def keep() -> bool:
    """Have freed memory kept for the next client, up to 1 GiB, and not given back at once; whether that could be said.

    glibc maps every large tensor anew and unmaps it when it is freed, so that each page of each client's model is a
    fault and is zeroed by the kernel: as much work again as a round of 50 clients of 44 MB has to do.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, KEPT))
