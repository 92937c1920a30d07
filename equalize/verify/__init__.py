"""Proof that what was written is what was planned."""
