"""Krum on points in the plane, with a node that lies."""
