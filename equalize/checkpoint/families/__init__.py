"""One folder a family of checkpoints: `description.py` needs no torch, `family.py` loads and writes."""
