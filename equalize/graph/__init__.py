"""A network as a graph of operations."""
