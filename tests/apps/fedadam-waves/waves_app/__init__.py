"""FedAdam fits a network to noisy waves, a different stretch of them at each node."""
