"""Which clients take part in a round."""

from fedsim.rng import Key


def uniform(key: Key, population: int, size: int) -> list[int]:
    """``size`` different clients of 0..population-1, uniformly; O(size) in time and memory."""
    return sorted(key.numpy().choice(population, size, replace=False, shuffle=False).tolist())


def poisson(key: Key, population: int, rate: float) -> list[int]:
    """Each client of 0..population-1 on its own with probability ``rate``; time and memory are O(those chosen).

    The size is drawn from its binomial law, and then so many different clients uniformly: the same distribution as a
    coin for each client. The cohort may be empty.
    """
    generator = key.numpy()
    size = int(generator.binomial(population, rate))
    return sorted(generator.choice(population, size, replace=False, shuffle=False).tolist())
