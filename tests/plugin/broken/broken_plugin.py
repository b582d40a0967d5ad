"""What a plugin must not do."""

raise RuntimeError("this plugin was made for another version")
