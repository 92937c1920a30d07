"""Checkpoints of mmsegmentation."""
