"""Where clients run: every one is a Flower Grid."""
