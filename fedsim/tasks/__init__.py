"""Models as pure functions of their parameters, and what is measured on them."""
