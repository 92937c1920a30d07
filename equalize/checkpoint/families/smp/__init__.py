"""Checkpoints of segmentation_models_pytorch."""
