"""Randomness by name, not by order.

Every draw comes from a stream named by what it is for: ``Key.root(seed).at("cohort", round)``. A name always gives
the same numbers, whatever was drawn before it, by whichever worker. The global generators are never used.
"""

from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch

_MT_WORDS = 624


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
            text = f"str:{name}" if isinstance(name, str) else f"int:{int(name)}"  # NumPy's 3 is 3
            digest = blake2b(text.encode(), digest_size=16, key=digest).digest()
        return Key(self.seed, digest)

    def numpy(self) -> np.random.Generator:
        """A fresh generator for permutations and choices; equal keys give equal draws."""
        return np.random.Generator(np.random.Philox(key=int.from_bytes(self.digest, "little")))

    def wide(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Like ``torch()``, on a CPU with all 128 bits of the name in it, on a GPU with 63.

        ``manual_seed`` keeps 32 bits on a CPU: few enough to try them all, and to meet one twice in 65,000 streams.
        A GPU's generator (Philox) has a key of 64 bits. Noise that protects somebody is drawn from here.
        """
        if torch.device(device).type != "cpu":
            return self.torch(device)
        generator = torch.Generator()
        state = generator.get_state()
        words = np.random.Philox(key=int.from_bytes(self.digest, "little")).random_raw(_MT_WORDS)
        # The state is three words, then the Mersenne Twister's 624 numbers of 32 bits in as many words.
        state.numpy().view(np.uint64)[3 : 3 + _MT_WORDS] = words >> np.uint64(32)
        return generator.set_state(state)

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for tensors; equal keys on one device type give equal draws."""
        return torch.Generator(device).manual_seed(int.from_bytes(self.digest[:8], "little") >> 1)
