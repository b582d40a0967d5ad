"""Which clients take part in a round."""

from fedsim.rng import Key


def uniform(key: Key, population: int, size: int) -> list[int]:
    """``size`` different clients of 0..population-1, uniformly; O(size) in time and memory."""
    return sorted(key.numpy().choice(population, size, replace=False, shuffle=False).tolist())
