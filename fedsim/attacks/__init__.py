"""What can be learned about a client's examples from what it sends: gradient inversion, measured and not believed."""
