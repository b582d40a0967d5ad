"""Randomness by name, not by order.

Every draw comes from a stream named by what it is for: ``Key.root(seed).at("cohort", round)``. A name always gives
the same numbers, whatever was drawn before it, by whichever worker. The global generators are never used.
"""

from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch


class Key(NamedTuple):
    """The name of a stream: a seed and the digest of a path of words and numbers."""

    seed: int
    digest: bytes

    @classmethod
    def root(cls, seed: int) -> "Key":
        return cls(seed, blake2b(f"fedsim:{seed}".encode(), digest_size=16).digest())

    def at(self, *names: str | int) -> "Key":
        """The stream named by this path and ``names``; ``at(a).at(b)`` is ``at(a, b)``."""
        digest = self.digest
        for name in names:
            digest = blake2b(f"{type(name).__name__}:{name}".encode(), digest_size=16, key=digest).digest()
        return Key(self.seed, digest)

    def numpy(self) -> np.random.Generator:
        """A fresh generator for permutations and choices; equal keys give equal draws."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self.digest, "little")))

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for tensors; equal keys on one device type give equal draws."""
        return torch.Generator(device).manual_seed(int.from_bytes(self.digest[:8], "little") >> 1)
