"""Fusion layers of a graph, and reasons for what is none."""
